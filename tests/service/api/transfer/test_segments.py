"""Pushes handed over in shared memory: the same as other pushes, and refused where anything is wrong with the memory.

The segments are made here, with none of our client's code. Knows memfds and what a stranger could name instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from ema_client.errors import SegmentUnusable
from ema_client.protocol import Segment
from ema_service.api import create_app
from ema_service.api.transfer import segments
from ema_service.api.transfer.segments import Mappings, named, take_over
from ema_service.bodies import UpdateBody, incoming
from ema_service.memory import Staged
from ema_service.memory.budget import Budget
from ema_service.settings import Settings
from ema_service.shadows.passes import Feed, Grain, pass_over
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memfd_create on this system")

STATE = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}
PAGE = 4096
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if sys.platform == "linux" else 0


def plus(amount: float) -> dict[str, Tensor]:
    return {name: tensor + amount for name, tensor in STATE.items()}


class Offer:
    """A body in a memfd of this process, as the protocol has it; each part of it can be wrong on purpose."""

    def __init__(self, body: bytes, *, name: str = "ema-push", seals: int = SEALS, offset: int = PAGE) -> None:
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.secret = secrets.token_bytes(32)
        os.ftruncate(self.fd, offset + len(body))
        os.pwrite(self.fd, body, offset)
        os.pwrite(self.fd, self.secret, 0)
        if seals:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
        self.fields: dict[str, Any] = {"pid": os.getpid(), "fd": self.fd, "offset": offset, "length": len(body)}

    def header(self, **other: object) -> dict[str, str]:
        fields = {**self.fields, "secret": self.secret.hex(), **other}
        return {"Ema-Segment": ", ".join(f"{key}={value}" for key, value in fields.items())}


@pytest.fixture
def offer() -> Iterator[Callable[..., Offer]]:
    """Make segments; closed after the test."""
    made: list[Offer] = []

    def make(body: bytes | dict[str, Tensor], **options: Any) -> Offer:
        made.append(Offer(save(body) if isinstance(body, dict) else body, **options))
        return made[-1]

    yield make
    for one in made:
        with contextlib.suppress(OSError):
            os.close(one.fd)


def push(run: Any, step: int, headers: dict[str, str], content: bytes = b"") -> httpx.Response:
    response: httpx.Response = run.http.put(f"{run.path}/updates/{step}", headers=headers, content=content)
    return response


def metric(run: Any, line: str) -> float:
    text = run.http.get("/metrics").text
    return next((float(found.split()[-1]) for found in text.splitlines() if found.startswith(line)), 0.0)


def held_by(server: Any) -> list[str]:
    """Mappings and descriptors of segments in the server's process."""
    process = Path(f"/proc/{server.process.pid}")
    found = [line for line in (process / "maps").read_text().splitlines() if "memfd:ema-push" in line]
    for link in (process / "fd").iterdir():
        with contextlib.suppress(OSError):
            found += [str(link)] if "memfd:ema-push" in str(link.readlink()) else []
    return found


def test_header_is_on_the_api_page() -> None:
    """Each route that takes tensors names the header beside its other parameters; no other route does, those of
    stretches among them."""
    paths = create_app(Settings(data_dir=None)).openapi()["paths"]
    operations = [each for path in paths.values() for each in path.values()]
    taking = [each for each in operations if "octet-stream" in str(each.get("requestBody"))]
    taking = [each for each in taking if not each["operationId"].endswith("_stretch")]
    naming = [each for each in operations if "Ema-Segment" in [p["name"] for p in each.get("parameters", [])]]

    assert len(taking) == 4
    assert naming == taking
    for each in taking:
        found = {p["name"]: p for p in each["parameters"]}
        assert "run" in found
        assert (found["Ema-Segment"]["in"], found["Ema-Segment"]["required"]) == ("header", False)


# --- the same as other pushes ---------------------------------------------------------------------------------------


