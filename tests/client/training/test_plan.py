"""Who of several ranks does what: ranks are threads here, and the service is a list of what was asked of it.

Knows plans. Does not know torch.distributed (tests/e2e/test_sharded.py) or the service.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from ema_client.errors import ConnectionLost, EmaError, RunExists
from ema_client.http.body import Body
from ema_client.protocol import RunConfig, TensorSpec, UpdateStatus
from ema_client.training.plan import ShardedPlan, WholePlan

T = TypeVar("T")
LAYOUT = (TensorSpec("w", (4,), "F32"),)
CONFIG = RunConfig("r", LAYOUT, decay=0.5)
SLICES = [{"w": (((0, 2),),)}, {"w": (((2, 4),),)}, {}]


class Group:
    """Ranks that tell each other values, as torch.distributed lets them. The last of three sends nothing."""

    def __init__(self, ranks: int = 3) -> None:
        self.ranks = ranks
        self._values: list[Any] = [None] * ranks
        self._barrier = threading.Barrier(ranks, timeout=20)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def plan(self, rank: int) -> ShardedPlan:
        part = rank if rank < 2 else None
        return ShardedPlan(LAYOUT, part, 2, "start", SLICES[rank], partial(self.gather, rank))

    def on_each(self, work: Callable[[int, ShardedPlan], T]) -> list[T | EmaError]:
        """What ``work`` returned or raised on each rank."""

        def caught(rank: int) -> T | EmaError:
            try:
                return work(rank, self.plan(rank))
            except EmaError as error:
                return error

        with ThreadPoolExecutor(self.ranks) as threads:
            return list(threads.map(caught, range(self.ranks)))


class Client:
    """Notes what is asked of it; a run of this name may be there already. statuses: of the initial weights, one after
    the other, and of which parts are there."""

    def __init__(self, *, exists: bool = False, statuses: Sequence[tuple[Any, tuple[int, ...]]] = ()) -> None:
        self.asked: list[Any] = []
        self._exists = exists
        self._statuses = list(statuses)

    def update_status(self, _run: str, step: int, *, first: str) -> UpdateStatus:
        assert first == "start"
        return UpdateStatus(step, *(self._statuses.pop(0) if self._statuses else ("applied", ())))

    def run(self, _run: str) -> SimpleNamespace:
        return SimpleNamespace(version=None)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def asked(*words: Any, **options: Any) -> Any:
            self.asked.append((name, words, options))
            if self._exists and name in ("create_run", "declare_run"):
                raise RunExists("run 'r' exists already", hint="")
            return SimpleNamespace(created_at=1.5) if name == "declare_run" else f"answer to {name}"

        return asked

    def named(self, name: str) -> list[Any]:
        return [options for asked, _, options in self.asked if asked == name]


def test_whole_models_are_rank_0s_alone() -> None:
    """Rank 0 does what is done once, creates and pushes; another rank does none of it, and asks nobody."""
    client: Any = Client()
    first, other = WholePlan(LAYOUT, 0, others=True), WholePlan(LAYOUT, None, others=True)
    assert (first.once(lambda: 7), other.once(lambda: 7)) == (7, None)
    assert first.together(lambda: 8) == other.together(lambda: 8) == 8
    assert first.all_have("a")
    assert other.all_have("b")
    assert other.create(client, CONFIG, dict) is None
    assert client.asked == []
    first.create(client, CONFIG, dict)
    first.push(client, "r", 3, 7, Body(0, lambda: ()))

    [created], [pushed] = client.named("create_run"), client.named("push_once")
    assert (created["decay"], created["step"]) == (0.5, 0)
    assert pushed == {"step": 7, "writer": 3}


def test_what_one_rank_raises_all_raise() -> None:
    """together() lets no rank go on where another failed, and names the rank; a result is each rank's own."""
    group = Group()
    assert group.on_each(lambda rank, plan: plan.together(lambda: rank)) == [0, 1, 2]

    def work(rank: int) -> int:
        if rank == 1:
            raise ConnectionLost("gone")
        return rank

    raised = group.on_each(lambda rank, plan: plan.together(lambda: work(rank)))
    assert all(isinstance(error, ConnectionLost) for error in raised)
    assert "on rank 1" in raised[0].__notes__  # type: ignore[union-attr]


