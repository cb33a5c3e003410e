"""Who of a trainer's ranks does what: of a model that each rank holds whole, and of a sharded model.

WholePlan and ShardedPlan offer one interface, so that nobody else asks which of the two a trainer has.

Knows: how updates and initial weights are sent whole and in parts, and when ranks wait for each other. Does not know:
models, what is sent, steps.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from torch import Tensor

from ema_client.client import EmaClient
from ema_client.errors import RunExists
from ema_client.http.body import Body
from ema_client.protocol import RunConfig, RunInfo, TensorSpec
from ema_client.training.ranks import Gather, agreed, gathered, own_rank, ranks_in_all, together
from ema_client.wire import Box

__all__ = ["Plan", "ShardedPlan", "WholePlan", "plan_whole"]

T = TypeVar("T")

#: Seconds that a rank which sends nothing waits for the first rank's initial weights, and its pause between questions.
_ANEW_SECONDS, _POLL_SECONDS = 10.0, 0.02
#: Seconds that a rank waits for the initial weights, once all ranks have sent theirs.
_INITIAL_SECONDS = 60.0

#: Gives this rank's tensors as the first shadow, by name; called only on a rank that sends tensors.
Initial = Callable[[], Mapping[str, Tensor]]


class Plan(Protocol):
    """What a trainer asks of a plan. All ranks call together(), once(), all_have() and create() at the same places.

    layout: of the whole model. part: the rank's number among the parts of an update, None on a rank that sends nothing.
    slices: name -> the slices of a tensor on this rank; tensors without an entry are whole. others: whether there are
    other ranks, whose sending this rank has to wait for.
    """

    @property
    def layout(self) -> tuple[TensorSpec, ...]: ...
    @property
    def part(self) -> int | None: ...
    @property
    def slices(self) -> Mapping[str, tuple[Box, ...]]: ...
    @property
    def others(self) -> bool: ...
    @property
    def in_parts(self) -> bool:
        """Whether an update is made of several ranks' parts."""

    def together(self, work: Callable[[], T]) -> T:
        """Do the work of each rank, and wait for all ranks that act together; returns the own result."""

    def once(self, work: Callable[[], T]) -> T | None:
        """Do work on a single rank; returns the result on all sending ranks, else None."""

    def all_have(self, value: object, /) -> bool:
        """Whether all ranks that act together give the same value."""

    def create(self, client: EmaClient, config: RunConfig, initial: Initial, *, step: int = 0) -> RunInfo | None:
        """Create the run and send the initial weights; returns the run, None where another rank did both.

        step: the trainer's, of the initial weights.

        Raises RunExists, and what EmaClient.create_run() raises.
        """

    def push(self, client: EmaClient, run: str, writer: int | None, step: int, body: Body) -> bool:
        """Send this rank's body of the update of ``step``, tried once; whether the update is applied."""

    def fate(self, client: EmaClient, run: str, step: int) -> bool | None:
        """Whether an update that this rank sent is applied; None where this rank's part is not there any more."""

    def give_anew(self, client: EmaClient, run: RunInfo, writer: int | None, body: Body) -> bool:
        """Send this rank's body of initial weights anew, in place of those of ``run``; as push()."""

    def fate_anew(self, client: EmaClient, run: RunInfo) -> bool | None:
        """As fate(), of initial weights given anew."""

    def await_anew(self, client: EmaClient, run: str, times: int) -> None:
        """On a rank that sends nothing of a whole model: return once initial weights were given anew so often, or the
        run went on, or after a few seconds."""


@dataclass(frozen=True, slots=True)
class WholePlan:
    """Every rank holds the whole model, as in DDP: rank 0 sends, and no rank asks another. ``part`` is 0 or None."""

    layout: tuple[TensorSpec, ...]
    part: int | None = 0
    others: bool = False

    @property
    def slices(self) -> Mapping[str, tuple[Box, ...]]:
        return {}

    @property
    def in_parts(self) -> bool:
        return False

    def together(self, work: Callable[[], T]) -> T:
        return work()

    def once(self, work: Callable[[], T]) -> T | None:
        return work() if self.part is not None else None

    def all_have(self, _value: object, /) -> bool:
        return True

    def create(self, client: EmaClient, config: RunConfig, initial: Initial, *, step: int = 0) -> RunInfo | None:
        if self.part is None:
            return None
        with _hinting_at_resume():
            return client.create_run(
                config.run,
                initial(),
                decay=config.decay,
                use_num_updates=config.use_num_updates,
                decay_per=config.decay_per,
                averages=config.averages,
                durability=config.durability,
                copied=config.copied,
                posthoc=config.posthoc,
                step=step,
            )

    def push(self, client: EmaClient, run: str, writer: int | None, step: int, body: Body) -> bool:
        client.push_once(run, body, step=step, writer=writer)
        return True

    def fate(self, _client: EmaClient, _run: str, _step: int) -> bool | None:
        return True

    def give_anew(self, client: EmaClient, run: RunInfo, writer: int | None, body: Body) -> bool:
        return client.begin_anew_once(run.run, body, writer=writer, **_place_of(run))

    def fate_anew(self, _client: EmaClient, _run: RunInfo) -> bool | None:
        return True

    def await_anew(self, client: EmaClient, run: str, times: int) -> None:
        end = time.monotonic() + _ANEW_SECONDS
        while self.part is None and time.monotonic() < end:
            epoch, updates = (client.wait_for_step(run, 0).version or "0.0").split(".")
            # A run begins in epoch 1.
            if int(updates) or int(epoch) > times:
                return
            time.sleep(_POLL_SECONDS)