def large(seed: int) -> dict[str, Tensor]:
    """Three dtypes and several blocks of 8 MiB, one of them with the end of one dtype and the beginning of another."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"wide": (3, 700_001), "mid": (1_100_003,), "small": (5, 2_000_003), "one": ()}
    dtypes = {"wide": torch.float64, "small": torch.bfloat16}
    return {n: torch.randn(s, generator=random).to(dtypes.get(n, torch.float32)) for n, s in shapes.items()}


def test_result_is_that_of_a_body(server: Any, plain_run: Callable[..., Any], offer: Callable[..., Offer]) -> None:
    """Shared memory and a body give the same averages, bit for bit, and count as the same bytes."""
    averages = [{"name": "fast", "decay": 0.5}, {"name": "slow", "decay": 0.999}]
    sent = plain_run(server, large(0), name="segment-sent", averages=averages)
    shared = plain_run(server, large(0), name="segment-shared", averages=averages)
    first, counted = offer(large(1)), metric(shared, 'ema_pushes_total{link="shared memory"}')

    sent.push(1, large(1)).raise_for_status()
    answer = push(shared, 1, first.header())

    assert answer.json()["applied"] is True
    for name in ("fast", "slow"):
        ours, theirs = shared.weights(average=name), sent.weights(average=name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert shared.push(1, large(1)).json()["applied"] is False
    assert push(sent, 1, first.header()).json()["applied"] is False
    assert push(sent, 1, offer(large(2)).header()).json()["code"] == "step_conflict"
    assert metric(shared, 'ema_pushes_total{link="shared memory"}') == counted + 2  # what was refused is not counted
    assert shared.info()["link"] == "TCP on this host"
    assert push(shared, 2, first.header()).is_success
    assert shared.info()["link"] == "shared memory"


@pytest.mark.parametrize("pad", [0, 1, 8], ids=["reversed", "out of line", "spaced"])
def test_other_spellings_of_a_body(
    server: Any, plain_run: Callable[..., Any], offer: Callable[..., Offer], pad: int
) -> None:
    """Tensors in another order, a header of another length, data out of line: all are what they say."""
    run = plain_run(server, STATE, decay=0.5, use_num_updates=False)
    new = plus(1.0)
    names = ["w", "b"] if pad else ["b", "w"]
    table, data = {}, b""
    for name in names:
        raw = new[name].view(torch.uint8).numpy().tobytes()
        dtype = "F32" if name == "w" else "BF16"
        offsets = [len(data), len(data) + len(raw)]
        table[name] = {"dtype": dtype, "shape": list(new[name].shape), "data_offsets": offsets}
        data += raw
    head = json.dumps(table).encode()
    head += b" " * ((-len(head) % 8) + pad)

    answer = push(run, 1, offer(struct.pack("<Q", len(head)) + head + data).header())

    assert answer.is_success
    assert torch.equal(run.weights()["w"], STATE["w"] + 0.5)
    assert torch.equal(run.weights()["b"], STATE["b"].float() + 0.5)
    assert run.push(1, new).json()["applied"] is False


def test_initial_weights(server: Any, plain_run: Callable[..., Any], offer: Callable[..., Offer]) -> None:
    """The first shadow can come through shared memory as well."""
    run = plain_run(server)
    run.create(STATE).raise_for_status()

    answer = run.http.put(f"{run.path}/weights", headers=offer(STATE).header())

    assert answer.json()["status"] == "ready"
    assert torch.equal(run.weights()["w"], STATE["w"])
    assert run.begin(STATE).is_success


def test_over_a_unix_socket(server: Any, plain_run: Callable[..., Any], offer: Callable[..., Offer]) -> None:
    """A Unix socket is a connection of this host."""
    run = plain_run(server, STATE)
    way = httpx.HTTPTransport(uds=server.uds.removeprefix("unix://"))
    with httpx.Client(transport=way, base_url="http://localhost", timeout=30) as run.http:
        assert push(run, 1, offer(STATE).header()).is_success


def test_nothing_is_held_for_long(server: Any, plain_run: Callable[..., Any], offer: Callable[..., Offer]) -> None:
    """Soon after a push is answered, well or badly, the server has neither the memory nor the file any more."""
    run = plain_run(server, large(0))
    before = metric(run, "ema_staging_bytes")
    answers = [
        push(run, 1, offer(large(1)).header()),
        push(run, 1, offer(large(2)).header()),
        push(run, 2, offer({**large(2), "one": torch.tensor(float("nan"))}).header()),
        push(run, 2, offer(STATE).header()),
        push(run, 2, offer(large(1)).header(secret="0" * 64)),
    ]

    assert [a.json().get("code") for a in answers] == [
        *(None, "step_conflict", "non_finite", "layout_mismatch", "segment_unusable")
    ]
    wait_until(lambda: held_by(server) == [])
    # What tests before left staged on the shared server is not of this one.
    wait_until(lambda: metric(run, "ema_staging_bytes") <= before, "staging to be given back")


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(run: Any, headers: dict[str, str], says: str) -> None:
    before = run.info()
    answer = push(run, 1, headers)
    assert (answer.status_code, answer.json()["code"]) == (409, "segment_unusable"), answer.text
    assert says in answer.json()["detail"]
    assert answer.json()["hint"]
    after = run.info()
    assert (after["version"], after["num_updates"]) == (before["version"], before["num_updates"])


@pytest.fixture
def run(server: Any, plain_run: Callable[..., Any]) -> Any:
    return plain_run(server, STATE)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"secret": "ab" * 32}, "does not begin with the secret"),
        ({"pid": 2**31}, "cannot be opened"),
        ({"pid": 1 << 33}, "cannot be opened"),
        ({"fd": 9999}, "cannot be opened"),
        ({"length": 1000}, "is said to lie at"),
        ({"offset": 0}, "its secret"),
        ({"offset": 31}, "its secret"),
        ({"offset": 10**19 - 1}, "is said to lie at"),
        ({"pid": -1}, "is not `pid=N"),
        ({"fd": "../../1/mem"}, "is not `pid=N"),
        ({"secret": ""}, "is not `pid=N"),
        ({"more": 1}, "is not `pid=N"),
    ],
)
def test_wrong_words(run: Any, offer: Callable[..., Offer], fields: dict[str, object], says: str) -> None:
    """A request that names what is not there, or without knowing the secret, is refused; nothing is changed."""
    refused(run, offer(plus(1.0)).header(**fields), says)


def test_memory_that_could_shrink(run: Any, offer: Callable[..., Offer]) -> None:
    """An unsealed segment is refused: its owner could end the server by cutting it off."""
    refused(run, offer(plus(1.0), seals=0).header(), "not sealed")
    refused(run, offer(plus(1.0), seals=fcntl.F_SEAL_GROW).header(), "not sealed")


def test_memory_of_another_purpose(run: Any, offer: Callable[..., Offer]) -> None:
    """A memfd of another name is somebody else's business, even with the right words in it."""
    refused(run, offer(plus(1.0), name="other").header(), "is no memfd named ema-push")


