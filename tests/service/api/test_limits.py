"""What bounds a request: its size, its depth, its time; and the budgets for many at once.

Knows a server started with small limits. Does not know the server's code.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from safetensors.torch import save

from ema_service.api.schemas import CHANGE_BYTES, CONFIG_BYTES
from ema_service.api.transfer.filling import MIN_BYTES_PER_SECOND
from ema_service.settings import Settings
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

SILENCE = 0.5
#: A push of TENSORS takes 40,000 bytes of staging: two fit, three do not.
TENSORS = {"w": torch.zeros(10_000)}
BODY = save(TENSORS)
#: More than the sockets between the server and a reader hold.
LARGE = {"w": torch.zeros(4_000_000)}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess]) -> Iterator[ServerProcess]:
    """A server with little patience and little memory."""
    flags = ("--body-timeout", str(SILENCE), "--staging-bytes", "100000", "--frozen-bytes", "50000")
    running = server_class(tmp_path_factory.mktemp("strict"), flags).start()
    yield running
    running.stop()


@pytest.fixture
def run(strict: ServerProcess, plain_run: Callable[..., PlainRun]) -> PlainRun:
    return plain_run(strict, TENSORS)


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess]) -> Iterator[ServerProcess]:
    """A server with little patience and enough memory."""
    folder = tmp_path_factory.mktemp("patient")
    running = server_class(folder, ("--body-timeout", str(SILENCE)), folder / "data").start()
    yield running
    running.stop()


class Slow:
    """A request that sends as much as it is told, when it is told."""

    def __init__(self, server: ServerProcess, method: str, path: str, headers: dict[str, str]) -> None:
        address = urlsplit(server.url)
        self._connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=10 * SILENCE)
        self._connection.putrequest(method, path)
        for name, value in headers.items():
            self._connection.putheader(name, value)
        self._connection.endheaders()

    def __enter__(self) -> Slow:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def close(self) -> None:
        self._connection.close()

    def send(self, data: bytes) -> None:
        self._connection.send(data)

    def answered(self, seconds: float) -> bool:
        """Whether an answer comes within that time."""
        return bool(select.select([self._connection.sock], [], [], seconds)[0])

    def answer(self) -> tuple[int, dict[str, Any]]:
        status, body = self.raw_answer()
        return status, json.loads(body)

    def raw_answer(self) -> tuple[int, bytes]:
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def ended(self) -> bool:
        """Whether the server has ended the connection, after the answer."""
        return self._connection.sock is None or self._connection.sock.recv(1) == b""


def metric(run: PlainRun, name: str) -> float:
    lines = run.http.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def resident_mib(server: ServerProcess) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024  # type: ignore[union-attr]


# --- size and depth -------------------------------------------------------------------------------------------------


def test_json_too_large_is_refused_unread(strict: ServerProcess) -> None:
    """A JSON body announced beyond the limit is 413 before it is sent."""
    with Slow(strict, "POST", "/v1/runs", {**JSON, "Content-Length": str(CONFIG_BYTES + 1)}) as request:
        status, problem = request.answer()

    assert (status, problem["code"]) == (413, "body_too_large")
    assert str(CONFIG_BYTES) in problem["detail"]


def test_json_too_large_in_chunks(run: PlainRun) -> None:
    """A JSON body that grows beyond the limit without announcing it is 413, and the server lives on."""

    def endless() -> Iterator[bytes]:
        for _ in range(80):
            yield b" " * (1 << 20)

    answer: httpx.Response | None = None
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # closed before all was sent
        answer = run.http.post("/v1/runs", content=endless(), headers=JSON)
    # 408 where a busy machine takes longer to send so much than the server waits.
    assert answer is None or answer.status_code in (408, 413)
    assert run.http.get("/healthz").status_code == 200


@pytest.mark.parametrize(("method", "path"), [("PATCH", ""), ("POST", "/rewind")])
def test_each_route_has_its_own_limit(method: str, path: str, run: PlainRun) -> None:
    """A change of a run is a name and a number: a body of more than a few kilobytes is 413."""
    body = b'{"decay": 0.5}' + b" " * CHANGE_BYTES
    answer = run.http.request(method, run.path + path, content=body, headers=JSON)

    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    assert str(CHANGE_BYTES) in answer.json()["detail"]
    assert run.info()["decay"] != 0.5


@pytest.mark.parametrize("chunked", [False, True], ids=["known length", "in chunks"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        *[("GET", path) for path in ("/healthz", "/metrics", "/", "/docs", "/assets/dashboard.js", "/nowhere")],
        *[("GET", path) for path in ("/v1/runs", "{run}", "{run}/weights", "{run}/events")],
        *[("HEAD", "{run}/weights"), ("OPTIONS", "/v1/runs"), ("DELETE", "{run}"), ("PUT", "{run}/snapshots/s")],
        *[("POST", "{run}/reset-num-updates"), ("POST", "{run}/writers")],
    ],
)
def test_body_that_nobody_asked_for(
    method: str, path: str, chunked: bool, run: PlainRun, strict: ServerProcess
) -> None:
    """A body on a route that takes none is 413 before it is sent, nothing is done, and the connection ends."""
    headers = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(64 << 20)}
    with Slow(strict, method, path.format(run=run.path), headers) as request:
        status, answer = request.raw_answer()
        assert request.ended()

    assert status == 413
    assert method == "HEAD" or json.loads(answer)["code"] == "body_too_large"
    assert run.info()["num_updates"] == 0


def test_bodies_that_nobody_reads_take_no_memory(strict: ServerProcess, run: PlainRun) -> None:
    """Dozens of half-sent bodies, on routes with a body and without, are not kept: the process does not grow."""
    before = resident_mib(strict)
    senders = [
        Slow(strict, method, path, {"Content-Length": str(CONFIG_BYTES)})
        for method, path in [("GET", "/healthz"), ("PATCH", run.path), ("POST", "/v1/nowhere")] * 8
    ]
    for sender in senders:
        with contextlib.suppress(OSError):  # closed meanwhile
            sender.send(bytes(16 << 20))
    assert resident_mib(strict) - before < 32
    for sender in senders:
        sender.close()


def test_json_shares_one_budget(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """JSON bodies that are being received share one budget: beyond it 503, to come again; small ones still pass."""
    run = plain_run(server, TENSORS)
    total = Settings(data_dir=None).json_bytes
    with contextlib.ExitStack() as stack:
        for _ in range(total // CONFIG_BYTES + 1):
            headers = {**JSON, "Content-Length": str(CONFIG_BYTES)}
            request = stack.enter_context(Slow(server, "POST", "/v1/runs", headers))
            with contextlib.suppress(OSError):  # answered, and closed, before all was sent
                request.send(b" " * (CONFIG_BYTES - 1))
        status, problem = request.answer()
        assert (status, problem["code"], problem["retryable"]) == (503, "overloaded", True)
        assert run.http.patch(run.path, json={"decay": 0.5}).status_code == 200
    # The share of each body is given back with its request.
    wait_until(lambda: run.create(TENSORS, decay=0.9).json()["code"] == "run_exists")


def test_json_of_countless_members(run: PlainRun) -> None:
    """Millions of members, each of which would be an error of its own, are refused before they are parsed."""
    body = b"{" + b",".join(b'"%d":1' % number for number in range(2_000_000)) + b"}"
    answer = run.http.post("/v1/runs", content=body, headers=JSON)

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert "members" in answer.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"run": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"run": "\xff\xfe"}',
        b"\xff" * 1000,
        b'{"run": "\\ud800", "layout": []}',
        b"{} {}",
        b"NaN",
    ],
)
def test_json_that_cannot_be_read(body: bytes, run: PlainRun) -> None:
    """JSON nested without end, that is not UTF-8, or none at all, is 422 in the one shape."""
    for method, path, most in (("POST", "/v1/runs", CONFIG_BYTES), ("PATCH", run.path, CHANGE_BYTES)):
        answer = run.http.request(method, path, content=body[:most], headers=JSON)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


# --- time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [0, 5, 100, 20_000], ids=["nothing", "a piece of the length", "the header", "half"])
@pytest.mark.parametrize("chunked", [False, True], ids=["known length", "in chunks"])
def test_silent_sender_loses_its_staging(sent: int, chunked: bool, run: PlainRun, strict: ServerProcess) -> None:
    """Who falls silent in the middle of a push is answered 408 after --body-timeout, and holds no memory."""
    headers = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(len(BODY))}
    before = run.pull().content
    with Slow(strict, "PUT", f"{run.path}/updates/1", headers) as request:
        piece = BODY[:sent]
        if piece:
            request.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        status, problem = request.answer()

        assert (status, problem["code"], problem["retryable"]) == (408, "request_timeout", True)
        assert f"{SILENCE:g} seconds" in problem["detail"]
        assert metric(run, "ema_staging_bytes") == 0
    assert run.pull().content == before
    assert run.push(1, TENSORS).json()["applied"]
    assert "Traceback" not in strict.log


def test_silent_sender_spoils_no_log(run: PlainRun, strict: ServerProcess) -> None:
    """A sender that was given up and hangs up later leaves no error in the server's log."""
    for _ in range(3):
        with Slow(strict, "PUT", f"{run.path}/updates/1", {"Content-Length": str(len(BODY))}) as request:
            request.send(BODY[:100])
            assert request.answer()[0] == 408
    run.push(1, TENSORS)

    assert "Traceback" not in strict.log
    assert "never retrieved" not in strict.log


