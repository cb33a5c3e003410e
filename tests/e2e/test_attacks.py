"""The catalogue of hostile requests: each is refused by name, and changes nothing.

Knows raw bytes on a socket, and what a run looked like before and after. Does not know the server's code.
"""

from __future__ import annotations

import gzip
import json
import pickle
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from safetensors.torch import save

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

#: The run under attack: its tensors in canonical order, its latest step.
TENSORS = {
    "big": torch.tensor([1.5, -2.5], dtype=torch.float64),
    "a.weight": torch.arange(12.0).reshape(4, 3),
    "b.bias": torch.tensor([0.25, 0.5, 0.75]),
    "emb": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.bfloat16),
}
STEP = 7
NEXT = f"/v1/runs/{{run}}/updates/{STEP + 1}"
HEADER: dict[str, Any] = {
    "big": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]},
    "a.weight": {"dtype": "F32", "shape": [4, 3], "data_offsets": [16, 64]},
    "b.bias": {"dtype": "F32", "shape": [3], "data_offsets": [64, 76]},
    "emb": {"dtype": "BF16", "shape": [5], "data_offsets": [76, 86]},
}
DATA = bytes(86)
ANSWER_SECONDS = 20.0


# --- forging --------------------------------------------------------------------------------------------------------


def body(header: dict[str, Any] | bytes, data: bytes = DATA, *, length: int | None = None) -> bytes:
    """A safetensors body with any header, true or not; ``length`` is what the first 8 bytes claim."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: Any = "F32", shape: Any = (3,), offsets: Any = (64, 76), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def header_with(name: str, value: Any) -> dict[str, Any]:
    """The right header with one entry replaced or added."""
    return {**HEADER, name: value}


def bias(**changes: Any) -> bytes:
    """A body whose entry ``b.bias`` has these members."""
    return body(header_with("b.bias", {**HEADER["b.bias"], **changes}))


def without(*names: str) -> bytes:
    """A well-formed body that lacks these tensors."""
    return save({name: tensor for name, tensor in TENSORS.items() if name not in names})


def tensors_with(name: str, tensor: torch.Tensor) -> bytes:
    """A well-formed body with one tensor replaced or added."""
    return save({**TENSORS, name: tensor})


def with_value(name: str, value: float, index: int = -1) -> bytes:
    """A well-formed body with one element set to ``value``."""
    tensor = TENSORS[name].clone()
    tensor.view(-1)[index] = value
    return tensors_with(name, tensor)


def chunked(payload: bytes, size: int = 7, *, end: bool = True) -> bytes:
    """``payload`` in chunked transfer coding."""
    pieces = [payload[at : at + size] for at in range(0, len(payload), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + (b"0\r\n\r\n" if end else b"")


GOOD = save(TENSORS)
CHUNKS = (("Transfer-Encoding", "chunked"),)


# --- sending --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """One hostile request and what must come back: the status, the code, a word of the detail.

    path: ``{run}`` is the run under attack, ``{fresh}`` one that awaits its initial weights. payload: sent after the
    headers as it is. hang_up: close instead of reading an answer (status 0).
    """

    name: str
    status: int
    code: str
    word: str
    payload: bytes = b""
    method: str = "PUT"
    path: str = NEXT
    headers: tuple[tuple[str, str], ...] | None = None
    hang_up: bool = False

    def request(self, run: str, fresh: str) -> bytes:
        path = self.path.replace("{run}", run).replace("{fresh}", fresh)
        headers = (("Content-Length", str(len(self.payload))),) if self.headers is None else self.headers
        lines = [f"{self.method} {path} HTTP/1.1", "Host: test"]
        lines += [f"{name}: {value}" for name, value in headers]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + self.payload


class Connection:
    """One connection, spoken to in raw bytes."""

    def __init__(self, url: str, *, timeout: float = ANSWER_SECONDS) -> None:
        address = urlsplit(url)
        self._socket = socket.create_connection((address.hostname, address.port), timeout=timeout)
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer."""
        status = int(self._file.readline().split()[1])
        lines = iter(lambda: self._file.readline().decode("latin-1").strip(), "")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        return status, headers, self._file.read(int(headers.get("content-length", 0)))