def test_other_kinds_of_files(run: Any, offer: Callable[..., Offer], tmp_path: Path) -> None:
    """Devices, FIFOs, sockets, folders and files of that name are not opened, though this process has them open."""
    (tmp_path / "memfd:ema-push (deleted)").write_bytes(os.pread(offer(plus(1.0)).fd, 1 << 20, 0))
    os.mkfifo(tmp_path / "fifo")
    good = offer(plus(1.0))
    with contextlib.ExitStack() as stack:
        opened = [os.open("/dev/zero", os.O_RDONLY), os.open(tmp_path, os.O_RDONLY)]
        opened += [os.open(tmp_path / "fifo", os.O_RDWR), os.open(tmp_path / "memfd:ema-push (deleted)", os.O_RDONLY)]
        for fd in opened:
            stack.callback(os.close, fd)
        sock = stack.enter_context(socket.socket())
        for fd in (*opened, sock.fileno()):
            refused(run, good.header(fd=fd), "is no memfd" if fd != sock.fileno() else "")
    # Still usable after all that.
    assert push(run, 1, good.header()).is_success


def test_memory_of_another_process(run: Any, offer: Callable[..., Offer]) -> None:
    """Who may push, but does not know the secret, cannot have another process' segment applied."""
    program = (
        "import os, sys, fcntl\n"
        "fd = os.memfd_create('ema-push', os.MFD_ALLOW_SEALING); os.pwrite(fd, bytes(range(32)) + bytes(9000), 0)\n"
        f"fcntl.fcntl(fd, fcntl.F_ADD_SEALS, {SEALS}); print(fd, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout
        assert other.stdin
        fd = int(other.stdout.readline())
        refused(run, offer(plus(1.0)).header(pid=other.pid, fd=fd), "does not begin with the secret")
        other.stdin.close()
        assert other.wait(20) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_memory_of_another_user(run: Any, offer: Callable[..., Offer]) -> None:
    """A segment that another user made is refused, even by a server that could read it."""
    made: list[Offer] = []
    os.seteuid(65534)
    try:
        made.append(offer(plus(1.0)))
    finally:
        os.seteuid(0)

    refused(run, made[0].header(), "belongs to user 65534")


@pytest.mark.parametrize("both", [True, False], ids=["one address", "two addresses"])
def test_by_an_address_of_the_machine(
    start_server: Callable[..., Any], plain_run: Callable[..., Any], both: bool
) -> None:
    """Not loopback alone is this host: a connection with one address at both ends is, too. Any other one hands nothing
    over, whatever it knows."""
    address = _own_address()
    if address is None:
        pytest.skip("this machine has no address but loopback")
    server = start_server("--host", "0.0.0.0", "--insecure-no-auth", memory=True)
    run = plain_run(server, STATE)
    one = Offer(save(plus(1.0)))
    base = f"http://{address if both else '127.0.0.1'}:{server.url.rpartition(':')[2]}"
    way = httpx.HTTPTransport(local_address=address)
    with httpx.Client(base_url=base, timeout=30, transport=way) as far:
        answer = far.put(f"{run.path}/updates/1", headers=one.header())
        # A header does not make a connection local.
        posing = far.put(f"{run.path}/updates/1", headers={**one.header(), "X-Forwarded-For": "127.0.0.1"})
    os.close(one.fd)

    told = [(each.status_code, each.json().get("code")) for each in (answer, posing)]
    assert told == [(200, None) if both else (409, "segment_unusable")] * 2
    assert both or "loopback" in answer.json()["detail"]


def _own_address() -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; of the range for documentation
        except OSError:
            return None
        address: str = probe.getsockname()[0]
    return None if address.startswith("127.") or address == "0.0.0.0" else address


def test_server_that_does_not_say_whence() -> None:
    """Under an ASGI server that does not say how a connection came, nothing is handed over."""
    with pytest.raises(SegmentUnusable, match="loopback"):
        named(Segment(1, 2, 4096, 10, bytes(32)).to_header(), same_host=False)


@pytest.mark.parametrize("at", [2 * PAGE + 12, PAGE + 2], ids=["in line", "out of line"])
def test_a_header_alone_is_sent(
    server: Any, plain_run: Callable[..., Any], offer: Callable[..., Offer], at: int
) -> None:
    """Of tensors that lie in a longer body the segment has the data: what is in front of them is the request's body."""
    tensors = {"w": torch.randn(3 << 20, generator=torch.Generator().manual_seed(1)), "b": torch.ones(5).bfloat16()}
    zeros = {name: torch.zeros_like(each) for name, each in tensors.items()}
    run, sent = plain_run(server, zeros, decay=0.5), plain_run(server, zeros, name=f"segment-whole-{at}", decay=0.5)
    whole = save(tensors)
    head = 8 + struct.unpack("<Q", whole[:8])[0]
    answer = push(run, 1, offer(whole[head:], offset=at).header(), whole[:head])
    sent.push(1, tensors).raise_for_status()

    assert (answer.status_code, answer.json().get("applied")) == (200, True)
    assert run.info()["link"] == "shared memory"
    ours, theirs = run.weights(), sent.weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in tensors)
    assert run.push(1, tensors).json()["applied"] is False  # by the digest, which is the same