def test_slow_but_steady_sender_is_heard(run: PlainRun, strict: ServerProcess) -> None:
    """The deadline is for silence: a body that takes longer in all, but keeps coming, is taken."""
    with Slow(strict, "PUT", f"{run.path}/updates/1", {"Content-Length": str(len(BODY))}) as request:
        for at in range(0, len(BODY), 5000):
            request.send(BODY[at : at + 5000])
            time.sleep(SILENCE / 4)
        status, result = request.answer()

    assert (status, result["applied"]) == (200, True)


def test_silent_sender_of_json(strict: ServerProcess) -> None:
    """A JSON body that never comes is given up as well: 408."""
    with Slow(strict, "POST", "/v1/runs", {**JSON, "Content-Length": "100"}) as request:
        request.send(b'{"run": ')
        status, problem = request.answer()

    assert (status, problem["code"]) == (408, "request_timeout")


TRICKLE = 0.02


@pytest.mark.parametrize("chunked", [False, True], ids=["known length", "in chunks"])
def test_trickling_sender_loses_its_staging(chunked: bool, run: PlainRun, strict: ServerProcess) -> None:
    """Who is never silent but keeps below the minimum rate is answered 408 as well, and holds no memory."""
    headers = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(len(BODY))}
    began = time.monotonic()
    with Slow(strict, "PUT", f"{run.path}/updates/1", headers) as request:
        for at in range(0, len(BODY), 10):
            piece = BODY[at : at + 10]
            request.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            if request.answered(TRICKLE):
                break
        status, problem = request.answer()

        assert (status, problem["code"]) == (408, "request_timeout")
        assert f"{MIN_BYTES_PER_SECOND} a second" in problem["detail"]
        assert metric(run, "ema_staging_bytes") == 0
    assert time.monotonic() - began < 10 * SILENCE
    assert run.push(1, TENSORS).json()["applied"]


