"""Memory goes back with the last use of it, in a server whose garbage collector never runs.

A version's memory comes back when its last view dies. What refers to itself dies with a garbage collection, minutes
later in a server that does little, and takes gigabytes with it until then: the next push uses memory that is new.

Knows EmaClient, plain HTTP and the server's metrics. Does not know who holds what inside the server.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import httpx
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import LayoutMismatch, StaleStep, StepConflict
from ema_client.protocol import (
    DIGEST_FOLLOWS,
    HEADER_DIGEST,
    HEADER_LAYOUT,
    Durability,
    part_path,
    part_stretch_path,
    stretch_path,
)
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import ServerProcess

#: 40 MiB: enough for lanes, for threads that receive and send, and for huge pages.
STATE = {"w": torch.randn(6 << 20), "v": torch.randn(4 << 20)}
STRETCH = 16 << 20
DURABILITIES: tuple[Durability, ...] = ("memory", "process", "disk")
PROGRAM = """
import gc
import runpy

gc.disable()
gc.set_threshold(0)
runpy.run_module("ema_service", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess]) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("uncollected")
    (folder / "uncollected.py").write_text(PROGRAM)
    running = server_class(
        folder, ("--checkpoint-interval", "1"), folder / "data", program=(str(folder / "uncollected.py"),)
    ).start()
    yield running
    assert running.stop() == 0


class Held:
    """One run, and what the server's memory has in use while nobody does anything."""

    def __init__(self, server: ServerProcess, run: str, durability: Durability) -> None:
        self.server, self.run = server, run
        self.clients = {lanes: EmaClient(server.url, lanes=lanes) for lanes in (None, 1, 2, 4)}
        self.client = self.clients[None]
        self.http = server.http()
        self.client.create_run(run, STATE, decay=0.5, durability=durability)
        self.step = 0
        self.push()

    def close(self) -> None:
        self.client.delete_run(self.run)
        for client in self.clients.values():
            client.close()
        self.http.close()

    def push(self, lanes: int | None = None, state: dict[str, Tensor] = STATE) -> None:
        self.step += 1
        self.clients[lanes].push(self.run, state, step=self.step)

    @property
    def in_use(self) -> float:
        """Bytes that are lent to somebody, by two readings in a row: memory may go back in the midst of one."""
        reading = self._reading()
        while (again := self._reading()) != reading:
            reading = again
        return reading

    def _reading(self) -> float:
        lines = (line.split() for line in self.http.get("/metrics").text.splitlines() if line.startswith("ema_"))
        told = {name: float(value) for name, value in (line for line in lines if len(line) == 2)}
        return told["ema_memory_bytes"] - told["ema_idle_bytes"]


def _pull(lanes: int) -> Callable[[Held], object]:
    return lambda held: held.clients[lanes].pull(held.run)


def _push(lanes: int) -> Callable[[Held], object]:
    return lambda held: held.push(lanes)


def _shared(held: Held) -> None:
    client = EmaClient(held.server.uds)
    held.step += 1
    client.push(held.run, client.shared_state(STATE), step=held.step)
    client.pull(held.run)
    client.close()


