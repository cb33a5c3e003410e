"""A run: its life cycle, its current state, and the one place where an update is decided.

``awaiting_weights -> ready``. A state is immutable; an update computes the next one beside it, under the run's
lock, and puts it in place with a single assignment. So a reader takes ``run.state`` without a lock and has one
version, whole, for as long as it holds it, and an update that fails has changed nothing.

A run whose versions are kept on disk has a keeper: a state is written behind the averaging and committed there before
it is put in place, so whatever anyone was told of comes back.

Knows steps, counters, versions and which schedule feeds which average. Does not know HTTP, files, or how memory is
pooled.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from ema_client.errors import (
    AverageNotFound,
    AwaitingWeights,
    Fenced,
    InvalidRequest,
    RunDegraded,
    RunNotFound,
    StaleStep,
    StepConflict,
    Superseded,
    WeightsExist,
)
from ema_client.protocol import (
    MAX_STEP,
    AverageInfo,
    RunConfig,
    RunInfo,
    RunStatus,
    SnapshotInfo,
    UpdateResult,
    UpdateStatus,
    WeightsInfo,
)
from ema_service.averaging import SCHEDULES
from ema_service.memory.arena import Arena, Memory
from ema_service.memory.layout import Layout
from ema_service.memory.staging import Staged
from ema_service.runs.update import Feed, Pass
from ema_service.storage import Slot

__all__ = ["Average", "Keeper", "Run", "State", "Update"]

#: How many applied steps a run remembers for ``GET updates/{step}``.
_REMEMBERED_STEPS = 1024


@dataclass(frozen=True, slots=True)
class Average:
    """One average in one state. ``effective_decay`` is that of the latest update, None before it."""

    name: str
    decay: float
    effective_decay: float | None
    arena: Arena


@dataclass(frozen=True, slots=True)
class State:
    """An immutable state of a run. ``digest`` is that of the bytes that made it (xxh3 of the push)."""

    epoch: int
    n: int
    step: int | None
    num_updates: int
    digest: bytes
    averages: tuple[Average, ...]
    updated_at: float

    @property
    def version(self) -> str:
        return f"{self.epoch}.{self.n}"


@dataclass(frozen=True, slots=True)
class Update:
    """One update in the making. Owned by the request that pushes it; the run changes only at commit().

    base: the state it was begun on. averages: those of the state it makes; none where ``step`` was applied before.
    work: to be advanced as the parameters arrive. writer: as for
    Run.begin(). slot: where the state is written to meanwhile, if it is kept.
    """

    step: int
    base: State
    averages: tuple[Average, ...]
    work: Pass
    writer: int | None = None
    slot: Slot | None = None


class Keeper(Protocol):
    """Keeps every version of a run on disk (checkpoints.Checkpoints). Each method may raise StorageFailed."""

    def take(self) -> Slot:
        """Where a new version is written to. Touches no disk; dropping it gives it back."""

    def write(self, slot: Slot, state: State) -> None:
        """Finish the writing of the version."""

    def commit(self, slot: Slot, state: State) -> None:
        """From here on a restart brings back this state. Under the run's lock."""

    def amend(self, state: State) -> None:
        """From here on a restart brings back this state, whose weights are the current ones. Under the run's lock."""


#: Averaging as much takes 0.1 ms, waking a thread for it and then the event loop again as long.
_SMALL_BYTES = 1 << 20


