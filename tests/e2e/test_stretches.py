"""Updates that come in stretches, over several connections: what whole pushes make, bit for bit, or nothing at all.

Knows the wire, and a real server. Knows nothing of our client's lanes: what it does wrong must not show here.
"""

from __future__ import annotations

import itertools
import random
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from ema_client import EmaClient
from ema_client.protocol import (
    DIGEST_FOLLOWS,
    HEADER_DIGEST,
    HEADER_LAYOUT,
    HEADER_SEGMENT,
    HEADER_WRITER,
    AverageConfig,
    Posthoc,
    RunLayout,
    stretch_path,
)
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import ServerProcess

BLOCK = 8 << 20
#: Elements of tensors: two whole blocks and a rest in all, each but the first cut by a block's end.
DTYPES = {
    "float32": {torch.float32: 4_400_000},
    "bf16": {torch.bfloat16: 8_800_001},
    "fp16": {torch.float16: 8_800_001},
    "mixed": {torch.float32: 1_500_001, torch.bfloat16: 3_500_001, torch.float16: 2_000_003},
}
GROUPS = (f"try-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess]) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("lanes")
    running = server_class(folder, ("--max-lanes", "4", "--body-timeout", "20"), folder / "data").start()
    yield running
    running.kill()


Make = Callable[..., "Sender"]


@pytest.fixture
def sender(server: ServerProcess, run_name: str) -> Iterator[Make]:
    """Make runs, each with its sender: sender(dtypes, name, **config)."""
    with ExitStack() as made:

        def make(dtypes: str = "float32", name: str = "", **config: Any) -> Sender:
            return made.enter_context(closing(Sender(server, run_name + name, dtypes, **config)))

        yield make


def tensors_of(step: int, dtypes: str = "float32") -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(step)
    return {
        f"{dtype}.{name}": torch.randn(part, generator=source).to(dtype)
        for dtype, size in DTYPES[dtypes].items()
        for name, part in (("a", size // 3), ("b", size - size // 3))
    }


def digest_of(data: bytes) -> bytes:
    blocks = (data[start : start + BLOCK] for start in range(0, len(data), BLOCK))
    return xxhash.xxh3_128(b"".join(xxhash.xxh3_128(block).digest() for block in blocks)).digest()


class Sender:
    """Sends the stretches of one run's updates, each by a request of its own."""

    def __init__(self, server: ServerProcess, run: str, dtypes: str = "float32", **config: Any) -> None:
        self.run, self.http = run, server.http()
        self.client = EmaClient(server.url)
        self.client.create_run(run, tensors_of(0, dtypes), **config)
        self.layout: RunLayout = self.client.layout(run)
        self.address = httpx.URL(server.url)
        self.headers = {HEADER_LAYOUT: self.layout.digest}

    def close(self) -> None:
        self.client.close()
        self.http.close()

    def data(self, tensors: dict[str, Tensor]) -> bytes:
        ordered = {spec.name: tensors[spec.name] for spec in self.layout.layout}
        body = save(ordered)
        return body[8 + int.from_bytes(body[:8], "little") :]

    def send(
        self,
        step: int,
        data: bytes,
        bounds: tuple[int, int],
        group: str,
        *,
        digest: bool = True,
        attempt: int = 0,
        **headers: str,
    ) -> httpx.Response:
        body = data[slice(*bounds)]
        if digest:
            headers, body = {**headers, HEADER_DIGEST: DIGEST_FOLLOWS}, body + digest_of(body)
        path = stretch_path(self.run, step, *bounds)
        # A connection of its own: one on which a body was refused unread does not last.
        with httpx.Client(base_url=self.address, timeout=60) as http:
            params = {"group": group, "attempt": attempt}
            return http.put(path, params=params, content=body, headers={**self.headers, **headers})

    def push(self, step: int, data: bytes, lanes: int = 3, group: str | None = None) -> httpx.Response:
        """The answer to the stretch that completed the step."""
        group = group or next(GROUPS)
        bounds = bounds_of(data)
        random.Random(step).shuffle(bounds)
        with ThreadPoolExecutor(lanes) as threads:
            answers = list(threads.map(lambda each: self.send(step, data, each, group), bounds))
        assert sorted(answer.status_code for answer in answers) == [200, *[202] * (len(bounds) - 1)], [
            answer.text for answer in answers
        ]
        return next(answer for answer in answers if answer.status_code == 200)

    def begin(
        self, step: int, data: bytes, bounds: tuple[int, int], group: str, share: float, attempt: int = 0
    ) -> socket.socket:
        """A connection that has sent a share of a stretch, and sends no more."""
        sock = socket.create_connection((self.address.host, self.address.port), timeout=30)
        path = stretch_path(self.run, step, *bounds)
        size = bounds[1] - bounds[0]
        sock.sendall(
            f"PUT {path}?group={group}&attempt={attempt} HTTP/1.1\r\nHost: {self.address.host}\r\n"
            f"Content-Length: {size}\r\n{HEADER_LAYOUT}: {self.layout.digest}\r\n\r\n".encode()
        )
        sock.sendall(data[bounds[0] :][: int(size * share)])
        return sock

    def metrics(self, family: str) -> dict[str, float]:
        """The values of a metric with one label or none, by the label's value."""
        found = re.findall(rf'^{family}(?:{{\w+="(.*)"}})? (\S+)$', self.http.get("/metrics").text, re.MULTILINE)
        return {label: float(value) for label, value in found}

    def ring_times(self) -> tuple[int, ...]:
        """The counters at which the run's ring has snapshots."""
        ring = self.client.run(self.run).ring
        return ring.times if ring else ()

    def pulled(self) -> list[tuple[str, str, Tensor]]:
        names = [average.name for average in self.client.run(self.run).averages]
        return [
            (average, name, tensor)
            for average in names
            for name, tensor in sorted(self.client.pull(self.run, average=average).items())
        ]


def is_superseded(connection: socket.socket) -> bool:
    """Whether the stretch on a connection was refused as one that came once more."""
    answer = b""
    while b"superseded" not in answer and (more := connection.recv(4096)):
        answer += more
    return answer.startswith(b"HTTP/1.1 503") and b"superseded" in answer


def bounds_of(data: bytes) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, len(data))) for start in range(0, len(data), BLOCK)]