def test_what_is_done_once_is_known_to_all() -> None:
    """The rank with part 0 does it; the others are given the result."""
    done = []

    def work(rank: int) -> str:
        done.append(rank)
        return "made"

    assert Group().on_each(lambda rank, plan: plan.once(lambda: work(rank))) == ["made"] * 3
    assert done == [0]


def test_all_ranks_or_not() -> None:
    """all_have() is true on all ranks or on none."""
    group = Group()

    assert group.on_each(lambda _, plan: plan.all_have("1.7")) == [True] * 3
    assert group.on_each(lambda rank, plan: plan.all_have(f"1.{rank}")) == [False] * 3


def test_initial_weights_in_parts() -> None:
    """One rank declares the run, each sends its slices, the rank without elements nothing; all wait for the whole."""
    client: Any = Client()
    group = Group()
    answers = group.on_each(lambda _, plan: plan.create(client, CONFIG, dict))

    assert answers == ["answer to wait_for_step"] * 3
    assert len(client.named("declare_run")) == 1
    sent = sorted(client.named("send_weights_part"), key=lambda options: options["part"])
    assert [(part["part"], part["of"], part["group"], part["slices"]) for part in sent] == [
        (0, 2, "start", SLICES[0]),
        (1, 2, "start", SLICES[1]),
    ]
    # Each rank names the run that the one rank declared.
    assert [part["created_at"] for part in sent] == [1.5, 1.5]


def test_initial_weights_that_are_lost() -> None:
    """A rank whose part a server has lost before all were there sends the part again, and no other rank its own."""
    client: Any = Client(statuses=[("staged", (0, 1)), ("staged", (0, 1)), ("staged", (0,)), ("staged", (0,))])
    plan = ShardedPlan(LAYOUT, 1, 2, "start", SLICES[1], lambda value: [value])
    plan.create(client, CONFIG, dict)
    assert [sent["part"] for sent in client.named("send_weights_part")] == [1, 1, 1]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_that_is_there(sharded: bool) -> None:
    """The refusal says how to go on with the run, on every rank that asked for it, and no weights are sent."""
    client: Any = Client(exists=True)
    if sharded:
        raised = Group().on_each(lambda _, plan: plan.create(client, CONFIG, dict))
    else:
        with pytest.raises(RunExists) as whole:
            WholePlan(LAYOUT).create(client, CONFIG, dict)
        raised = [whole.value]

    assert all(isinstance(error, RunExists) and "resume=True" in error.hint for error in raised)
    assert client.named("send_weights_part") == []


def test_updates_in_parts() -> None:
    """Each rank pushes its part with its number, the same group and writer; a rank without a part pushes nothing."""
    client: Any = Client()
    Group().on_each(lambda _, plan: plan.push(client, "r", 3, 7, Body(0, lambda: ())))

    pushed = sorted(client.named("push_part_once"), key=lambda options: options["part"])
    assert pushed == [{"step": 7, "part": part, "of": 2, "group": "start", "writer": 3} for part in (0, 1)]


def test_what_became_of_a_part() -> None:
    """A rank asks whether its own part is there still, and is done once the whole is applied."""
    _, second, _ = Group().on_each(lambda _, plan: plan)

    class Service:
        def __init__(self, state: Any, *parts: int) -> None:
            self.status = UpdateStatus(7, state, parts)

        def update_status(self, _run: str, _step: int) -> UpdateStatus:
            return self.status

    answers = [Service("applied"), Service("staged", 1), Service("staged", 0), Service("unknown")]
    assert [second.fate(answer, "r", 7) for answer in answers] == [True, False, None, None]  # type: ignore[arg-type]
