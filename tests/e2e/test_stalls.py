"""A lane that stands still, its connection alive: the others bring what it had, soon; its late bytes change nothing.

Without help each of these bodies would take as long as the timeouts here, which are longer than a test may take.

Knows a real service behind a relay that stops reading. Does not know when a lane is late.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from ema_client import EmaClient, RetryPolicy
from ema_client.hosts.parts import PartName
from ema_client.http.connection import Timeouts
from ema_client.http.transport import Transport
from ema_client.pushing import Pushes
from ema_client.reading.asked import Asked
from ema_client.reading.ordered import open_ordered
from ema_client.reading.pulls import Pulls
from ema_client.reading.weights import Weights
from ema_client.tensors.body import encode
from tests.relays import Stalling
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import ServerProcess

LANES = 4
#: Of 64 MiB and a rest: eight stretches, of which no tensor ends where one does.
SIZES = {"a": 5_000_011, "b": 12_000_003}
#: Seconds of silence that a connection may have, and seconds in which a body with help is there.
SILENCE, SOON = 300.0, 60.0
#: Bytes after which a connection stands still: in the head of a request, in its body, in a later request.
AFTER = [0, 3 << 20, *(pytest.param(each << 20, marks=pytest.mark.soak) for each in (1, 7, 8, 9))]


def state_of(step: int) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(step)
    return {name: torch.randn(size, generator=dice) for name, size in SIZES.items()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess]) -> Iterator[ServerProcess]:
    """One for all tests; what its receiving of a silent stretch is given up for is not what ends these tests."""
    folder = tmp_path_factory.mktemp("stalls")
    arguments = ("--max-lanes", str(LANES), "--body-timeout", str(SILENCE))
    running = server_class(folder, arguments, folder / "data").start()
    yield running
    running.kill()


@pytest.fixture
def way(server: ServerProcess) -> Iterator[Stalling]:
    with contextlib.closing(Stalling(server.url)) as made:
        yield made


@pytest.fixture
def transport(way: Stalling) -> Iterator[Transport]:
    timeouts = Timeouts(transfer=SILENCE, kept=SILENCE, expect=SILENCE)
    retry = RetryPolicy(attempts=300, base=0.01, cap=0.2)  # for as long as a service takes to start
    with contextlib.closing(Transport(way.url, lanes=LANES, timeouts=timeouts, retry=retry)) as made:
        yield made


class Twins:
    """A run behind the relay, and one that gets the same updates over one connection."""

    def __init__(self, server: ServerProcess, name: str, transport: Transport) -> None:
        self.run, self.plain = name, f"{name}-plain"
        self.client = EmaClient(server.uds)
        self.http = server.http()
        self.pushes = Pushes(transport, stretched_above=1 << 20)
        self.pulls = Pulls(transport, split_above=1 << 20)
        for each in (self.run, self.plain):
            self.client.create_run(each, state_of(0), decay=0.75, use_num_updates=False)

    def push(self, step: int) -> float:
        """Push to both; the memory that is pushed is another's as soon as the push is over. Returns its seconds."""
        memory = state_of(step)
        began = time.monotonic()
        self.pushes.push(self.run, step, encode(memory), {}, once=False)
        seconds = time.monotonic() - began
        for tensor in memory.values():
            tensor.fill_(float("nan"))
        self.client.push(self.plain, state_of(step), step=step)
        return seconds

    def push_part(self, step: int) -> float:
        """As push(), as the only part of a rank of one."""
        memory = state_of(step)
        began = time.monotonic()
        query = {"of": 1, "group": "one start"}
        body = encode(memory, {name: (((0, size),),) for name, size in SIZES.items()})
        self.pushes.push_part(self.run, PartName(step, 0, "one start"), body, query, {}, once=False)
        seconds = time.monotonic() - began
        for tensor in memory.values():
            tensor.fill_(float("nan"))
        self.client.push(self.plain, state_of(step), step=step)
        return seconds

    def assert_alike(self) -> None:
        found, expected = self.client.pull(self.run), self.client.pull(self.plain)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert (found.info.step, found.info.num_updates) == (expected.info.step, expected.info.num_updates)
        assert found.info.version.split(".")[-1] == expected.info.version.split(".")[-1]

    def await_no_lane(self) -> None:
        def lanes() -> float:
            found = re.search(r"^ema_lanes (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
            assert found
            return float(found[1])

        wait_until(lambda: not lanes(), "the service's lanes to end")

    def close(self) -> None:
        for each in (self.run, self.plain):
            self.client.delete_run(each)
        self.client.close()
        self.http.close()


@pytest.fixture
def twins(server: ServerProcess, run_name: str, transport: Transport) -> Iterator[Twins]:
    with contextlib.closing(Twins(server, run_name, transport)) as made:
        yield made


def assert_no_lane_here() -> None:
    """No thread has the caller's memory any more."""
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ema lane")]


@pytest.mark.parametrize("kind", ["push", "push_part"])
@pytest.mark.parametrize("after", AFTER)
def test_a_push(after: int, kind: str, way: Stalling, twins: Twins) -> None:
    """Whole or a part, its lane stands still in the middle or before the service has heard of the stretch: the update
    is there soon, once; what the lane brings when it wakes up changes nothing, in this update or in the next ones."""
    push = getattr(twins, kind)
    push(1)
    way.stall(after)
    assert push(2) < SOON
    assert way.silenced == 1
    assert_no_lane_here()
    push(3)
    way.wake()
    push(4)
    twins.await_no_lane()
    twins.assert_alike()


@pytest.mark.parametrize("kind", ["push", "push_part"])
def test_an_answer(kind: str, way: Stalling, twins: Twins) -> None:
    """All of a stretch has come, the answer stands still: another lane asks for it by sending the stretch again."""
    push = getattr(twins, kind)
    push(1)
    # The answers to a few requests of one connection: "100 Continue", and what became of the stretch.
    way.stall(200, "down")
    assert push(2) < SOON
    assert way.silenced == 1
    assert_no_lane_here()
    way.wake()
    push(3)
    twins.await_no_lane()
    twins.assert_alike()


@pytest.mark.parametrize("times", [pytest.param(2, marks=pytest.mark.soak), 3])
def test_several_lanes(times: int, way: Stalling, twins: Twins) -> None:
    """While one lane moves the body goes on."""
    twins.push(1)
    way.stall(1 << 20, times=times)
    assert twins.push(2) < SOON
    way.wake()
    twins.push(3)
    twins.await_no_lane()
    twins.assert_alike()


def test_service_is_killed_meanwhile(way: Stalling, twins: Twins, server: ServerProcess) -> None:
    """The service that a lane stands still before ends, and another one begins: the update is there once."""
    twins.push(1)
    way.stall(1 << 20, times=LANES)
    pushing = threading.Thread(target=twins.push, args=(2,))
    pushing.start()
    assert way.stalled.wait(SOON)
    server.kill()
    server.start()
    way.leads(server.url)
    way.wake()
    pushing.join(SOON)
    assert not pushing.is_alive()
    twins.http.close()
    twins.http = server.http()
    twins.push(3)
    twins.assert_alike()


@pytest.mark.parametrize("after", [100 << 10, *(pytest.param(each << 20, marks=pytest.mark.soak) for each in (1, 9))])
def test_a_pull(after: int, way: Stalling, twins: Twins) -> None:
    """Into lent memory: the others bring the rest; what comes late is written nowhere."""
    twins.push(1)
    expected = twins.client.pull(twins.run)
    out = {name: torch.zeros(size) for name, size in SIZES.items()}
    twins.pulls.pull(Asked(twins.run), out)
    # The first answer has the head, and no other lane is there before it.
    first, begun = twins.pulls, time.monotonic()
    way.stall(after, "down")
    first.pull(Asked(twins.run), out)
    assert time.monotonic() - begun < SOON
    assert way.silenced == 1
    assert_no_lane_here()
    assert all(torch.equal(out[name], tensor) for name, tensor in expected.items())
    for tensor in out.values():
        tensor.zero_()
    way.wake()
    twins.await_no_lane()
    assert not any(tensor.any() for tensor in out.values())


def test_a_pull_while_updates_go_on(way: Stalling, twins: Twins) -> None:
    """Is of one version: of the first, or of a later one where the service did not keep the first for so long."""
    twins.push(1)
    versions = [twins.client.pull(twins.run)]
    twins.pulls.pull(Asked(twins.run))
    way.stall(1 << 20, "down")
    pulled: list[Weights] = []
    pulling = threading.Thread(target=lambda: pulled.append(twins.pulls.pull(Asked(twins.run))))
    pulling.start()
    assert way.stalled.wait(SOON)
    for step in range(2, 5):
        twins.client.push(twins.run, state_of(step), step=step)
        versions.append(twins.client.pull(twins.run))
    pulling.join(SOON)
    expected = {each.info.version: each for each in versions}[pulled[0].info.version]
    assert all(torch.equal(pulled[0][name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("after", [1 << 20, 4 << 20, pytest.param(9 << 20, marks=pytest.mark.soak)])
def test_a_body_in_order(
    after: int, way: Stalling, twins: Twins, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's reader has all in order, soon, though the first answer, or the lane that it waits for, stands still."""
    monkeypatch.setattr("ema_client.reading.ordered._LEAD_BYTES", 1 << 20)
    asked = Asked(twins.run)
    with open_ordered(transport, asked, 0, None) as body:
        expected = bytearray(body.length)
        body.readinto(memoryview(expected))
    way.stall(after, "down")
    began, found = time.monotonic(), bytearray(len(expected))
    with open_ordered(transport, asked, 0, None) as body:
        body.readinto(memoryview(found))
    assert time.monotonic() - began < SOON
    assert way.silenced == 1
    assert found == expected


def test_a_body_that_nobody_reads_on(
    way: Stalling, twins: Twins, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that leaves does not wait for a lane that stands still."""
    monkeypatch.setattr("ema_client.reading.ordered._LEAD_BYTES", 1 << 20)
    way.stall(2 << 20, "down", times=LANES)
    began = time.monotonic()
    with open_ordered(transport, Asked(twins.run), 0, None) as body:
        body.readinto(memoryview(bytearray(1 << 20)))
        assert way.stalled.wait(SOON)
    assert time.monotonic() - began < SOON