class Run:
    """One training run. Methods that change it take the run's lock and may block: call them off the event loop (see
    ``quick``)."""

    def __init__(self, config: RunConfig, layout: Layout, memory: Memory, *, created_at: float) -> None:
        self.config = config
        self.layout = layout
        self.created_at = created_at
        self.state: State | None = None
        #: Another one for each life of the run, so that an ETag of an earlier life never fits.
        self.lineage = secrets.token_hex(8)
        #: The latest step that a restart would bring back; written by the registry when a checkpoint is complete.
        self.durable_step: int | None = None
        #: Called, from any thread, after each change of state, of the snapshots, and once the run is deleted.
        self.listeners: set[Callable[[], None]] = set()
        self._memory = memory
        #: Keeps every version before it is put in place; None keeps none (or now and then, see Checkpoints).
        self.keeper: Keeper | None = None
        #: Why the run takes no updates: its latest stored state was damaged. None if all is well.
        self.fault: str | None = None
        #: Why the current state could not be kept on disk, or None.
        self.unkept: str | None = None
        #: The number of the trainer that attached last; 0 before any did.
        self.writer = 0
        #: Versions of epochs up to this one may have been read, though their files are damaged.
        self.last_epoch = 0
        #: How the latest push came, in words.
        self.link: str | None = None
        #: Why a push could not come through shared memory, or None; told with the link.
        self.unshared: str | None = None
        self._retired = False
        self._steps: deque[int] = deque(maxlen=_REMEMBERED_STEPS)
        self._lock = threading.Lock()

    # --- reading ----------------------------------------------------------------------------------------------------

    def ready_state(self) -> State:
        """The current state, for reading.

        Raises AwaitingWeights before the initial weights, RunDegraded where nothing is left to read, RunNotFound once
        deleted.
        """
        if self._retired:
            raise RunNotFound(f"run {self.config.run!r} was deleted")
        if self.state is None:
            self._check_writable()
            raise AwaitingWeights(f"run {self.config.run!r} was created but its initial weights never came")
        return self.state

    @property
    def retired(self) -> bool:
        """Whether the run was deleted."""
        return self._retired

    def _check_writable(self) -> None:
        if self._retired:
            raise RunNotFound(f"run {self.config.run!r} was deleted")
        if self.fault:
            readable = f"version {self.state.version} can be read; " if self.state else ""
            raise RunDegraded(f"run {self.config.run!r}: {self.fault}", hint=f"{readable}{RunDegraded.default_hint}")

    def _writable_state(self) -> State:
        self._check_writable()
        return self.ready_state()

    def average(self, state: State, name: str | None) -> Average:
        """One average of a state, by default the first. Raises AverageNotFound."""
        names = [config.name for config in self.config.averages]
        return state.averages[0 if name is None else names.index(self.known_average(name))]

    def known_average(self, name: str) -> str:
        """``name``, if the run has that average. Raises AverageNotFound."""
        names = [config.name for config in self.config.averages]
        if name not in names:
            raise AverageNotFound(f"run {self.config.run!r} has no average {name!r}; it has {', '.join(names)}")
        return name

    def weights_info(self, state: State, average: Average) -> WeightsInfo:
        return WeightsInfo(
            run=self.config.run,
            average=average.name,
            version=state.version,
            step=state.step,
            num_updates=state.num_updates,
            decay=average.decay,
        )

    def status_of(self, step: int) -> UpdateStatus:
        """Whether ``step`` was applied, among the latest steps remembered."""
        return UpdateStatus(step, "applied" if step in tuple(self._steps) else "unknown")

    def info(self) -> RunInfo:
        state, config = self.state, self.config
        averages = self._average_infos(state)
        return RunInfo(
            run=config.run,
            status=self._status(),
            decay=averages[0].decay,
            num_updates=state.num_updates if state else self._counter_at_start,
            effective_decay=averages[0].effective_decay,
            use_num_updates=config.use_num_updates,
            decay_per=config.decay_per,
            step=state.step if state else None,
            version=state.version if state else None,
            durable_step=self.durable_step,
            durability=config.durability or "memory",
            non_finite=config.non_finite,
            averages=averages,
            tensors=len(self.layout),
            parameters=self.layout.elements,
            bytes=self.layout.shadow_bytes * len(averages),
            device=str(self._memory.device),
            shadow_dtype=self.layout.shadow_dtype,
            created_at=self.created_at,
            updated_at=state.updated_at if state else self.created_at,
            reason=self.fault or self.unkept,
            writer=self.writer,
            link=self.link,
            copied=len(self.layout.copied),
        )

    def _status(self) -> RunStatus:
        if self.fault or self.unkept:
            return "degraded"
        return "awaiting_weights" if self.state is None else "ready"

    def _average_infos(self, state: State | None) -> tuple[AverageInfo, ...]:
        if state is None:
            return tuple(
                AverageInfo(c.name, c.schedule, self.config.decay if c.decay is None else c.decay, None)
                for c in self.config.averages
            )
        return tuple(
            AverageInfo(c.name, c.schedule, a.decay, a.effective_decay)
            for c, a in zip(self.config.averages, state.averages, strict=True)
        )

    @property
    def _counter_at_start(self) -> int:
        return 0 if self.config.use_num_updates else -1

    # --- changing ---------------------------------------------------------------------------------------------------

    def initialise(self, staged: Staged, *, num_updates: int | None = None, step: int | None = None) -> None:
        """Make the pushed parameters the first shadow of every average, as LitEma's constructor clones them.

        num_updates: the counter to carry on from, for an EMA that began elsewhere. step: the trainer's step they
        are of. Doing it again with the same bytes changes nothing.
        Raises WeightsExist, NonFinite, InvalidRequest, StorageFailed.
        """
        self._check_writable()
        counter = self._initial_counter(num_updates)
        digest = Pass(staged, [Feed(staged.arena, None, 0.0)], check=self._check).finish()
        averages = tuple(Average(a.name, a.decay, None, staged.arena) for a in self._average_infos(None))
        first = State(1, 0, step, counter, digest, averages, time.time())
        slot = self._write(first) if self.state is None else None
        with self._lock:
            self._check_writable()
            if self.state is None:
                self._commit(first, slot)
            elif self.state.n or self.state.digest != digest:
                raise WeightsExist(f"run {self.config.run!r} is at version {self.state.version}")

    def attach(self, keep: Callable[[int], None]) -> int:
        """A writer's number: from here on updates of earlier writers, and of none, are refused.

        keep: makes the number outlive the server, before it counts. Raises what that raises, RunNotFound.
        """
        with self._lock:
            if self._retired:
                raise RunNotFound(f"run {self.config.run!r} was deleted")
            number = self.writer + 1
            keep(number)
            self.writer = number
            return number

    def admit(self, step: int, writer: int | None = None) -> None:
        """Refuse, before its body is read, an update that cannot be applied.

        writer: the number of the trainer that sends it, None where it did not attach.
        Raises Fenced, AwaitingWeights, RunDegraded, StaleStep.
        """
        state = self._writable_state()
        self._check_writer(writer)
        if state.step is not None and (step < state.step or (step == state.step and state.n == 0)):
            origin = "its latest update" if state.n else "its initial weights"
            raise StaleStep(f"step {step} is not after step {state.step} of {origin} (run {self.config.run!r})")

    def begin(self, step: int, staged: Staged, writer: int | None = None) -> Update:
        """An update of the current state, to be fed as its parameters arrive, then committed. Raises as admit()."""
        self.admit(step, writer)
        state = self.ready_state()
        if step == state.step:
            # It can only be the same again: what counts is its digest.
            return Update(step, state, (), Pass(staged, (), check=False), writer)
        keeper = self.keeper
        slot = keeper.take() if keeper else None
        averages, feeds = [], []
        for config, average in zip(self.config.averages, state.averages, strict=True):
            last = average is state.averages[-1]
            out = staged.arena if last else self._memory.new_arena(self.layout)
            retention = SCHEDULES[config.schedule](average.decay, state.num_updates, self._gap(state, step))
            sink = partial(slot.write, average.name) if slot else None
            feeds.append(Feed(out, average.arena, retention.weight, sink))
            averages.append(replace(average, effective_decay=retention.decay, arena=out))
        return Update(step, state, tuple(averages), Pass(staged, feeds, check=self._check), writer, slot)

    def commit(self, update: Update) -> UpdateResult:
        """Make the update's result the state, if that is still the one it was begun on.

        The same bytes at the same step again are answered and not applied. Raises as admit(), and NonFinite,
        StepConflict, StorageFailed, and Superseded where the run changed meanwhile.
        """
        digest = update.work.finish()
        self.admit(update.step, update.writer)
        following = self._following(update, digest)
        slot = self._write(following, update.slot) if update.averages else None
        with self._lock:
            return self._settle(update, following, slot)

    @property
    def quick(self) -> bool:
        """Whether commit() takes microseconds now and waits for nothing, so that the event loop may call it: a small
        run, of which no version is written to disk, and which nobody is changing."""
        small = self.layout.shadow_bytes * len(self.config.averages) <= _SMALL_BYTES
        return small and self.keeper is None and self._memory.on_host and not self._lock.locked()

    def apply(self, step: int, staged: Staged, writer: int | None = None) -> UpdateResult:
        """begin() and commit() as one, for parameters that are all there: nothing comes in between.

        Raises as commit(), but never Superseded.
        """
        with self._lock:
            update = self.begin(step, staged, writer)
            following = self._following(update, update.work.finish())
            slot = self._write(following, update.slot) if update.averages else None
            return self._settle(update, following, slot)

    def repeated(self, step: int, writer: int | None = None) -> UpdateResult:
        """The answer to the latest step again, the same bytes. Raises as admit()."""
        self.admit(step, writer)
        return self._result(self.ready_state(), step, applied=False)

    def _settle(self, update: Update, following: State, slot: Slot | None) -> UpdateResult:
        step = update.step
        self.admit(step, update.writer)
        state = self.ready_state()
        if step == state.step:
            if following.digest != state.digest:
                raise StepConflict(f"step {step} of run {self.config.run!r} was applied with other bytes")
            return self._result(state, step, applied=False)
        if state is not update.base:
            raise Superseded(f"run {self.config.run!r} changed while step {step} was received", retry_after=0.0)
        self._commit(following, slot)
        self._steps.append(step)
        return self._result(following, step, applied=True)

    def set_decay(self, decay: float, average: str | None) -> None:
        """Use ``decay`` from the next update on.

        Raises AverageNotFound, AwaitingWeights, RunDegraded, InvalidRequest, StorageFailed.
        """
        if not 0.0 <= decay <= 1.0:
            raise InvalidRequest(f"decay: {decay} is not between 0 and 1")
        with self._lock:
            state = self._writable_state()
            chosen = self.average(state, average)
            averages = tuple(replace(a, decay=decay) if a is chosen else a for a in state.averages)
            self._amend(replace(state, averages=averages))

    def reset_num_updates(self) -> None:
        """Begin the warm-up anew. With the counter off it stays off (LitEma would switch the warm-up on).

        Raises AwaitingWeights, RunDegraded, StorageFailed.
        """
        with self._lock:
            self._amend(replace(self._writable_state(), num_updates=self._counter_at_start))

    def rewind(self, averages: tuple[Average, ...], info: SnapshotInfo) -> None:
        """Go back to what a snapshot holds, in a new epoch; updates after it are as if they had never been.

        Also the way out of ``degraded``. Raises RunNotFound, StorageFailed.
        """
        before = self.state
        epoch = max(self.last_epoch, before.epoch if before else 0) + 1
        state = State(epoch, 0, info.step, info.num_updates, b"", averages, time.time())
        slot = self._write(state)
        with self._lock:
            if self._retired:
                raise RunNotFound(f"run {self.config.run!r} was deleted")
            if self.state and self.state.epoch >= epoch:
                raise Superseded(f"run {self.config.run!r} was rewound by someone else meanwhile", retry_after=0.0)
            self._commit(state, slot)
            self._forget_steps_after(info.step)
            self.fault = None

    def accept(self) -> None:
        """Go on with the version that is there although later updates are gone: the other way out of ``degraded``.

        Raises InvalidRequest where the run is well, RunDegraded where there is no version, StorageFailed.
        """
        if self.fault is None:
            raise InvalidRequest(f"run {self.config.run!r} is not degraded: name the snapshot to go back to")
        state = self.ready_state()
        # Written anew, although nothing in it is: a restart finds it before what was damaged.
        slot = self._write(state)
        with self._lock:
            if self.state is state:
                self._commit(replace(state), slot)
                self.fault = None

    def restore(self, state: State, steps: Iterable[int] = ()) -> None:
        """Take up a state from storage, made by updates of ``steps`` among others; for a run that nobody uses yet."""
        self.state = state
        self.durable_step = state.step
        self._steps.extend(steps)
        if state.n and state.step is not None:
            self._steps.append(state.step)

    def retire(self) -> None:
        """Take no update from now on: the run is deleted. Waits for the update in hand."""
        with self._lock:
            self._retired = True
            self.keeper = None  # which knows the run: the memory of both is free at once
        self.notify()

    def notify(self) -> None:
        """Tell the listeners that something of the run changed."""
        for listener in tuple(self.listeners):
            listener()

    def _following(self, update: Update, digest: bytes) -> State:
        base = update.base
        gap = self._gap(base, update.step)
        return State(
            epoch=base.epoch,
            n=base.n + 1,
            step=update.step,
            num_updates=min(base.num_updates + gap, MAX_STEP) if self.config.use_num_updates else -1,
            digest=digest,
            averages=update.averages,
            updated_at=time.time(),
        )

    def _check_writer(self, writer: int | None) -> None:
        if (writer or 0) == self.writer:
            return
        if (writer or 0) > self.writer:
            raise InvalidRequest(f"run {self.config.run!r} never gave the writer's number {writer}")
        sent = "without a writer's number" if writer is None else f"of writer {writer}"
        raise Fenced(f"an update {sent} came, and writer {self.writer} has taken over run {self.config.run!r}")

    def _forget_steps_after(self, step: int | None) -> None:
        kept = [] if step is None else [each for each in self._steps if each <= step]
        self._steps = deque(kept, maxlen=_REMEMBERED_STEPS)

    def _gap(self, state: State, step: int) -> int:
        if self.config.decay_per == "update" or state.step is None:
            return 1
        return step - state.step

    @property
    def _check(self) -> bool:
        return self.config.non_finite == "refuse"

    def _initial_counter(self, num_updates: int | None) -> int:
        if num_updates is None:
            return self._counter_at_start
        if not self.config.use_num_updates:
            raise InvalidRequest(f"num_updates: {num_updates} was given, but use_num_updates is off in this run")
        return num_updates

    def _write(self, state: State, slot: Slot | None = None) -> Slot | None:
        """Write the state to disk, or what the pass has not written yet, if versions are kept."""
        keeper = self.keeper
        if keeper is None:
            return None
        slot = slot or keeper.take()
        keeper.write(slot, state)
        return slot

    def _commit(self, state: State, slot: Slot | None) -> None:
        """Put another version in place, once it is sure to come back."""
        if self.keeper and slot:
            self.keeper.commit(slot, state)
        self._put_in_place(state)

    def _amend(self, state: State) -> None:
        """Put the current version in place with another decay or counter."""
        if self.keeper:
            self.keeper.amend(state)
        self._put_in_place(state)

    def _put_in_place(self, state: State) -> None:
        self.state = state
        self.notify()

    def _result(self, state: State, step: int, *, applied: bool) -> UpdateResult:
        return UpdateResult(
            applied=applied,
            step=step,
            num_updates=state.num_updates,
            effective_decay=state.averages[0].effective_decay,
            version=state.version,
            durable_step=self.durable_step,
        )