@dataclass(frozen=True, slots=True)
class ShardedPlan:
    """Each rank sends its shards as a part of an update of ``of`` parts, and all ranks act together.

    group: a string of the trainer's start, the same on all ranks. gather: how ranks tell each other.
    """

    layout: tuple[TensorSpec, ...]
    part: int | None
    of: int
    group: str
    slices: Mapping[str, tuple[Box, ...]] = field(default_factory=dict)
    gather: Gather = gathered

    @property
    def others(self) -> bool:
        return True

    @property
    def in_parts(self) -> bool:
        return True

    def together(self, work: Callable[[], T]) -> T:
        return together(work, gather=self.gather)

    def once(self, work: Callable[[], T]) -> T | None:
        return agreed(lambda: work() if self.part == 0 else None, gather=self.gather)

    def all_have(self, value: object, /) -> bool:
        return len(set(self.gather(value))) == 1

    def create(self, client: EmaClient, config: RunConfig, initial: Initial, *, step: int = 0) -> RunInfo | None:
        declared = self.once(lambda: self._declare(client, config))
        created_at = declared.created_at if declared else None
        send = partial(self._send_initial, client, config.run, initial, step, created_at)
        self.together(send)
        self.together(lambda: self._await_initial(client, config.run, step, send))
        return client.wait_for_step(config.run, step)

    def push(self, client: EmaClient, run: str, writer: int | None, step: int, body: Body) -> bool:
        part, of = self.part, self.of
        return part is None or client.push_part_once(
            run, body, step=step, part=part, of=of, group=self.group, writer=writer
        )

    def fate(self, client: EmaClient, run: str, step: int) -> bool | None:
        status = client.update_status(run, step)
        if status.state == "applied":
            return True
        return False if self.part in status.parts else None

    def give_anew(self, client: EmaClient, run: RunInfo, writer: int | None, body: Body) -> bool:
        part, of = self.part, self.of
        return part is None or client.begin_anew_once(
            run.run, body, writer=writer, part=part, of=of, group=self._anew, **_place_of(run)
        )

    def fate_anew(self, client: EmaClient, run: RunInfo) -> bool | None:
        status = client.update_status(run.run, run.step or 0, first=self._anew)
        if status.state == "applied":
            return True
        return False if self.part in status.parts else None

    def await_anew(self, _client: EmaClient, _run: str, _times: int) -> None:
        pass

    @property
    def _anew(self) -> str:
        """The group of initial weights given anew: no part of the first ones is taken for one of theirs."""
        return f"{self.group}-anew"

    def _declare(self, client: EmaClient, config: RunConfig) -> RunInfo:
        with _hinting_at_resume():
            return client.declare_run(config)

    def _send_initial(self, client: EmaClient, run: str, initial: Initial, step: int, created_at: float | None) -> None:
        if self.part is not None:
            client.send_weights_part(
                run,
                initial(),
                slices=self.slices,
                part=self.part,
                of=self.of,
                group=self.group,
                step=step,
                created_at=created_at,
            )

    def _await_initial(self, client: EmaClient, run: str, step: int, send: Callable[[], None]) -> None:
        """Return once the run has its initial weights, or after a minute. A service that has lost this rank's part is
        sent the part again."""
        end = time.monotonic() + _INITIAL_SECONDS
        while self.part is not None and time.monotonic() < end:
            status = client.update_status(run, step, first=self.group)
            if status.state == "applied" or client.run(run).version is not None:
                return
            if self.part not in status.parts:
                send()
            time.sleep(_POLL_SECONDS)


def plan_whole(layout: tuple[TensorSpec, ...]) -> WholePlan:
    """The plan of a model that every rank, or the only process, holds whole."""
    others = ranks_in_all() > 1
    return WholePlan(layout, 0 if not others or own_rank() == 0 else None, others)


def _place_of(run: RunInfo) -> dict[str, Any]:
    """Which weights are replaced, in words of EmaClient.begin_anew_once()."""
    return {"replaces": run.version, "created_at": run.created_at}


@contextlib.contextmanager
def _hinting_at_resume() -> Iterator[None]:
    try:
        yield
    except RunExists as exists:
        hint = "pass resume=True (or 'auto') to go on with it, choose another name, or delete the old run first"
        raise RunExists(exists.detail, hint=hint) from None