@pytest.mark.parametrize("cut", [4, -3, 1000], ids=["of the length", "of the header", "of the data as well"])
def test_another_head_than_the_header(run: Any, offer: Callable[..., Offer], cut: int) -> None:
    """Nothing but a whole header is sent with a segment, and nothing that has no end."""
    whole = save({**plus(1.0), "w": torch.ones(2, 3)})
    head = 8 + struct.unpack("<Q", whole[:8])[0]
    at = {4: 4, -3: head - 3, 1000: head + 8}[cut]
    answer = push(run, 1, offer(whole[at:]).header(), whole[:at])
    chunks = push(run, 1, offer(whole[head:]).header(), iter([whole[:head]]))  # type: ignore[arg-type]

    assert (answer.status_code, answer.json()["code"]) == (422, "malformed_body")
    assert (chunks.status_code, chunks.json()["code"]) == (422, "invalid_request")
    assert run.info()["num_updates"] == 0


def test_faults_of_the_content(run: Any, offer: Callable[..., Offer]) -> None:
    """What lies in the segment is held to what a body is held to: lengths, header, layout, finite values."""
    whole = save(plus(1.0))
    nan = {**plus(1.0), "b": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16)}
    cases = {
        b"": "malformed_body",
        whole[:5]: "malformed_body",
        whole[:20]: "malformed_body",
        whole[:-1]: "malformed_body",
        whole + b"x": "malformed_body",
        struct.pack("<Q", 2**40) + whole[8:]: "malformed_body",
        b"\xff" * 8 + whole[8:]: "malformed_body",
        save({"w": STATE["w"]}): "layout_mismatch",
        save(nan): "non_finite",
        whole + bytes(4 << 20): "body_too_large",
    }

    assert {body: push(run, 1, offer(body).header()).json()["code"] for body in cases} == cases
    assert run.info()["num_updates"] == 0