def _ranges(held: Held) -> None:
    """Three readers of one version by stretches of their own, of whom one does not ask for all."""
    path = f"/v1/runs/{held.run}/weights"
    whole = int(held.http.head(path).headers["content-length"])
    for stops in ([whole // 2, whole], [whole], [whole // 3]):
        start, etag = 0, ""
        for stop in stops:
            headers = {"Range": f"bytes={start}-{stop - 1}", **({"If-Range": etag} if etag else {})}
            answer = held.http.get(path, headers=headers)
            assert answer.status_code == 206
            start, etag = stop, answer.headers["etag"]


def _broken_off(held: Held) -> None:
    """A reader and a sender who leave in the middle."""
    host, port = httpx.URL(held.server.url).host, httpx.URL(held.server.url).port
    run = f"/v1/runs/{held.run}"
    for request in (
        f"GET {run}/weights HTTP/1.1\r\nHost: x\r\n\r\n",
        f"PUT {run}/updates/{held.step + 1} HTTP/1.1\r\nHost: x\r\nContent-Length: 41943200\r\n\r\n12345678",
    ):
        with socket.create_connection((host, port or 80)) as connection:
            connection.sendall(request.encode())
            connection.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                connection.recv(1000)


def _stale(held: Held) -> None:
    with pytest.raises(StaleStep):
        held.client.push(held.run, STATE, step=0)


def _conflicting(held: Held) -> None:
    """The step again, with other parameters."""
    with pytest.raises(StepConflict):
        held.client.push(held.run, {**STATE, "w": STATE["v"].repeat(2)[: STATE["w"].numel()]}, step=held.step)


def _of_another_layout(held: Held) -> None:
    with pytest.raises(LayoutMismatch):
        held.client.push(held.run, {"w": STATE["w"]}, step=held.step + 1)


def _malformed(held: Held) -> None:
    answer = held.http.put(f"/v1/runs/{held.run}/updates/{held.step + 1}", content=bytes(40 << 20))
    assert answer.status_code == 422


def _digest_that_differs(held: Held) -> None:
    """A whole body whose bits were flipped on the way."""
    path, body = f"/v1/runs/{held.run}/updates/{held.step + 1}", save(STATE)
    answer = held.http.put(path, content=body + bytes(16), headers={HEADER_DIGEST: DIGEST_FOLLOWS})
    assert answer.status_code == 422


def _stretch(held: Held, start: int, group: str, stop: int | None = None, extra: bytes = b"") -> int:
    """The status of the answer to a stretch of the next step; extra: what follows the stretch, as its digest."""
    stop = min(start + STRETCH, 40 << 20) if stop is None else stop
    headers = {HEADER_LAYOUT: held.client.layout(held.run).digest, **({HEADER_DIGEST: DIGEST_FOLLOWS} if extra else {})}
    path, body = stretch_path(held.run, held.step + 1, start, stop), bytes(stop - start) + extra
    return held.http.put(path, params={"group": group}, content=body, headers=headers).status_code


def _stretches(held: Held) -> None:
    """Stretches of two groups, one in place of the other; one that differs from its digest; and those of a step that is
    given up for the next one, and told so."""
    step = held.step + 1
    assert _stretch(held, 0, f"one-{step}") == 202
    assert _stretch(held, 0, f"two-{step}") == 202
    assert _stretch(held, STRETCH, f"one-{step}") in (409, 503)
    assert _stretch(held, STRETCH, f"two-{step}", extra=bytes(16)) == 422
    held.push()
    held.push()
    held.step = step - 1
    assert _stretch(held, 2 * STRETCH, f"two-{step}") in (409, 503)
    held.step = step + 1


def _part(held: Held, part: int, group: str, tensors: dict[str, Tensor], step: int) -> int:
    """The status of the answer to one of two parts."""
    params = {"of": "2", "group": group}
    return held.http.put(part_path(held.run, step, part), params=params, content=save(tensors)).status_code


def _part_stretch(held: Held, start: int, group: str, extra: bytes = b"") -> int:
    """The status of the answer to a stretch of the first of two parts of the next step; extra: as of _stretch()."""
    first, last = start // 4, min(start + STRETCH, 24 << 20) // 4
    body = save({"w": torch.zeros(last - first)}, {"ema.slices": json.dumps({"w": [[[first, last]]]})})
    path = part_stretch_path(held.run, held.step + 1, 0, 4 * first, 4 * last)
    headers = {HEADER_DIGEST: DIGEST_FOLLOWS} if extra else {}
    params = {"of": "2", "group": group, "size": str(24 << 20)}
    return held.http.put(path, params=params, content=body + extra, headers=headers).status_code


def _stretches_of_parts(held: Held) -> None:
    """Stretches of a part in place of others; one that differs from its digest; and a part that is completed by
    another, of one body."""
    step = held.step + 1
    assert _part_stretch(held, 0, f"one-{step}") == 202
    assert _part_stretch(held, 0, f"two-{step}") == 202
    assert _part_stretch(held, STRETCH, f"two-{step}", extra=bytes(16)) == 422
    assert _part_stretch(held, STRETCH, f"two-{step}") == 202
    assert _part_stretch(held, 0, f"two-{step}") == 202
    assert _part(held, 1, f"two-{step}", {"v": STATE["v"]}, step) == 200
    held.step = step
    held.push()


def _parts(held: Held) -> None:
    """Parts that overlap, that come in place of others, of which some never come, and that make an update."""
    step, w, v = held.step + 2, {"w": STATE["w"]}, {"v": STATE["v"]}
    assert _part(held, 0, f"one-{step}", w, step - 1) == 202
    assert _part(held, 0, f"one-{step}", w, step) == 202
    assert _part(held, 1, f"one-{step}", w, step) == 422
    assert _part(held, 0, f"two-{step}", w, step) == 202
    assert _part(held, 1, f"two-{step}", v, step) == 200
    assert _part(held, 1, f"one-{step}", v, step - 1) == 409
    held.step = step
    # A set that is refused for its content is remembered, to be told to the rank whose part was there before.
    endless = {"v": torch.full_like(STATE["v"], torch.inf)}
    answers = [_part(held, part, f"four-{step}", each, step + 1) for part, each in ((0, w), (1, endless), (1, endless))]
    assert answers == [202, 422, 422]


def _snapshots(held: Held) -> None:
    held.client.snapshot(held.run, "s")
    held.client.pull(held.run, snapshot="s")
    held.push()
    held.client.rewind(held.run, "s")
    held.step = held.client.run(held.run).step or 0
    held.client.delete_snapshot(held.run, "s")


def _cast(held: Held) -> None:
    held.client.pull(held.run, dtype=torch.bfloat16)


def _changed(held: Held) -> None:
    held.client.add_average(held.run, "other", decay=0.9)
    held.push()
    held.client.pull(held.run, average="other")
    held.client.remove_average(held.run, "other")
    held.push()


def _made_anew(held: Held) -> None:
    held.client.create_run(f"{held.run}-2", STATE, decay=0.5)
    held.client.pull(f"{held.run}-2")
    held.client.delete_run(f"{held.run}-2")


TRANSFERS: dict[str, Callable[[Held], object]] = {
    **{f"pull with {lanes} lanes": _pull(lanes) for lanes in (1, 2, 4)},
    **{f"push with {lanes} lanes": _push(lanes) for lanes in (1, 2, 4)},
    "shared memory": _shared,
    "ranges": _ranges,
    "broken off": _broken_off,
    "stale": _stale,
    "conflicting": _conflicting,
    "of another layout": _of_another_layout,
    "malformed": _malformed,
    "digest that differs": _digest_that_differs,
    "stretches": _stretches,
    "stretches of parts": _stretches_of_parts,
    "parts": _parts,
    "snapshots": _snapshots,
    "narrower dtype": _cast,
    "another average": _changed,
    "a run made and deleted": _made_anew,
}


#: Each kind of transfer in one durability, by turns; in all of them in the long form.
CASES = [
    pytest.param(durability, transfer, marks=[] if number % len(DURABILITIES) == at else [pytest.mark.soak])
    for at, durability in enumerate(DURABILITIES)
    for number, transfer in enumerate(TRANSFERS)
]


@pytest.fixture(scope="module")
def held(server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[Held]:
    with contextlib.closing(Held(server, f"held-{request.param}", request.param)) as found:
        yield found


@pytest.mark.parametrize(("held", "transfer"), CASES, indirect=["held"])
def test_memory_goes_back(held: Held, transfer: str) -> None:
    """After each kind of transfer, done twice beside updates, as much memory is in use as before, or is so soon."""
    before = held.in_use
    for _ in range(2):
        TRANSFERS[transfer](held)
        held.push()

    def is_back() -> bool:
        held.push()
        return held.in_use <= before

    wait_until(is_back, "memory that is in use to be as much as before", 75)