def test_head_that_never_ends(strict: ServerProcess) -> None:
    """A request line and headers that trickle in are given up after the same time: 408, and closed."""
    address = urlsplit(strict.url)
    with socket.create_connection((address.hostname, address.port), timeout=20 * SILENCE) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\n")
        answer = raw.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "request_timeout"
        assert raw.recv(1000) == b""
    with socket.create_connection((address.hostname, address.port), timeout=20 * SILENCE) as silent:
        assert silent.recv(1000) == b""  # nothing was asked: nothing is said
    with socket.create_connection((address.hostname, address.port), timeout=20 * SILENCE) as kept:
        kept.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while b"alive" not in answer:
            answer += kept.recv(1000)
        kept.sendall(b"GET /healthz")  # the next one on a kept connection
        assert kept.recv(1000).startswith(b"HTTP/1.1 408 ")


def read_to_its_end(raw: socket.socket) -> int:
    """How many bytes came before the connection ended."""
    count = 0
    while piece := raw.recv(1 << 20):
        count += len(piece)
    return count


def read_slowly(server: ServerProcess, path: str, *, buffer: int = 4096) -> socket.socket:
    """Ask for ``path`` and read nothing."""
    address = urlsplit(server.url)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    raw.settimeout(20)
    raw.connect((address.hostname, address.port))
    raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return raw


@pytest.mark.parametrize("what", ["the run", "a snapshot"])
def test_reader_that_takes_nothing_is_cut_off(
    what: str, patient: ServerProcess, plain_run: Callable[..., PlainRun]
) -> None:
    """Who asks for weights and does not read them loses the connection, and the version's memory is free again."""
    run = plain_run(patient, LARGE)
    path = f"{run.path}/weights"
    if what == "a snapshot":
        run.http.put(f"{run.path}/snapshots/s").raise_for_status()
        path = f"{run.path}/snapshots/s/weights"
    cut = metric(run, "ema_slow_readers_total")
    with read_slowly(patient, path) as raw:
        if what == "the run":
            wait_until(lambda: metric(run, "ema_frozen_bytes") > 0)
        wait_until(lambda: metric(run, "ema_slow_readers_total") == cut + 1)
        wait_until(lambda: metric(run, "ema_frozen_bytes") == 0)
        assert read_to_its_end(raw) < LARGE["w"].nbytes  # what the sockets held; the rest never comes
    assert "Traceback" not in patient.log


def test_slow_but_steady_reader_gets_all(patient: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """The deadline is for each piece: a read that takes longer in all, but goes on, is served to its end."""
    run = plain_run(patient, LARGE)
    length = int(run.http.head(f"{run.path}/weights").headers["content-length"])
    began, received = time.monotonic(), 0
    with read_slowly(patient, f"{run.path}/weights", buffer=1 << 20) as raw:
        while received < length:
            piece = raw.recv(200_000)
            assert piece, f"cut off after {received} of {length} bytes"
            received += len(piece)
            if received < length / 2:
                time.sleep(SILENCE / 40)
    assert time.monotonic() - began > SILENCE


# --- budgets --------------------------------------------------------------------------------------------------------


def test_run_that_never_fits(strict: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """A run whose pushes could never fit the budget is 413, naming the setting."""
    run = plain_run(strict)
    run.create({"w": torch.zeros(30_000)}).raise_for_status()
    answer = run.begin({"w": torch.zeros(30_000)})

    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    assert "--staging-bytes" in answer.json()["hint"]


def test_readers_of_different_runs_within_the_budget(
    strict: ServerProcess, plain_run: Callable[..., PlainRun], run_name: str
) -> None:
    """Reading one after the other never meets the readers' budget: what was read is let go of."""
    for number in range(4):
        run = plain_run(strict, TENSORS, name=f"{run_name}-{number}")
        assert run.pull().status_code == 200
    assert metric(run, "ema_frozen_bytes") == 0
