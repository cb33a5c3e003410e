"""Large updates over several connections: what one connection makes, or nothing; exactly once whatever breaks.

Knows a real service, and a transport that notes, breaks or refuses uploads.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_client import EmaClient, RetryPolicy
from ema_client.errors import (
    ConnectionLost,
    EmaError,
    Fenced,
    LayoutMismatch,
    NonFinite,
    Overloaded,
    StepConflict,
    Superseded,
)
from ema_client.http.body import Body
from ema_client.http.transport import Reply, Transport
from ema_client.pushing import Pushes
from ema_client.tensors.body import encode

pytestmark = pytest.mark.one_server("the stretches of one body, which gateways do not take")

LANES = 4
#: Of 48 MiB in two dtypes: no tensor ends where a stretch does.
SIZES = {"a": (1_000_003, torch.float32), "b": (8_500_001, torch.float32), "c": (6_000_005, torch.bfloat16)}


def state_of(step: int) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(step)
    return {name: torch.randn(size, generator=dice).to(dtype) for name, (size, dtype) in SIZES.items()}


class Watched(Transport):
    """A transport that notes the stretches, and lets a test meddle with each before and after it is sent."""

    def __init__(self, url: str, *, attempts: int = 1, lanes: int | None = LANES) -> None:
        super().__init__(url, retry=RetryPolicy(attempts=attempts, base=0.01), lanes=lanes)
        self.sent: list[str] = []
        self.before: Callable[[str], None] = lambda _path: None
        self.after: Callable[[str], None] = lambda _path: None

    def upload_once(self, path: str, body: Body, **more: Any) -> Reply:
        self.before(path)
        self.sent.append(path)
        reply = super().upload_once(path, body, **more)
        self.after(path)
        return reply


class Run:
    """A run of decay 0, and a sender of updates in stretches."""

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self.client = EmaClient(url)
        self.client.create_run(name, state_of(0), decay=0.0, use_num_updates=False)
        self.transport = Watched(url)

    def push(self, step: int, state: dict[str, Tensor] | None = None, headers: dict[str, str] | None = None) -> Reply:
        pushes = Pushes(self.transport, stretched_above=1 << 20)
        return pushes.push(self.name, step, encode(state or state_of(step)), headers or {}, once=False)

    def is_at(self, step: int) -> bool:
        """Whether the shadow is what was pushed at ``step``, and the updates were each counted once."""
        weights = self.client.pull(self.name)
        shadow = {name: each.float() for name, each in state_of(0).items()}
        for past in range(1, step + 1):
            for name, each in state_of(past).items():
                shadow[name] -= shadow[name] - each.float()
        same = all(torch.equal(weights[name], each) for name, each in shadow.items())
        return same and weights.info.version == f"1.{step}" and weights.info.step == (step or None)

    def close(self) -> None:
        self.client.close()
        self.transport.close()


@pytest.fixture
def run(server: Any, run_name: str) -> Iterator[Run]:
    with contextlib.closing(Run(server.url, run_name)) as made:
        yield made


def test_stretches(run: Run) -> None:
    """Each is sent once, by several lanes; the update is that of a push in one body, and known as the same."""
    assert run.push(1).data["applied"]
    assert len(run.transport.sent) == len(set(run.transport.sent)) >= LANES
    assert all("/stretches/" in path for path in run.transport.sent)
    assert run.is_at(1)
    assert not run.client.push(run.name, state_of(1), step=1).applied
    assert not run.push(1).data["applied"]
    with pytest.raises(StepConflict):
        run.push(1, state_of(7))
    assert run.is_at(1)


def test_the_bytes_are_counted_once(run: Run) -> None:
    """Progress ends with the length of the body, and nothing is told beyond."""
    seen: list[int] = []
    run.client.lanes = LANES
    state = state_of(1)
    run.client.push(run.name, state, step=1, progress=lambda sent, whole: seen.append((sent == whole) * whole or sent))
    assert max(seen) == seen[-1] >= sum(each.nbytes for each in state.values())
    assert run.is_at(1)


@pytest.mark.parametrize("lost", ["request", "answer"])
def test_a_lane_that_breaks_off(run: Run, lost: str) -> None:
    """Before or after its stretch was taken: the stretch is sent again alone, and the update applied once."""
    broken: set[str] = set()

    def break_once(path: str) -> None:
        if path not in broken and len(broken) < 2:
            broken.add(path)
            raise ConnectionLost("gone")

    if lost == "request":
        run.transport.before = break_once
    else:
        run.transport.after = break_once
    run.push(1)
    assert len(broken) == 2
    assert run.is_at(1)


def test_lanes_that_are_refused(run: Run) -> None:
    """A service that takes no more connections: the lanes that are left carry everything."""

    def refuse(_: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise Overloaded("no more", retry_after=0.01)

    run.transport.before = refuse
    run.push(1)
    assert run.is_at(1)


def test_the_whole_again(server: Any, run: Run) -> None:
    """Where the update is superseded in its middle, or all lanes break: with a group of its own, once."""
    run.transport.close()
    run.transport = Watched(server.url, attempts=3)
    faults: list[EmaError] = [Superseded("moved", retry_after=0.0), *(ConnectionLost("gone") for _ in range(2 * LANES))]
    lock = threading.Lock()

    def fail(path: str) -> None:
        with lock:
            fault = faults.pop(0) if faults and not path.endswith("/0-8388608") else None
        if fault is not None:
            raise fault

    run.transport.before = fail
    run.push(1)
    assert run.is_at(1)


def test_what_is_refused(run: Run) -> None:
    """As a push in one body is, and the shadow stays as it was."""
    state = state_of(1)
    state["b"][-5] = float("nan")
    with pytest.raises(NonFinite):
        run.push(1, state)
    writer = run.client.attach(run.name)
    run.client.attach(run.name)
    with pytest.raises(Fenced):
        run.push(1, headers={"Ema-Writer": str(writer)})
    assert run.is_at(0)


def test_another_layout(run: Run) -> None:
    """Tensors that are not the run's, of the same size, are refused, whether or not the sender has sent any before; and
    a run that was made anew with others is asked for its layout again."""
    run.push(1)
    for others in ({"x" + name: each for name, each in state_of(2).items()}, swapped(state_of(2))):
        with pytest.raises(LayoutMismatch):
            run.push(2, others)
    assert run.is_at(1)
    pushes = Pushes(run.transport, stretched_above=1 << 20)
    pushes.push(run.name, 2, encode(state_of(2)), {}, once=True)
    run.client.delete_run(run.name)
    other = {"x" + name: each for name, each in state_of(3).items()}
    run.client.create_run(run.name, other)
    with pytest.raises(LayoutMismatch):
        pushes.push(run.name, 1, encode(state_of(3)), {}, once=True)
    assert pushes.push(run.name, 1, encode(other), {}, once=True).data["applied"]


def swapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same names and of as many bytes, two of which have each other's shape."""
    return {**state, "a": state["b"], "b": state["a"]}


def test_small_updates_are_one_body(run: Run) -> None:
    """Nor is the layout asked for."""
    pushes = Pushes(run.transport)
    small = {"w": torch.ones(1000)}
    run.client.create_run(f"{run.name}-small", small)
    pushes.push(f"{run.name}-small", 1, encode(small), {}, once=True)
    assert [path.endswith("/updates/1") for path in run.transport.sent] == [True]