def exchange(url: str, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send raw bytes and read one answer: status, headers, body."""
    with Connection(url) as connection:
        connection.send(request)
        return connection.answer()


def send_and_hang_up(url: str, request: bytes) -> None:
    with Connection(url) as connection:
        connection.send(request)


def staging_bytes(honest: httpx.Client) -> float:
    lines = honest.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("ema_staging_bytes ")))


def await_no_push_in_flight(honest: httpx.Client) -> None:
    """Return when the server has let go of every push. Fails after a while."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while staging_bytes(honest):
        assert time.monotonic() < deadline, "a push that broke off still holds its staging"
        time.sleep(0.01)


# --- the run under attack -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def honest(server: ServerProcess) -> Iterator[httpx.Client]:
    """A client that means well."""
    with server.http() as client:
        yield client


@pytest.fixture(scope="module")
def target(honest: httpx.Client, plain_run_at: Callable[..., PlainRun]) -> PlainRun:
    """A run with two averages at step 7: every case leaves it as it was, so all cases share it."""
    averages = [{"name": "ema"}, {"name": "fast", "decay": 0.5, "schedule": "constant"}]
    run = plain_run_at(honest, "under-attack", TENSORS, averages=averages)
    for step in (3, STEP):
        run.push(step, {name: tensor * step for name, tensor in TENSORS.items()}).raise_for_status()
    return run


@pytest.fixture(scope="module")
def fresh(honest: httpx.Client, plain_run_at: Callable[..., PlainRun]) -> PlainRun:
    """A run that awaits its initial weights, and goes on waiting for them."""
    run = plain_run_at(honest, "never-begun")
    run.create(TENSORS).raise_for_status()
    return run


@pytest.fixture
def unchanged(server: ServerProcess, honest: httpx.Client, target: PlainRun, fresh: PlainRun) -> Iterator[None]:
    """After the test: both runs are what they were, byte for byte, and the server still answers."""

    def everything() -> tuple[object, ...]:
        pulls = [target.pull(average=average).raise_for_status().content for average in ("ema", "fast")]
        names = {run["run"] for run in honest.get("/v1/runs").json()["runs"]}
        return (*pulls, target.info(), fresh.info(), names)

    before = everything()
    yield
    await_no_push_in_flight(honest)
    assert everything() == before
    assert exchange(server.url, b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n")[0] == 200


def test_the_forger_forges_well(plain_run: Callable[..., PlainRun], server: ServerProcess) -> None:
    """What the attacks vary is accepted as it stands: HEADER with DATA, with a length or in chunks."""
    run = plain_run(server, TENSORS)
    for step, (payload, headers) in enumerate(
        [
            (body(HEADER), None),
            (body(dict(reversed(HEADER.items()))), None),
            (body({**HEADER, "__metadata__": {"format": "pt"}}), None),
            (chunked(body(HEADER)), CHUNKS),
        ]
    ):
        attack = Attack("", 200, "", "", payload, path=f"/v1/runs/{{run}}/updates/{step}", headers=headers)
        status, _, answer = exchange(server.url, attack.request(run.name, ""))

        assert (status, json.loads(answer)["applied"]) == (200, True)


# --- the catalogue --------------------------------------------------------------------------------------------------

MISMATCH, MALFORMED, INVALID = "layout_mismatch", "malformed_body", "invalid_request"

NOT_THE_TENSORS = [
    Attack("a tensor is missing", 422, MISMATCH, "missing: emb", without("emb")),
    Attack("two tensors are missing", 422, MISMATCH, "missing: big, b.bias", without("big", "b.bias")),
    Attack("no tensor at all", 422, MISMATCH, "missing", body({}, b"")),
    Attack("a tensor too many", 422, MISMATCH, "extra", tensors_with("extra", torch.zeros(1))),
    Attack("a tensor too many of no bytes", 422, MISMATCH, "extra", tensors_with("extra", torch.zeros(0))),
    Attack(
        "a tensor renamed",
        422,
        MISMATCH,
        "b.bios",
        body({"b.bios" if k == "b.bias" else k: v for k, v in HEADER.items()}),
    ),
    Attack(
        "a NUL in a name", 422, MISMATCH, "emb\0", body({"emb\0" if k == "emb" else k: v for k, v in HEADER.items()})
    ),
    Attack(
        "a tensor of another size",
        422,
        MISMATCH,
        "b.bias is F32 [4], expected F32 [3]",
        tensors_with("b.bias", torch.zeros(4)),
    ),
    Attack(
        "a tensor transposed",
        422,
        MISMATCH,
        "a.weight is F32 [3, 4], expected F32 [4, 3]",
        tensors_with("a.weight", torch.zeros(3, 4)),
    ),
    Attack("a tensor flattened", 422, MISMATCH, "a.weight", tensors_with("a.weight", torch.zeros(12))),
    Attack("a dimension of one more", 422, MISMATCH, "b.bias", bias(shape=[3, 1])),
    Attack("fp16 for bf16", 422, MISMATCH, "emb is F16", tensors_with("emb", torch.zeros(5, dtype=torch.float16))),
    Attack(
        "integers for floats", 422, MISMATCH, "b.bias is I32", tensors_with("b.bias", torch.zeros(3, dtype=torch.int32))
    ),
    Attack(
        "float64 for float32",
        422,
        MISMATCH,
        "b.bias is F64",
        tensors_with("b.bias", torch.zeros(3, dtype=torch.float64)),
    ),
    Attack(
        "two tensors' sizes exchanged",
        422,
        MISMATCH,
        "a.weight",
        save({**TENSORS, "a.weight": TENSORS["b.bias"], "b.bias": TENSORS["a.weight"]}),
    ),
]

LYING_HEADERS = [
    Attack("overlapping tensors", 422, MALFORMED, "overlaps", body(header_with("b.bias", entry(offsets=[60, 72])))),
    Attack(
        "two tensors in one place",
        422,
        MALFORMED,
        "overlaps",
        body(header_with("b.bias", entry(shape=[12], offsets=[16, 64]))),
    ),
    Attack(
        "a gap between tensors",
        422,
        MALFORMED,
        "gap",
        body(header_with("emb", entry("BF16", [5], [78, 88])), bytes(88)),
    ),
    Attack("a gap at the front", 422, MALFORMED, "gap", body({"b.bias": entry(offsets=[4, 16])}, bytes(16))),
    Attack(
        "offsets far out of range",
        422,
        MALFORMED,
        "gap",
        body(header_with("emb", entry("BF16", [5], [2**62, 2**62 + 10]))),
    ),
    Attack(
        "offsets beyond 64 bits",
        422,
        MALFORMED,
        "data_offsets",
        body(header_with("emb", entry("BF16", [5], [2**64, 2**64 + 10]))),
    ),
    Attack("offsets back to front", 422, MALFORMED, "b.bias", bias(data_offsets=[76, 64])),
    Attack("negative offsets", 422, MALFORMED, "b.bias", bias(data_offsets=[-12, 0])),
    Attack("offsets too far apart", 422, MALFORMED, "b.bias", bias(data_offsets=[64, 80])),
    Attack("one offset", 422, MALFORMED, "data_offsets", bias(data_offsets=[64])),
    Attack("three offsets", 422, MALFORMED, "data_offsets", bias(data_offsets=[64, 76, 86])),
    Attack("offsets are fractions", 422, MALFORMED, "data_offsets", bias(data_offsets=[64.0, 76.0])),
    Attack("offsets are null", 422, MALFORMED, "data_offsets", bias(data_offsets=None)),
    Attack(
        "a name twice",
        422,
        MALFORMED,
        "'emb' twice",
        body(json.dumps(HEADER).encode()[:-1] + b', "emb": ' + json.dumps(HEADER["emb"]).encode() + b"}"),
    ),
    Attack(
        "a member twice",
        422,
        MALFORMED,
        "'dtype' twice",
        body(json.dumps(HEADER).encode().replace(b'{"dtype": "F64"', b'{"dtype": "F32", "dtype": "F64"')),
    ),
    Attack("a member too many", 422, MALFORMED, "b.bias", bias(stride=[1])),
    Attack("a member missing", 422, MALFORMED, "b.bias", body(header_with("b.bias", {"dtype": "F32", "shape": [3]}))),
    Attack("an entry that is a list", 422, MALFORMED, "b.bias", body(header_with("b.bias", ["F32", [3], [64, 76]]))),
    Attack("an entry that is null", 422, MALFORMED, "b.bias", body(header_with("b.bias", None))),
    Attack("an unknown dtype", 422, MALFORMED, "F4", bias(dtype="F4")),
    Attack("dtype is null", 422, MALFORMED, "dtype", bias(dtype=None)),
    Attack("dtype is an object", 422, MALFORMED, "dtype", bias(dtype={"F32": 1})),
    Attack("a negative size", 422, MALFORMED, "shape", bias(shape=[-3])),
    Attack("two negative sizes", 422, MALFORMED, "shape", bias(shape=[-3, -1])),
    Attack("true for a size", 422, MALFORMED, "shape", bias(shape=[3, True])),
    Attack("a fraction for a size", 422, MALFORMED, "shape", bias(shape=[3.0])),
    Attack("text for a size", 422, MALFORMED, "shape", bias(shape=["3"])),
    Attack("text for a shape", 422, MALFORMED, "shape", bias(shape="3")),
    Attack("33 dimensions", 422, MALFORMED, "shape", bias(shape=[3] + [1] * 32)),
    Attack("a size beyond 64 bits", 422, MALFORMED, "shape", bias(shape=[10**30])),
    Attack("sizes whose product is beyond 64 bits", 422, MALFORMED, "b.bias", bias(shape=[2**62, 2**62])),
    Attack(
        "sizes whose product wraps around to the right one",
        422,
        MALFORMED,
        "b.bias",
        bias(shape=[2**32 + 1, 2**32 + 1]),
    ),
    Attack(
        "a size of 5,000 digits",
        422,
        MALFORMED,
        "not JSON",
        body(json.dumps(HEADER).encode().replace(b"[3]", b"[" + b"9" * 5000 + b"]")),
    ),
    Attack(
        "a size of infinity", 422, MALFORMED, "shape", body(json.dumps(HEADER).encode().replace(b"[3]", b"[1e999]"))
    ),
    Attack("an empty name", 422, MALFORMED, "name", body(header_with("", entry(shape=[0], offsets=[0, 0])))),
    Attack(
        "a name of 1,025 characters",
        422,
        MALFORMED,
        "1025",
        body(header_with("n" * 1025, entry(shape=[0], offsets=[0, 0]))),
    ),
    Attack(
        "half a surrogate pair in a name",
        422,
        MALFORMED,
        "Unicode",
        body(header_with("\ud800", entry(shape=[0], offsets=[0, 0]))),
    ),
    Attack("half a surrogate pair in a dtype", 422, MALFORMED, "dtype", bias(dtype="\ud800")),
    Attack(
        "half a surrogate pair in metadata",
        422,
        MALFORMED,
        "__metadata__",
        body({**HEADER, "__metadata__": {"\udfff": "x"}}),
    ),
    Attack("metadata that is a list", 422, MALFORMED, "__metadata__", body({**HEADER, "__metadata__": []})),
    Attack("metadata that is a number", 422, MALFORMED, "__metadata__", body({**HEADER, "__metadata__": {"step": 1}})),
    Attack("metadata twice", 422, MALFORMED, "twice", body(b'{"__metadata__": {}, "__metadata__": {}}', b"")),
    Attack(
        "metadata nested 100,000 deep",
        422,
        MALFORMED,
        "not JSON",
        body(b'{"__metadata__": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001),
    ),
    Attack(
        "lists nested 100,000 deep",
        422,
        MALFORMED,
        "not JSON",
        body(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ),
    Attack("nested 100,000 deep and cut", 422, MALFORMED, "not JSON", body(b'{"a":' * 100_000)),
    Attack(
        "header is not UTF-8", 422, MALFORMED, "not JSON", body(json.dumps(HEADER).encode().replace(b"emb", b"em\xff"))
    ),
    Attack("header is UTF-16", 422, MALFORMED, "begin", body(json.dumps(HEADER).encode("utf-16"))),
    Attack(
        "header has a byte order mark", 422, MALFORMED, "begin", body(b"\xef\xbb\xbf" + json.dumps(HEADER).encode())
    ),
    Attack("header begins with a blank", 422, MALFORMED, "begin", body(b" " + json.dumps(HEADER).encode())),
    Attack("header is a list", 422, MALFORMED, "begin", body(b"[]")),
    Attack("header is null", 422, MALFORMED, "begin", body(b"null")),
    Attack("header is cut", 422, MALFORMED, "not JSON", body(json.dumps(HEADER).encode()[:-1])),
    Attack(
        "something follows the header's object", 422, MALFORMED, "not JSON", body(json.dumps(HEADER).encode() + b"{}")
    ),
    Attack("header is NULs", 422, MALFORMED, "begin", body(bytes(64))),
]

LYING_LENGTHS = [
    Attack("no body", 422, MALFORMED, "ends", b""),
    Attack("seven bytes", 422, MALFORMED, "ends", GOOD[:7]),
    Attack("a length and no header", 422, MALFORMED, "header claims", struct.pack("<Q", 400)),
    Attack("a header of 0 bytes", 422, MALFORMED, "claims 0", body(b"", length=0)),
    Attack("a header of 1 byte", 422, MALFORMED, "claims 1", body(b"{", length=1)),
    Attack("a header of 2**63 bytes", 422, MALFORMED, str(2**63), body(HEADER, length=2**63)),
    Attack("a header of 2**64 - 1 bytes", 422, MALFORMED, str(2**64 - 1), body(HEADER, length=2**64 - 1)),
    Attack("a header just over the limit", 422, MALFORMED, "100000001", body(HEADER, length=100_000_001)),
    Attack("a header longer than the body", 422, MALFORMED, "claims 9000", body(HEADER, length=9000)),
    Attack(
        "a header that reaches into the data",
        422,
        MALFORMED,
        "not JSON",
        body(HEADER, length=len(json.dumps(HEADER)) + 8),
    ),
    Attack("a body one byte short", 422, MALFORMED, "shorter", GOOD[:-1]),
    Attack("a body without data", 422, MALFORMED, "shorter", body(HEADER, b"")),
    Attack("a body one byte long", 422, MALFORMED, "longer", GOOD + b"\0"),
    Attack("a body twice", 422, MALFORMED, "longer", GOOD + GOOD),
    Attack("a forged body one byte long", 422, MALFORMED, "longer", body(HEADER, bytes(87))),
    Attack("an announced terabyte", 413, "body_too_large", str(2**40), headers=(("Content-Length", str(2**40)),)),
]

NOT_SAFETENSORS = [
    Attack("a pickle", 422, MALFORMED, "header claims", pickle.dumps({"emb": [1.0] * 100})),
    Attack("a web page", 422, MALFORMED, "header claims", b"<!DOCTYPE html><html><body>hello</body></html>"),
    Attack("JSON", 422, MALFORMED, "header claims", json.dumps({"big": [1.5, -2.5]}).encode()),
    Attack("a gzipped body", 422, MALFORMED, "header claims", gzip.compress(GOOD)),
    Attack("NULs", 422, MALFORMED, "claims 0", bytes(1000)),
    Attack("0xff", 422, MALFORMED, "header claims", b"\xff" * 1000),
]

NOT_FINITE = [
    Attack(f"{value} in {name}", 422, "non_finite", name, with_value(name, value, index))
    for name in TENSORS
    for value, index in ((float("nan"), 0), (float("inf"), -1), (float("-inf"), 1))
]

IN_CHUNKS = [
    Attack(f"in chunks: {name}", 422, code, word, chunked(payload), headers=CHUNKS)
    for name, code, word, payload in [
        ("no body", MALFORMED, "ends", b""),
        ("seven bytes", MALFORMED, "ends", GOOD[:7]),
        ("a header cut", MALFORMED, "ends", GOOD[:100]),
        ("one byte short", MALFORMED, "ends", GOOD[:-1]),
        ("one byte long", MALFORMED, "longer", GOOD + b"\0"),
        ("100 KB long", MALFORMED, "longer", GOOD + bytes(100_000)),
        ("absurd header length", MALFORMED, str(2**63), body(HEADER, length=2**63)),
        ("a header of 100 MB that never comes", MALFORMED, "header claims", body(HEADER, length=100_000_000)),
        ("a tensor missing", MISMATCH, "emb", without("emb")),
        ("overlapping tensors", MALFORMED, "overlaps", body(header_with("b.bias", entry(offsets=[60, 72])))),
        ("NaN", "non_finite", "emb", with_value("emb", float("nan"))),
        ("a pickle", MALFORMED, "header claims", pickle.dumps({"emb": [1.0] * 100})),
    ]
]

#: Refused by the HTTP parser itself, before there is a request to answer in our shape.
NOT_HTTP = [
    Attack(
        "a length and chunks",
        400,
        "",
        "",
        chunked(GOOD),
        headers=(("Content-Length", str(len(GOOD))), ("Transfer-Encoding", "chunked")),
    ),
    Attack("two lengths", 400, "", "", GOOD, headers=(("Content-Length", str(len(GOOD))), ("Content-Length", "5"))),
    Attack("a negative length", 400, "", "", GOOD, headers=(("Content-Length", "-5"),)),
    Attack("a length in words", 400, "", "", GOOD, headers=(("Content-Length", "many"),)),
    Attack("a length beyond 64 bits", 400, "", "", GOOD, headers=(("Content-Length", "9" * 30),)),
    Attack("an unknown transfer coding", 400, "", "", GOOD, headers=(("Transfer-Encoding", "gzip"),)),
    Attack("a NUL in a header", 400, "", "", GOOD, headers=(("X", "a\0b"), ("Content-Length", str(len(GOOD))))),
    Attack("a raw byte in the path", 400, "", "", GOOD, path="/v1/runs/\xff/updates/1"),
]

BROKEN_OFF = [
    Attack("hangs up after the headers", 0, "", "", b"", headers=(("Content-Length", str(len(GOOD))),), hang_up=True),
    Attack("hangs up in the header", 0, "", "", GOOD[:50], headers=(("Content-Length", str(len(GOOD))),), hang_up=True),
    Attack("hangs up in the data", 0, "", "", GOOD[:-40], headers=(("Content-Length", str(len(GOOD))),), hang_up=True),
    Attack(
        "hangs up before the last byte",
        0,
        "",
        "",
        GOOD[:-1],
        headers=(("Content-Length", str(len(GOOD))),),
        hang_up=True,
    ),
    Attack("hangs up in a chunk", 0, "", "", chunked(GOOD)[:-30], headers=CHUNKS, hang_up=True),
    Attack("hangs up before the last chunk", 0, "", "", chunked(GOOD, end=False), headers=CHUNKS, hang_up=True),
]

WRONG_STEPS = [
    Attack("step -1", 422, INVALID, "step", GOOD, path="/v1/runs/{run}/updates/-1"),
    Attack("step 2**63", 422, INVALID, "step", GOOD, path=f"/v1/runs/{{run}}/updates/{2**63}"),
    Attack("step of 5,000 digits", 422, INVALID, "step", GOOD, path=f"/v1/runs/{{run}}/updates/{'9' * 5000}"),
    Attack("step in words", 422, INVALID, "step", GOOD, path="/v1/runs/{run}/updates/abc"),
    Attack("step 8.5", 422, INVALID, "step", GOOD, path="/v1/runs/{run}/updates/8.5"),
    Attack("step NaN", 422, INVALID, "step", GOOD, path="/v1/runs/{run}/updates/NaN"),
    Attack("no step", 404, "route_not_found", "", GOOD, path="/v1/runs/{run}/updates/"),
    Attack("an older step", 409, "stale_step", f"step {STEP - 1}", GOOD, path=f"/v1/runs/{{run}}/updates/{STEP - 1}"),
    Attack(
        "other bytes at the latest step",
        409,
        "step_conflict",
        f"step {STEP}",
        GOOD,
        path=f"/v1/runs/{{run}}/updates/{STEP}",
    ),
    Attack(
        "an update before the initial weights",
        409,
        "awaiting_weights",
        "initial weights",
        GOOD,
        path="/v1/runs/{fresh}/updates/1",
    ),
    Attack("initial weights again", 409, "weights_exist", "version", GOOD, path="/v1/runs/{run}/weights"),
    Attack(
        "initial weights with NaN",
        422,
        "non_finite",
        "b.bias",
        with_value("b.bias", float("nan")),
        path="/v1/runs/{fresh}/weights",
    ),
    Attack("initial weights that lack a tensor", 422, MISMATCH, "emb", without("emb"), path="/v1/runs/{fresh}/weights"),
    Attack("initial weights one byte short", 422, MALFORMED, "shorter", GOOD[:-1], path="/v1/runs/{fresh}/weights"),
    Attack(
        "initial weights broken off",
        0,
        "",
        "",
        GOOD[:-1],
        path="/v1/runs/{fresh}/weights",
        headers=(("Content-Length", str(len(GOOD))),),
        hang_up=True,
    ),
    Attack("a negative counter", 422, INVALID, "num_updates", GOOD, path="/v1/runs/{fresh}/weights?num_updates=-1"),
    Attack(
        "a counter beyond 64 bits",
        422,
        INVALID,
        "num_updates",
        GOOD,
        path=f"/v1/runs/{{fresh}}/weights?num_updates={2**63}",
    ),
    Attack("a negative initial step", 422, INVALID, "step", GOOD, path="/v1/runs/{fresh}/weights?step=-1"),
]

BAD_NAMES = {
    "..": 422,
    ".": 422,
    "%2e%2e": 422,
    "%2e%2e%2f%2e%2e%2fetc": 404,
    "..%5c..": 422,
    ".hidden": 422,
    "-flag": 422,
    "a%00b": 422,
    "a%0a": 422,
    "a%20b": 422,
    "n" * 129: 422,
    "caf%C3%A9": 422,
    "%FF": 422,
    "a%2Fb": 404,  # a slash ends the name: there is no such route
    "a/b": 404,
    "": 404,
}
WRONG_NAMES = [
    Attack(
        f"{what} named {name[:30] or 'nothing'}",
        status,
        INVALID if status == 422 else "route_not_found",
        "",
        GOOD,
        path=path,
    )
    for name, status in BAD_NAMES.items()
    for what, path in [
        ("a run", f"/v1/runs/{name}/updates/8"),
        ("a snapshot", f"/v1/runs/{{run}}/snapshots/{name}"),
    ]
]

NOT_THERE = [
    Attack("an update of an unknown run", 404, "run_not_found", "nobody", GOOD, path="/v1/runs/nobody/updates/1"),
    Attack("weights of an unknown run", 404, "run_not_found", "nobody", GOOD, path="/v1/runs/nobody/weights"),
    Attack(
        "an unknown average", 404, "average_not_found", "none", method="GET", path="/v1/runs/{run}/weights?average=none"
    ),
    Attack("an average named ..", 422, INVALID, "average", method="GET", path="/v1/runs/{run}/weights?average=.."),
    Attack(
        "an unknown snapshot", 404, "snapshot_not_found", "none", method="DELETE", path="/v1/runs/{run}/snapshots/none"
    ),
    Attack(
        "a read before the initial weights", 409, "awaiting_weights", "", method="GET", path="/v1/runs/{fresh}/weights"
    ),
    Attack("a snapshot before the initial weights", 409, "awaiting_weights", "", path="/v1/runs/{fresh}/snapshots/s"),
    Attack(
        "a reset before the initial weights",
        409,
        "awaiting_weights",
        "",
        method="POST",
        path="/v1/runs/{fresh}/reset-num-updates",
    ),
    Attack("updates posted", 405, "method_not_allowed", "POST", GOOD, method="POST"),
    Attack("a method nobody knows", 405, "method_not_allowed", "", method="TRACE", path="/v1/runs"),
]

_JSON = "application/json"


def json_attack(name: str, word: str, payload: object, method: str = "POST", path: str = "/v1/runs") -> Attack:
    raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    headers = (("Content-Type", _JSON), ("Content-Length", str(len(raw))))
    return Attack(name, 422, INVALID, word, raw, method, path, headers)


def config(**changes: Any) -> dict[str, Any]:
    layout = [{"name": "w", "shape": [3], "dtype": "F32"}]
    return {"run": "attacker", "layout": layout, **changes}


def tensor(**changes: Any) -> dict[str, Any]:
    return config(layout=[{"name": "w", "shape": [3], "dtype": "F32", **changes}])


BAD_DECAYS = {"-0.1": -0.1, "1.1": 1.1, "NaN": float("nan"), "Infinity": float("inf"), "text": "0.9", "true": True}

CONFIGS = [
    *(json_attack(f"create with decay {name}", "decay", config(decay=value)) for name, value in BAD_DECAYS.items()),
    json_attack("create with decay null", "decay", config(decay=None)),
    *(
        json_attack(f"patch with decay {name}", "decay", {"decay": value}, "PATCH", "/v1/runs/{run}")
        for name, value in {**BAD_DECAYS, "null": None}.items()
    ),
    json_attack("an average with decay 2", "averages.0.decay", config(averages=[{"name": "a", "decay": 2}])),
    json_attack("patch nothing", "decay", {}, "PATCH", "/v1/runs/{run}"),
    json_attack("patch something unknown", "num_updates", {"decay": 0.5, "num_updates": 0}, "PATCH", "/v1/runs/{run}"),
    json_attack("patch an average named ..", "average", {"decay": 0.5, "average": ".."}, "PATCH", "/v1/runs/{run}"),
    json_attack("two averages of one name", "'a'", config(averages=[{"name": "a"}, {"name": "a", "decay": 0.5}])),
    json_attack("no average", "averages", config(averages=[])),
    json_attack("17 averages", "averages", config(averages=[{"name": f"a{i}"} for i in range(17)])),
    json_attack("an average named ../ema", "averages.0.name", config(averages=[{"name": "../ema"}])),
    json_attack("an unknown schedule", "schedule", config(averages=[{"name": "a", "schedule": "magic"}])),
    json_attack("no layout", "layout", {"run": "attacker"}),
    json_attack("no tensors", "layout", config(layout=[])),
    json_attack("a layout that is an object", "layout", config(layout={"w": [3]})),
    json_attack("two tensors of one name", "'w'", config(layout=tensor()["layout"] * 2)),
    json_attack("a tensor of integers", "I64", tensor(dtype="I64")),
    json_attack("a dtype in torch's words", "float32", tensor(dtype="float32")),
    json_attack("half a surrogate pair for a dtype", "dtype", tensor(dtype="\ud800")),
    json_attack("a tensor of a negative size", "shape", tensor(shape=[-1])),
    json_attack("a tensor of size true", "shape", tensor(shape=[True])),
    json_attack("a tensor of size 3.5", "shape", tensor(shape=[3.5])),
    json_attack("a tensor of size '3'", "shape", tensor(shape=["3"])),
    json_attack("a tensor of size 2**63", "shape", tensor(shape=[2**63])),
    json_attack("a tensor of 2**65 bytes", "2**63 bytes", tensor(shape=[2**32, 2**31])),
    json_attack("a tensor of 33 dimensions", "shape", tensor(shape=[1] * 33)),
    json_attack("a tensor without a name", "name", tensor(name="")),
    json_attack("a tensor named in 1,025 characters", "name", tensor(name="n" * 1025)),
    json_attack("a tensor named __metadata__", "__metadata__", tensor(name="__metadata__")),
    json_attack("a tensor named by half a surrogate pair", "name", tensor(name="\ud800")),
    json_attack("a field nobody knows", "color", config(color="red")),
    json_attack("a field named by half a surrogate pair", "", config(**{"\ud800": 1})),
    json_attack("a tensor's field nobody knows", "stride", tensor(stride=[1])),
    json_attack("decay_per epoch", "decay_per", config(decay_per="epoch")),
    json_attack("durability eternal", "durability", config(durability="eternal")),
    json_attack("use_num_updates 1", "use_num_updates", config(use_num_updates=1)),
    *(
        json_attack(f"create a run named {name[:20]!r}", "run", config(run=name))
        for name in ["..", "a/b", "", "n" * 129, "café", "a\n", "a\0", "\ud800", ".a"]
    ),
    json_attack("a run that is a number", "run", config(run=5)),
    json_attack("a config that is a list", "", [config()]),
    json_attack("a config that is null", "", b"null"),
    json_attack("a config that is cut", "", json.dumps(config()).encode()[:-1]),
    json_attack("a config that is not UTF-8", "", b'{"run": "\xff"}'),
    json_attack("a config nested 100,000 deep", "", b"[" * 100_000),
    json_attack("a layout nested 100,000 deep", "", b'{"layout": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    json_attack(
        "a tensor of a size of 5,000 digits",
        "",
        json.dumps(config()).encode().replace(b"[3]", b"[" + b"9" * 5000 + b"]"),
    ),
    json_attack("no config", "", b""),
]

CATALOGUE = [
    *NOT_THE_TENSORS,
    *LYING_HEADERS,
    *LYING_LENGTHS,
    *NOT_SAFETENSORS,
    *NOT_FINITE,
    *IN_CHUNKS,
    *NOT_HTTP,
    *BROKEN_OFF,
    *WRONG_STEPS,
    *WRONG_NAMES,
    *NOT_THERE,
    *CONFIGS,
]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("attack", CATALOGUE, ids=lambda attack: attack.name)
def test_refused_and_nothing_changed(attack: Attack, server: ServerProcess, target: PlainRun, fresh: PlainRun) -> None:
    """The request is refused with its code, the detail names what was wrong, and no byte of any run has changed."""
    request = attack.request(target.name, fresh.name)
    if attack.hang_up:
        send_and_hang_up(server.url, request)
        return
    status, headers, answer = exchange(server.url, request)

    assert status == attack.status, answer[:500]
    if attack.code:
        problem = json.loads(answer)
        assert (headers["content-type"], problem["code"]) == ("application/problem+json", attack.code)
        assert attack.word in problem["detail"]


def test_names_are_unique() -> None:
    """Every case of the catalogue has a name of its own."""
    names = [attack.name for attack in CATALOGUE]

    assert len(set(names)) == len(names)


# --- a refused body and the connection ------------------------------------------------------------------------------


PING = b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n"
AFTER_WHICH = {
    "NaN": Attack("", 422, "", "", with_value("emb", float("nan"))),
    "a body one byte short": Attack("", 422, "", "", GOOD[:-1]),
    "a lying header": Attack("", 422, "", "", bias(shape=[4])),
    "an older step": Attack("", 409, "", "", GOOD, path="/v1/runs/{run}/updates/1"),
    "bytes beyond the last chunk's data": Attack("", 422, "", "", chunked(GOOD + bytes(99)), headers=CHUNKS),
}


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("what", AFTER_WHICH)
def test_connection_is_usable_after(what: str, server: ServerProcess, target: PlainRun) -> None:
    """What follows a refused body on its connection is read as the next request, not as a rest of the body."""
    attack = AFTER_WHICH[what]
    with Connection(server.url) as connection:
        connection.send(attack.request(target.name, "") + PING)

        assert connection.answer()[0] == attack.status
        assert connection.answer()[0] == 200


LARGE = body(HEADER, bytes(16 << 20))


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("closes", [False, True], ids=["keep-alive", "close"])
@pytest.mark.parametrize(
    "attack",
    [
        Attack("known length", 413, "body_too_large", "", LARGE),
        Attack("in chunks", 422, MALFORMED, "", chunked(LARGE, 65536), headers=CHUNKS),
        Attack("refused early", 409, "stale_step", "", LARGE, path="/v1/runs/{run}/updates/1"),
    ],
    ids=lambda attack: attack.name,
)
def test_answer_reaches_a_sender_who_first_sends_all(
    attack: Attack, closes: bool, server: ServerProcess, target: PlainRun
) -> None:
    """Who sends a large wrong body to its end before reading gets the refusal, not a broken connection."""
    request = attack.request(target.name, "")
    if closes:
        request = request.replace(b"Host: test", b"Host: test\r\nConnection: close", 1)
    status, _, answer = exchange(server.url, request)

    assert (status, json.loads(answer)["code"]) == (attack.status, attack.code)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("path", "status"), [("/v1/runs/nobody/updates/1", 404), ("/v1/runs/{run}/updates/1", 409)], ids=["404", "409"]
)
def test_early_refusal_does_not_ask_for_the_body(
    path: str, status: int, server: ServerProcess, target: PlainRun
) -> None:
    """With Expect: 100-continue a request that cannot succeed is answered before its body is sent."""
    headers = (("Content-Length", str(len(GOOD))), ("Expect", "100-continue"))
    request = Attack("", status, "", "", b"", path=path, headers=headers).request(target.name, "")
    assert exchange(server.url, request)[0] == status


@pytest.mark.usefixtures("unchanged")
def test_header_out_of_proportion_is_not_waited_for(server: ServerProcess, target: PlainRun) -> None:
    """A header of 50 MB for four tensors is refused by its length: parsing it would stop the server for seconds."""
    claimed = 50_000_000
    headers = (("Content-Length", str(8 + claimed + len(DATA))),)
    attack = Attack("", 0, "", "", struct.pack("<Q", claimed), headers=headers)
    with Connection(server.url, timeout=3) as connection:
        connection.send(attack.request(target.name, ""))

        assert connection.answer()[0] in (413, 422)


# --- races ----------------------------------------------------------------------------------------------------------


def _race(target: PlainRun, server: ServerProcess, bodies: list[bytes], step: int) -> list[httpx.Response]:
    """Push all bodies at one step at the same moment, each on a connection of its own."""
    gate = threading.Barrier(len(bodies))

    def push(payload: bytes) -> httpx.Response:
        with server.http() as http:
            http.get("/healthz")
            gate.wait(ANSWER_SECONDS)
            return http.put(f"{target.path}/updates/{step}", content=payload)

    with ThreadPoolExecutor(len(bodies)) as threads:
        return list(threads.map(push, bodies))


@pytest.fixture
def racers(plain_run: Callable[..., PlainRun], server: ServerProcess) -> PlainRun:
    return plain_run(server, TENSORS, decay=0.5, use_num_updates=False)


def test_one_step_raced_with_the_same_bytes(racers: PlainRun, server: ServerProcess) -> None:
    """Eight pushes of the same bytes at one step: all are answered 200, exactly one of them is applied."""
    for step in range(1, 5):
        payload = save({name: tensor * step for name, tensor in TENSORS.items()})
        answers = _race(racers, server, [payload] * 8, step)

        assert [answer.status_code for answer in answers] == [200] * 8
        assert sorted(answer.json()["applied"] for answer in answers) == [False] * 7 + [True]
        assert racers.info()["version"] == f"1.{step}"


def test_one_step_raced_with_other_bytes(racers: PlainRun, server: ServerProcess) -> None:
    """Eight pushes of different bytes at one step: one is applied, and the weights are its; the others conflict."""
    for step in range(1, 5):
        before = racers.weights()
        tensors = [{name: tensor * (step + i) for name, tensor in TENSORS.items()} for i in range(8)]
        answers = _race(racers, server, [save(each) for each in tensors], step)

        won = [i for i, answer in enumerate(answers) if answer.status_code == 200]
        codes = {answer.json()["code"] for answer in answers if answer.status_code != 200}
        assert (len(won), codes) == (1, {"step_conflict"})
        for name, weights in racers.weights().items():
            expected = before[name] - 0.5 * (before[name] - tensors[won[0]][name].to(weights.dtype))
            assert torch.equal(weights, expected)


def test_reordered_steps(racers: PlainRun, server: ServerProcess) -> None:
    """Sixteen steps pushed at once, in no order: each is applied or stale, and steps only grow."""
    bodies = {step: save({name: tensor * step for name, tensor in TENSORS.items()}) for step in range(1, 17)}
    gate = threading.Barrier(len(bodies))

    def push(step: int) -> str:
        with server.http() as http:
            http.get("/healthz")
            gate.wait(ANSWER_SECONDS)
            # Who is superseded sends again, as often as others can come first.
            for _ in bodies:
                answer = http.put(f"{racers.path}/updates/{step}", content=bodies[step])
                if answer.status_code != 503:
                    break
            return str(answer.json().get("code", "applied"))

    with ThreadPoolExecutor(len(bodies)) as threads:
        results = dict(zip(bodies, threads.map(push, bodies), strict=True))

    applied = [step for step, what in results.items() if what == "applied"]
    assert set(results.values()) <= {"applied", "stale_step"}
    assert racers.info()["version"] == f"1.{len(applied)}"
    assert racers.info()["step"] == max(applied) == 16