def assert_same(one: Sender, other: Sender) -> None:
    """Two runs hold the same bits, in every average."""
    for (average, name, found), (_, _, expected) in zip(one.pulled(), other.pulled(), strict=True):
        assert torch.equal(found, expected), (average, name)


@pytest.mark.parametrize(
    ("dtypes", "config"),
    [
        (
            "float32",
            {
                "durability": "process",
                "averages": [AverageConfig("fast", decay=0.9), AverageConfig("slow", decay=0.99)],
            },
        ),
        pytest.param("bf16", {"durability": "disk"}, marks=pytest.mark.soak),
        ("fp16", {"durability": "memory"}),
        ("mixed", {"durability": "disk", "copied": ["torch.float32.a", "torch.bfloat16.b"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_bit_for_bit(sender: Make, dtypes: str, config: dict[str, Any]) -> None:
    """What stretches in any order make, at once and by turns, is what whole pushes make: weights, counters, distances,
    and what is kept."""
    lanes, whole = sender(dtypes, **config), sender(dtypes, "-whole", **config)
    for step in (1, 2):
        tensors = tensors_of(step, dtypes)
        answer = lanes.push(step, lanes.data(tensors), lanes=step * 2 - 1)
        expected = whole.client.push(whole.run, tensors, step=step)
        assert (answer.json()["applied"], answer.json()["num_updates"]) == (True, expected.num_updates)

    assert_same(lanes, whole)
    if config["durability"] == "memory":
        return
    for each in (lanes, whole):
        each.client.snapshot(each.run, "kept")
    found, kept = (each.client.pull(each.run, snapshot="kept") for each in (lanes, whole))
    assert all(torch.equal(found[name], kept[name]) for name in kept)


def test_broken_off(sender: Make) -> None:
    """A stretch that breaks off, stalls or is damaged on the way is sent again alone; late bytes of the first try reach
    nothing."""
    lanes, whole = sender("bf16"), sender("bf16", "-whole")
    tensors, group = tensors_of(1, "bf16"), next(GROUPS)
    data = lanes.data(tensors)
    first, second, last = bounds_of(data)
    assert lanes.send(1, data, first, group).status_code == 202

    flipped = bytearray(data)
    flipped[second[0] + 5] ^= 1
    path, body = stretch_path(lanes.run, 1, *second), bytes(flipped[slice(*second)]) + digest_of(data[slice(*second)])
    headers = {**lanes.headers, HEADER_DIGEST: DIGEST_FOLLOWS}
    damaged = lanes.http.put(path, params={"group": group}, content=body, headers=headers)
    assert (damaged.status_code, damaged.json()["code"]) == (422, "digest_mismatch")

    lanes.begin(1, data, second, group, 0.3).close()
    assert lanes.send(1, data, second, group).status_code == 202
    with lanes.begin(1, bytes(len(data)), last, group, 0.9) as stalled:
        wait_until(lambda: lanes.client.update_status(lanes.run, 1).state == "staged")
        answer = lanes.send(1, data, last, group)
        assert (answer.status_code, answer.json()["applied"]) == (200, True), answer.text
        assert is_superseded(stalled)

    whole.client.push(whole.run, tensors, step=1)
    assert_same(lanes, whole)


def test_attempts(sender: Make) -> None:
    """A later attempt takes the place of the one on its way; an earlier one, which a network held back, does not."""
    lanes, whole = sender(), sender(name="-whole")
    tensors, group = tensors_of(1), next(GROUPS)
    data = lanes.data(tensors)
    first, second, last = bounds_of(data)
    for each in (first, second):
        assert lanes.send(1, data, each, group).status_code == 202
    with lanes.begin(1, bytes(len(data)), last, group, 0.5, attempt=4) as given_up:
        wait_until(lambda: lanes.metrics("ema_lanes") == {"": 1.0})
        with lanes.begin(1, data, last, group, 0.5, attempt=5) as later:
            assert is_superseded(given_up)
            refused = lanes.send(1, bytes(len(data)), last, group, attempt=4)
            assert (refused.status_code, refused.json()["code"]) == (503, "superseded"), refused.text
            assert lanes.client.run(lanes.run).step is None
            later.sendall(data[last[0] :][int((last[1] - last[0]) * 0.5) :])
            assert later.recv(4096).startswith(b"HTTP/1.1 200")
    late = lanes.send(1, bytes(len(data)), last, group, attempt=4)
    assert (late.status_code, late.json()["code"]) == (409, "step_conflict"), late.text

    whole.client.push(whole.run, tensors, step=1)
    assert_same(lanes, whole)


def test_lost_answers(sender: Make) -> None:
    """A stretch whose answer was lost is sent again: while others are missing, and once the update was applied."""
    lanes = sender()
    data, group = lanes.data(tensors_of(1)), next(GROUPS)
    first, second, last = bounds_of(data)
    for bounds in (first, first, second):
        assert lanes.send(1, data, bounds, group).status_code == 202
    other = data[:100] + b"\0" + data[101:]
    refused = lanes.send(1, other, first, group)
    assert (refused.status_code, refused.json()["code"]) == (409, "step_conflict")
    assert lanes.send(1, data, last, group).json()["applied"] is True

    for bounds in (last, first):
        again = lanes.send(1, data, bounds, group, digest=False)
        assert (again.status_code, again.json()["applied"], again.json()["num_updates"]) == (200, False, 1)
    assert lanes.send(1, other, first, group).json()["code"] == "step_conflict"
    assert lanes.push(1, data).json()["applied"] is False
    assert lanes.client.push(lanes.run, tensors_of(1), step=1).applied is False


def test_refused(sender: Make) -> None:
    """What is wrong is said before the body; what is wrong with a set, to every stretch of it. Nothing is changed."""
    lanes = sender()
    tensors = tensors_of(1)
    data = lanes.data(tensors)
    first, second, last = bounds_of(data)

    def code(response: httpx.Response) -> str:
        return str(response.json()["code"])

    def pushed(step: int, between: Callable[[], object], data: bytes = data) -> list[str]:
        """The codes of the stretches that come after ``between``, of a group begun before: the last, and it again."""
        group = next(GROUPS)
        assert [lanes.send(step, data, each, group).status_code for each in (first, second)] == [202, 202]
        between()
        return [code(lanes.send(step, data, last, group)) for _ in range(2)]

    group = next(GROUPS)
    for bounds in (
        (0, BLOCK - 4),
        (4, BLOCK),
        (BLOCK, BLOCK),
        (BLOCK, 0),
        (0, len(data) + BLOCK),
        (last[0], BLOCK * 3),
    ):
        assert code(lanes.send(1, data, bounds, group)) == "invalid_request", bounds
    assert code(lanes.send(1, data, first, group, **{HEADER_LAYOUT: "0" * 32})) == "layout_mismatch"
    assert code(lanes.send(1, data, first, group, **{HEADER_SEGMENT: "pid=1"})) == "invalid_request"
    assert code(lanes.send(1, data[: BLOCK // 2], first, group, digest=False)) == "malformed_body"
    assert lanes.send(1, data, first, group).status_code == 202
    assert code(lanes.send(1, data, (0, BLOCK * 2), group)) == "step_conflict"

    before = lanes.pulled()
    nan = data[:-4] + b"\x00\x00\xc0\x7f"
    assert pushed(2, lambda: None, nan) == ["non_finite", "non_finite"]
    assert pushed(2, lambda: lanes.client.set_decay(lanes.run, 0.9)) == ["superseded", "superseded"]
    assert pushed(2, lambda: lanes.send(2, data, first, next(GROUPS))) == ["superseded", "superseded"]
    for (_, name, found), (_, _, expected) in zip(lanes.pulled(), before, strict=True):
        assert torch.equal(found, expected), name

    # A whole push in the middle, of the same step: with the same bytes it is the same update, with others a conflict.
    assert pushed(3, lambda: lanes.client.push(lanes.run, tensors_of(2), step=3)) == ["step_conflict", "step_conflict"]
    group = next(GROUPS)
    assert [lanes.send(4, data, each, group).status_code for each in (first, second)] == [202, 202]
    assert lanes.client.push(lanes.run, tensors, step=4).applied
    assert lanes.send(4, data, last, group).json()["applied"] is False
    assert pushed(5, lambda: lanes.client.push(lanes.run, tensors, step=6)) == ["stale_step", "stale_step"]
    assert pushed(7, lambda: lanes.http.post(f"/v1/runs/{lanes.run}/writers").raise_for_status()) == [
        "fenced",
        "fenced",
    ]
    assert lanes.send(8, data, first, next(GROUPS), **{HEADER_WRITER: "1"}).status_code == 202
    assert lanes.client.run(lanes.run).num_updates == 3


def test_layout_without_stretches(sender: Make, run_name: str) -> None:
    """float64 beside bf16 cannot be divided: the layout says so, and so does the route."""
    lanes = sender()
    assert (lanes.layout.block_bytes, lanes.layout.lanes) == (BLOCK, 4)
    run = f"{run_name}-wide"
    lanes.client.create_run(run, {"a": torch.zeros(4).double(), "b": torch.zeros(4).bfloat16()})
    layout = lanes.client.layout(run)
    assert (layout.block_bytes, layout.lanes) == (0, 1)
    answer = lanes.http.put(
        stretch_path(run, 1, 0, 40), params={"group": "g"}, content=bytes(40), headers={HEADER_LAYOUT: layout.digest}
    )
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_so_many_lanes(sender: Make) -> None:
    """Of one push at once; a further one is told to come again. What ended makes room."""
    lanes = sender()
    big = torch.zeros(6 * BLOCK // 4)
    run, lanes.run = lanes.run, f"{lanes.run}-big"
    lanes.client.create_run(lanes.run, {"w": big})
    lanes.headers[HEADER_LAYOUT] = lanes.client.layout(lanes.run).digest
    lanes.layout = lanes.client.layout(lanes.run)
    data, group = bytes(6 * BLOCK), next(GROUPS)
    with ExitStack() as open_lanes:
        for bounds in bounds_of(data)[:4]:
            open_lanes.enter_context(lanes.begin(1, data, bounds, group, 0.1))
        wait_until(lambda: lanes.send(1, data, bounds_of(data)[4], group).status_code == 503)
        refused = lanes.send(1, data, bounds_of(data)[4], group)
        assert (refused.json()["code"], "retry-after" in refused.headers) == ("overloaded", True)
        assert lanes.send(1, data, bounds_of(data)[0], group).status_code == 202, "in place of the lane before"
    assert lanes.push(1, data).json()["applied"] is True
    lanes.run = run


def test_metrics(sender: Make) -> None:
    """Lanes are told while they are there, and each stretch is counted once, by what became of it."""
    lanes = sender()
    data, group = lanes.data(tensors_of(1)), next(GROUPS)
    first, second, last = bounds_of(data)
    before = lanes.metrics("ema_stretches_total")
    with lanes.begin(1, data, first, group, 0.5):
        wait_until(lambda: lanes.metrics("ema_lanes") == {"": 1.0})
        assert lanes.metrics("ema_lanes_limit")[""] == lanes.metrics("ema_connections_limit")[""] // 4
    wait_until(lambda: lanes.metrics("ema_lanes") == {"": 0.0})
    for bounds in (first, first, second, (0, 4), last, last):
        lanes.send(1, data, bounds, group)

    found = lanes.metrics("ema_stretches_total")
    grown = {result: count - before.get(result, 0.0) for result, count in found.items()}
    assert grown == {"broken off": 1.0, "staged": 2.0, "repeated": 2.0, "refused": 1.0, "applied": 1.0}


def test_server_ends_between_stretches(sender: Make, server: ServerProcess) -> None:
    """Killed, it remembers none of them: no answer says that the update was applied, and the step is sent anew."""
    lanes = sender(durability="disk")
    data, group = lanes.data(tensors_of(1)), next(GROUPS)
    bounds = bounds_of(data)
    assert lanes.push(1, data).json()["applied"] is True
    before = lanes.pulled()
    assert [lanes.send(2, data, each, group).status_code for each in bounds[:2]] == [202, 202]
    server.kill()
    server.start()
    lanes.close()
    lanes.http, lanes.client, lanes.address = server.http(), EmaClient(server.url), httpx.URL(server.url)
    for (_, name, found), (_, _, expected) in zip(lanes.pulled(), before, strict=True):
        assert torch.equal(found, expected), name
    assert lanes.send(2, data, bounds[2], group).status_code == 202
    assert lanes.push(2, data).json()["applied"] is True
    assert lanes.client.run(lanes.run).num_updates == 2


def test_ring(sender: Make) -> None:
    """A run that keeps a ring for averages of any length is fed in lanes as it is whole: averages, snapshots of the
    ring, and what is worked out of them, beside copied tensors and an average of its own."""
    config: dict[str, Any] = {
        "posthoc": Posthoc(snapshots=4),
        "averages": [AverageConfig("ema"), AverageConfig("fast", decay=0.5)],
        "copied": ["torch.float32.a"],
    }
    lanes, whole = sender("mixed", **config), sender("mixed", "-whole", **config)
    for step in range(1, 7):
        tensors = tensors_of(step, "mixed")
        assert lanes.push(step, lanes.data(tensors), lanes=1 + step % 3).json()["num_updates"] == step
        whole.client.push(whole.run, tensors, step=step)
        # The next update waits for neither, and a ring that is still at work leaves out a time.
        for each in (lanes, whole):
            wait_until(lambda each=each, step=step: step in each.ring_times())  # type: ignore[misc]

    assert lanes.ring_times() == whole.ring_times()
    assert_same(lanes, whole)
    for wish in ({"sigma_rel": 0.1}, {"half_life": 2.0}):
        found, expected = (each.client.pull(each.run, **wish) for each in (lanes, whole))  # type: ignore[arg-type]
        assert all(torch.equal(found[name], expected[name]) for name in expected), wish
        assert found.info.profile_error == expected.info.profile_error