def test_tokens_come_first(start_server: Callable[..., Any], tmp_path: Path) -> None:
    """Without a token nothing is looked at."""
    token = secrets.token_urlsafe(32)
    (tmp_path / "tokens").write_text(f"{hashlib.sha256(token.encode()).hexdigest()} admin *\n")
    server = start_server("--token-file", str(tmp_path / "tokens"), memory=True)
    one = Offer(save(plus(1.0)))
    with server.http() as http:
        answer = http.put("/v1/runs/r/updates/1", headers=one.header())
    os.close(one.fd)

    assert answer.json()["code"] == "unauthorized"


# --- a client that gives up -----------------------------------------------------------------------------------------


@pytest.fixture
def helpers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture
def new_mappings() -> Iterator[Callable[..., Mappings]]:
    """Makes Mappings, and lets go of all after the test."""
    made: list[Mappings] = []

    def make(**limits: Any) -> Mappings:
        made.append(Mappings(**limits))
        return made[-1]

    yield make
    for each in made:
        each._let_go(set(), before=math.inf)


@pytest.fixture
def mappings(new_mappings: Callable[..., Mappings]) -> Mappings:
    return new_mappings()


@pytest.mark.parametrize("order", ["canonical", "other"])
def test_withdrawn_while_it_is_read(
    local_run: Callable[..., Any],
    memory: Any,
    offer: Callable[..., Offer],
    helpers: ThreadPoolExecutor,
    mappings: Mappings,
    order: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that gave a push up changes the secret, then the content; a mixture of two contents is never applied."""
    run = local_run(STATE)
    one = offer(plus(1.0))
    staged = Staged(run.run.layout, memory)
    body = UpdateBody(staged, one.fields["length"])
    if order == "other":
        # A GPU's way: the body is copied. Withdrawn while that goes on.
        monkeypatch.setattr(Staged, "adopt", lambda *_: False)
        advance = UpdateBody.advance
        monkeypatch.setattr(UpdateBody, "advance", lambda *a: (advance(*a), os.pwrite(one.fd, bytes(32), 0)))
        with pytest.raises(SegmentUnusable, match="secret"):
            take_over(Segment(secret=one.secret, **one.fields), body, helpers, mappings)
        return
    take_over(Segment(secret=one.secret, **one.fields), body, helpers, mappings)
    begun = run.run.begin(1, staged)

    os.pwrite(one.fd, bytes(32), 0)
    os.pwrite(one.fd, b"\x7f" * 8, PAGE + one.fields["length"] - 8)

    with pytest.raises(SegmentUnusable, match="secret"):
        run.run.commit(begun)
    assert run.info.version == "1.0"


def test_blocks_do_not_depend_on_threads(
    local_run: Callable[..., Any],
    memory: Any,
    offer: Callable[..., Offer],
    helpers: ThreadPoolExecutor,
    mappings: Mappings,
) -> None:
    """Divided into blocks that end anywhere among dtypes, copies and pieces, digest and averages are those of one."""
    dtypes = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

    def model(value: float) -> dict[str, Tensor]:
        return {name: torch.linspace(-value, value, 5119).to(dtype) for name, dtype in dtypes.items()}

    run = local_run(model(1.0), copied=("f32", "f16"))
    [shadow] = run.state.arenas
    for block in (2048, 8192, 1 << 20):
        grain = Grain(piece=1024, block=block)
        alone = run.staged(model(3.0))
        one = offer(model(3.0))
        divided = Staged(run.run.layout, memory)
        body = UpdateBody(divided, one.fields["length"])
        take_over(Segment(secret=one.secret, **one.fields), body, helpers, mappings)
        assert divided.shared is not None
        digests = [
            pass_over(staged, [Feed(staged.arena, shadow, 0.25)], check=True, grain=grain).finish()
            for staged in (alone, divided)
        ]

        assert digests[0] == digests[1]
        assert torch.equal(alone.arena.tensor, divided.arena.tensor)


def test_memory_is_let_go_at_release(
    local_run: Callable[..., Any],
    memory: Any,
    offer: Callable[..., Offer],
    helpers: ThreadPoolExecutor,
    new_mappings: Callable[..., Mappings],
) -> None:
    """What is released is let go, even while something still refers to the push, such as the traceback of an error."""
    mappings = new_mappings(most=0)
    run, one = local_run(STATE), offer(plus(1.0))
    staged = Staged(run.run.layout, memory)
    body = UpdateBody(staged, one.fields["length"])
    take_over(Segment(secret=one.secret, **one.fields), body, helpers, mappings)
    update_in_hand = run.run.begin(1, staged)
    assert mapped_here()
    staged.charge(Budget(100), 0)
    staged.release()

    assert not mapped_here()
    assert update_in_hand.preparation is not None


@pytest.mark.parametrize(("dtype", "in_place"), [(torch.float32, True), (torch.float64, False)])
def test_a_slice_is_mapped_alone_and_read_where_it_lies(
    local_run: Callable[..., Any],
    memory: Any,
    offer: Callable[..., Offer],
    helpers: ThreadPoolExecutor,
    mappings: Mappings,
    dtype: torch.dtype,
    in_place: bool,
) -> None:
    """Behind gigabytes that are other hosts', from any element on; what a dtype's address may not be is copied."""
    model = {"w": torch.ones(1000, dtype=dtype)}
    run, body = local_run(model), save(model)
    one = offer(body[-1000 * dtype.itemsize :], offset=(4 << 30) + 12)
    staged = Staged(run.run.layout, memory)
    whole = UpdateBody(staged, len(run.run.layout.header) + one.fields["length"])
    whole.feed(run.run.layout.header)
    take_over(Segment(secret=one.secret, **one.fields), whole, helpers, mappings)

    assert [len(mapped.memory) < 4 * PAGE for mapped in mappings._mapped.values()] == [True]
    assert (staged.adopted is not None) is in_place
    assert bytes(staged.data) == body[-1000 * dtype.itemsize :]


@pytest.mark.parametrize("order", ["canonical", "other"])
@pytest.mark.parametrize("kept", [True, False])
def test_pages_behind_the_reading_are_let_go(
    local_run: Callable[..., Any],
    memory: Any,
    offer: Callable[..., Offer],
    helpers: ThreadPoolExecutor,
    new_mappings: Callable[..., Mappings],
    kept: bool,
    order: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mapping that does not stay for the next push is never mapped as a whole; one that stays is, and is as right."""
    monkeypatch.setattr(segments, "_BEHIND_BYTES", 1 << 20)
    if order == "other":
        monkeypatch.setattr(Staged, "adopt", lambda *_: False)
        monkeypatch.setattr(incoming, "_COPIED_AT_ONCE", 1 << 20)
    model = {f"w{number}": torch.randn(1 << 18) for number in range(8)}
    mappings = new_mappings(**({} if kept else {"most": 0}))
    run, one = local_run(model), offer(model)
    alone, staged = run.staged(model), Staged(run.run.layout, memory)
    body = UpdateBody(staged, one.fields["length"])
    take_over(Segment(secret=one.secret, **one.fields), body, helpers, mappings)
    digests = [pass_over(each, [], check=True, grain=Grain(block=1 << 20)).finish() for each in (alone, staged)]

    assert digests[0] == digests[1]
    assert (resident_here() > 7 << 20) == kept


# --- what is kept between two pushes --------------------------------------------------------------------------------


def resident_here() -> int:
    """Bytes of segments' pages that are mapped in this process by now."""
    found = Path("/proc/self/smaps").read_text().split("memfd:ema-push")[1:]
    return sum(int(re.search(r"^Rss: +(\d+) kB", each, re.MULTILINE)[1]) << 10 for each in found)  # type: ignore[index]


def mapped_here() -> bool:
    return "memfd:ema-push" in Path("/proc/self/maps").read_text()


def test_pages_stay_for_the_next_push(offer: Callable[..., Offer], mappings: Mappings) -> None:
    """The same mapping, with what is there by then; a longer one where more of the memory is named."""
    one = offer(plus(1.0))
    first = mappings.map(one.fd, 0, PAGE, os.getpid())
    os.pwrite(one.fd, b"new", 0)
    again, longer = mappings.map(one.fd, 0, 10, os.getpid()), mappings.map(one.fd, 0, PAGE + 10, os.getpid())

    assert again.obj is first.obj
    assert bytes(again[:3]) == b"new"
    assert (len(again), len(longer)) == (10, PAGE + 10)
    assert longer.obj is not first.obj


def test_pages_nobody_pushes_from_are_let_go(
    offer: Callable[..., Offer], new_mappings: Callable[..., Mappings]
) -> None:
    """After a while, and with them the thread that looked after them; while they are in use they stay."""
    mappings = new_mappings(seconds=0.2, sweep_ms=20)
    one = offer(plus(1.0))
    in_use = mappings.map(one.fd, 0, PAGE, os.getpid())
    [mapped] = mappings._mapped.values()
    thread = mappings._sweeper
    assert thread
    thread.join(30)

    assert not thread.is_alive()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(mapped.owner)
    del mapped
    assert mapped_here()
    in_use.release()
    del in_use
    assert not mapped_here()
    assert mappings.map(one.fd, 0, PAGE, os.getpid())[:2] == one.secret[:2]


@pytest.mark.parametrize("limit", [{"most": 1}, {"most_bytes": PAGE + 10}])
def test_pages_that_stay_have_a_limit(
    limit: dict[str, int], offer: Callable[..., Offer], new_mappings: Callable[..., Mappings]
) -> None:
    """So many mappings, of so many bytes, stay; whoever comes then has a mapping that ends with the push."""
    mappings = new_mappings(**limit)
    one, other = offer(plus(1.0)), offer(plus(2.0))
    stays = [mappings.map(one.fd, 0, PAGE, os.getpid()).obj for _ in range(2)]
    ends = [mappings.map(other.fd, 0, PAGE, os.getpid()).obj for _ in range(2)]

    assert stays[0] is stays[1]
    assert ends[0] is not ends[1]


def test_pages_of_a_process_that_ended_are_let_go(
    offer: Callable[..., Offer], new_mappings: Callable[..., Mappings]
) -> None:
    """At once, however long others are kept: a trainer that was killed has no memory any more."""
    mappings = new_mappings(seconds=1000.0)
    one, other = offer(plus(1.0)), offer(plus(2.0))
    with subprocess.Popen(["sleep", "1000"]) as process:
        mappings.map(one.fd, 0, PAGE, process.pid)
        mappings.map(other.fd, 0, PAGE, os.getpid())
        process.kill()
    wait_until(lambda: len(mappings._mapped) == 1)

    assert [*mappings._mapped] == [(os.fstat(other.fd).st_dev, os.fstat(other.fd).st_ino, 0)]


def test_pages_of_nobody_known_are_not_kept(
    offer: Callable[..., Offer], mappings: Mappings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the end of a process cannot be seen, as on an old kernel, each push maps its own."""
    monkeypatch.delattr(os, "pidfd_open")
    one = offer(plus(1.0))

    assert mappings.map(one.fd, 0, PAGE, os.getpid()).obj is not mappings.map(one.fd, 0, PAGE, os.getpid()).obj
    assert not mapped_here()
