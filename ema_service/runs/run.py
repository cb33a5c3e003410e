"""A run: the lock under which its ledger decides, its shadows move on, and its keeper is told.

``awaiting_weights -> ready``. A state is immutable. An update is finished beside the current state, without the lock.
Then, under the lock, every write has two halves: it is *prepared* (the ledger judges, and a Write says what is to
happen) and *resolved* (the keeper makes the write what a restart brings back, and one assignment puts the write in
place). A run that decides alone does both at once. So a reader takes ``run.state`` without a lock and has one version,
whole, for as long as the reader likes; an update that fails has changed nothing; and every version that anyone was told
of comes back after a restart.

The lock is held for microseconds, and for the keeper's row; apply() alone averages under it (see there).

Knows the order of those steps. Does not know how they are decided (ledger), computed (shadows) or kept (persistence).
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from ema_client.errors import InvalidRequest, Superseded
from ema_client.protocol import ReplicaInfo, RingInfo, RunConfig, RunInfo, ShardInfo, SnapshotInfo, UpdateResult
from ema_service.averaging import prepare_for
from ema_service.memory import Arena, Layout, Memory, Staged
from ema_service.metrics import Pulse
from ema_service.runs.changes import Changes
from ema_service.runs.info import Links, describe, pulse
from ema_service.runs.ledger import Ledger, Succession
from ema_service.runs.measurements import Measured, Measurements
from ema_service.shadows import Average, Descent, Plan, Preparation, Prepared, Setup, Shadows, State, Version

__all__ = ["Anew", "Finished", "First", "Keeper", "Parameters", "Place", "Rewound", "Run", "Update", "Write"]

#: Bytes of shadows that are averaged in 0.1 ms: waking a thread for the work, and then the event loop, takes as long.
_SMALL_BYTES = 1 << 20


def _nothing() -> None:
    """What keeps a write where nothing is kept, and what follows a write where nothing does."""


@dataclass(frozen=True, slots=True)
class Update:
    """One update in the making. Owned by the request that pushes it; the run changes only at Run.commit().

    preparation: to be advanced as the parameters arrive. writer: the number of the trainer that sends the update, None
    where that trainer did not attach. place: where the version is kept, None where not every version is. measured:
    whether the distance of shadow and parameters is taken. begun: when, by time.perf_counter().
    """

    plan: Plan
    preparation: Preparation
    writer: int | None = None
    place: Place | None = None
    measured: bool = False
    begun: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class Finished:
    """An update whose version is whole and written to its place, and that is not judged yet.

    state: that the update makes; None where only the digest of the parameters is compared. arrived: when all parameters
    were there, of an update that was received as one, by time.perf_counter().
    """

    update: Update
    prepared: Prepared
    state: State | None
    arrived: float | None = None


@dataclass(frozen=True, slots=True)
class First:
    """Initial weights that are whole and written to their place, and that are not judged yet.

    succession: by which the state was made. place: None where not every version is kept.
    """

    succession: Succession
    state: State
    place: Place | None


@dataclass(frozen=True, slots=True)
class Anew:
    """Initial weights given anew, whole, that are not judged yet. base: the version whose weights they replace. place:
    as of First; None also where the run has the same. key: of the write, None where the run decides alone."""

    base: Version
    state: State
    place: Place | None
    key: str | None


@dataclass(frozen=True, slots=True)
class Rewound:
    """A version at a snapshot that is whole, and that is not judged yet. place: as of First."""

    state: State
    place: Place | None


@dataclass(frozen=True, slots=True)
class Write:
    """A write to a run that the ledger allows, and that is not the run's yet.

    Made, kept and put under one hold of the run's lock where the run decides alone; a shard votes for the write in
    place of keep(), and calls put() after the verdict. keep: has a restart bring the write back; where that raises, the
    run is as it was. put: makes the write the run's, and never raises. state: that the write makes, None where it makes
    none. place: where the state was written, None where its bytes are kept already.
    """

    keep: Callable[[], None]
    put: Callable[[], None]
    state: State | None = None
    place: Place | None = None


@dataclass(slots=True)
class Parameters:
    """Parameters that have all arrived, and what was computed of them, in their own memory.

    After a write that failed the computed version is written again: the parameters are gone by then.

    update: begun before all had arrived where some were averaged as they came. preparation, place: of initial weights
    that were looked at as they arrived (Run.begin_first()). setup: of the run then, which the place is made for.
    """

    staged: Staged
    update: Update | None = None
    prepared: Prepared | None = None
    preparation: Preparation | None = None
    place: Place | None = None
    setup: Setup | None = None


class Place(Protocol):
    """Where one version is kept. Dropping it gives the place back. finish() and commit() may raise StorageFailed."""

    def write(self, average: str, data: memoryview, upto: int, start: int = 0) -> None:
        """An average's bytes ``start`` to ``upto`` are final; ``data`` are all its bytes, in host memory.

        start: of the stretch that is averaged from there on. A smaller ``upto`` than before: the stretch begins again.
        """

    def finish(self, state: State) -> None:
        """Write what is not written yet of the version."""

    def commit(self, state: State) -> None:
        """From here on a restart brings back this state. Under the run's lock."""


class Keeper(Protocol):
    """Keeps versions of a run (persistence.Versions, persistence.MemoryVersions).

    every: whether each version is kept before anyone is told of it. durable_step, checkpoint_step: the latest step that
    a restart would bring back, of the process and of the machine. trouble: why the current state could not be kept, or
    None. where: the place of versions, for people to read.
    """

    @property
    def every(self) -> bool: ...
    @property
    def durable_step(self) -> int | None: ...
    @property
    def checkpoint_step(self) -> int | None: ...
    @property
    def trouble(self) -> str | None: ...
    @property
    def where(self) -> str: ...

    def take(self, averages: Collection[str]) -> Place | None:
        """A place for a new version with these averages, by name; None where not each is kept. Touches no disk.

        Raises Superseded where an average was removed.
        """

    def change_averages(self, setup: Setup) -> None:
        """The run has other averages from now on; nothing is written. Under the run's lock."""

    def amend(self, state: State) -> None:
        """From here on a restart brings back this state, whose weights are the current ones. Under the run's lock.

        Raises StorageFailed.
        """

    def settle(self, state: State) -> None:
        """Bring the state to the medium, so that the machine's end leaves it. Not under the run's lock.

        Raises StorageFailed.
        """


class Run:
    """One training run.

    Methods that change the run take its lock and may block: call them off the event loop (see ``quick``).

    More than twenty methods: one for each way in which a version of the run comes about, and what readers ask.
    More than a dozen attributes: what those need, and who tells of the run.

    A shard of a run on several hosts (cluster.ShardRun) goes the same way in two halves: finish(), then under
    deciding() prepare(), and under deciding() again what the Write says. The methods that decide alone refuse there.

    ledger: for questions; what it decided takes effect by the methods here. keeper: None where nothing is kept on disk.
    changes: the listeners. links: how pushes arrive. memory: where arenas of the run are made. ring: tells of the run's
    ring, where it has one. replica: tells how far behind its original the run is, where it is a replica of another
    server's. shard: which shard of a run on several hosts the run is. measurements: told of each update that was
    applied; None where nothing is measured.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        memory: Memory,
        keeper: Keeper | None = None,
        *,
        created_at: float,
        writer: int = 0,
        setup: Setup | None = None,
        measurements: Measurements | None = None,
        shard: ShardInfo | None = None,
    ) -> None:
        """config: of the run as it was created. writer, setup: of a run that was there before, see Ledger. shard: which
        one the run is; None where the run decides alone."""
        self.layout = layout
        if memory.on_host:
            prepare_for(section.param_dtype for section in layout.sections)
        self.memory = memory
        self.created_at = created_at
        self.ledger = Ledger(config, writer=writer, setup=setup)
        self.changes = Changes()
        self.links = Links()
        self.ring: Callable[[], RingInfo] | None = None
        self.replica: Callable[[], ReplicaInfo] | None = None
        self._shadows = Shadows(layout, memory, check=config.non_finite == "refuse")
        self._keeper = keeper
        self._measurements = measurements
        self.shard = shard
        self._lock = threading.Lock()

    # --- reading ----------------------------------------------------------------------------------------------------

    @property
    def config(self) -> RunConfig:
        """The run's configuration, with the averages that it has by now."""
        return self.ledger.setup.config

    @property
    def state(self) -> State | None:
        """The current state, None before the initial weights."""
        return self._shadows.state

    def ready_state(self) -> State:
        """The current state, for reading.

        Raises AwaitingWeights before the initial weights; RunDegraded where no version is left; RunNotFound once
        deleted.
        """
        self.ledger.readable()
        state = self._shadows.state
        if state is None:
            raise RuntimeError("a version counts only after its bytes are in place")
        return state

    def info(self) -> RunInfo:
        """What is told of the run (RunInfo), as it stands."""
        told = describe(self.layout, self.ledger, self._shadows, self._keeper, self.links, self.created_at)
        more: dict[str, Any] = {"shard": self.shard} if self.shard else {}
        if self.ring:
            more["ring"] = self.ring()
        if self.replica:
            more["replica"] = self.replica()
        return replace(told, **more) if more else told

    def pulse(self) -> Pulse:
        """What metrics tell of the run, as it stands."""
        return pulse(self.layout, self.ledger, self._keeper, self._measurements, self.created_at)

    # --- an update --------------------------------------------------------------------------------------------------

    def begin(self, step: int, staged: Staged, writer: int | None = None) -> Update:
        """Begin an update of the current state: advance its preparation as parameters arrive, then commit().

        Raises as Ledger.admit(); Superseded where an average was removed at the same time.
        """
        self.ledger.admit(step, writer)
        # The state first: the averages that the run is to have are never older than a state, see change_averages().
        state = self.ready_state()
        plan = self.ledger.succession.plan(step, state.version)
        place = self._place(plan)
        sinks = {average.name: partial(place.write, average.name) for average in plan.averages} if place else {}
        measure = self._measurements is not None and self._measurements.due()
        return Update(plan, self._shadows.prepare(plan, state, staged, sinks, measure=measure), writer, place, measure)

    def commit(self, update: Update) -> UpdateResult:
        """Make an update's result the state, if the run is still at the state that the update was begun on.

        The same bytes at the same step again are answered and not applied. Raises as Ledger.judge(), and NonFinite,
        StorageFailed.
        """
        finished = self.finish(update)
        with self._lock:
            return self._applied(finished)

    def finish(self, update: Update) -> Finished:
        """The update with its version whole, and written to its place. Raises as Ledger.admit(), NonFinite,
        StorageFailed."""
        arrived = time.perf_counter()
        prepared = update.preparation.finish()
        self.ledger.admit(update.plan.step, update.writer)
        return Finished(update, prepared, self._next(update, prepared), arrived)

    @property
    def quick(self) -> bool:
        """Whether commit() takes microseconds now and waits for nothing, so that the event loop may call it.

        True for a small run of which not every version is written to disk, while nobody changes the run.
        """
        small = self.layout.shadow_bytes * len(self.config.averages) <= _SMALL_BYTES
        kept = self._keeper is not None and self._keeper.every
        return small and not kept and self._shadows.on_host and not self._lock.locked()

    def apply(self, step: int, parameters: Parameters, writer: int | None = None) -> UpdateResult:
        """begin() and commit() as one, for parameters that have all arrived, in parts. Again after StorageFailed.

        All under the lock: averaging overwrites the parameters, and several senders would have to send their parts
        again because the run changed in between. Raises as commit(); Superseded only where the run changed since the
        update was begun with parameters that were averaged as they came, or since a call that raised StorageFailed.
        """
        with self._lock:
            if parameters.prepared is None:
                update = parameters.update or self.begin(step, parameters.staged, writer)
                update = parameters.update = replace(update, begun=time.perf_counter())
                prepared = parameters.prepared = update.preparation.finish()
            elif parameters.update is None:
                raise RuntimeError("what was averaged was averaged for an update")
            else:
                update, prepared = parameters.update, parameters.prepared
                update = replace(update, place=self._place(update.plan))
            return self._applied(Finished(update, prepared, self._next(update, prepared)))

    def repeated(self, step: int, writer: int | None = None) -> UpdateResult:
        """The answer to the latest step sent again with the same bytes. Raises as Ledger.admit()."""
        self.ledger.admit(step, writer)
        return self.result(step, applied=False)

    def _place(self, plan: Plan) -> Place | None:
        """Where the version that an update makes is kept; None where it is not, or no version comes of the update."""
        keeper = self._keeper  # read once: None once the run is deleted
        if keeper is None or not plan.retentions:
            return None
        return keeper.take([average.name for average in plan.averages])

    def _next(self, update: Update, prepared: Prepared) -> State | None:
        """The state that an update makes, written to its slot; None where only the digest of the update is compared."""
        if not update.plan.retentions:
            return None
        version = self.ledger.succession.following(update.plan, prepared.digest, time.time())
        state = State(version, prepared.arenas)
        if update.place:
            update.place.finish(state)
        return state

    @contextlib.contextmanager
    def deciding(self) -> Iterator[None]:
        """Within the block nobody else prepares a write, or puts one in place. For microseconds, and for rows."""
        with self._lock:
            yield

    def prepare(self, finished: Finished) -> Write | None:
        """The line that decides whether an update counts: the write that it is; None where it was applied before.

        Under deciding(). Raises as Ledger.judge().
        """
        update, state = finished.update, finished.state
        applied = self.ledger.judge(update.plan, finished.prepared.digest, update.writer)
        if not applied or state is None:
            return None
        return self.moving_to(state, update.place, partial(self._measure, finished, state))

    def result(self, step: int, *, applied: bool) -> UpdateResult:
        """The answer to an update of the run's latest step. applied: whether it was applied now. Raises as
        ready_state()."""
        return _result(self.ready_state().version, step, self._keeper, applied=applied)

    def _applied(self, finished: Finished) -> UpdateResult:
        """Prepare and resolve an update. Under the lock."""
        applied = self._settle(self.prepare(finished))
        return self.result(finished.update.plan.step, applied=applied)

    # --- other ways to another version ------------------------------------------------------------------------------

    def begin_first(self, staged: Staged) -> Parameters:
        """Begin with initial weights: advance the preparation as parameters arrive, then initialise().

        Raises RunDegraded, RunNotFound, Superseded.
        """
        self.ledger.check_writable()
        setup = self.ledger.setup
        names = [member.name for member in setup.members]
        keeper = self._keeper  # read once: None once the run is deleted
        place = keeper.take(names) if keeper and self.state is None else None

        def sink(data: memoryview, upto: int, start: int) -> None:
            for name in names:
                place.write(name, data, upto, start)  # type: ignore[union-attr]  # without a place there is no name

        cast = self._shadows.cast(staged, sink if place else None)
        return Parameters(staged, preparation=cast, place=place, setup=setup)

    def initialise(self, parameters: Parameters, *, num_updates: int | None = None, step: int | None = None) -> None:
        """Make the pushed parameters the first shadow of every average, as LitEma's constructor clones them.

        num_updates: the counter of an EMA that began elsewhere. step: the trainer's step of the parameters. The same
        bytes again change nothing. Raises WeightsExist, NonFinite, InvalidRequest, RunDegraded; StorageFailed, after
        which the same ``parameters`` may be given again; Superseded where an average was added or removed meanwhile.
        """
        first = self.finish_first(parameters, secrets.token_hex(8), num_updates=num_updates, step=step)
        with self._lock:
            self._settle(self.prepare_first(first))

    def finish_first(
        self, parameters: Parameters, lineage: str, *, num_updates: int | None = None, step: int | None = None
    ) -> First:
        """The first version of the pushed parameters, whole, and written to its place. lineage: of the run.

        Others as for initialise(). Raises NonFinite, InvalidRequest, RunDegraded, StorageFailed, Superseded.
        """
        self.ledger.check_writable()
        succession = self.ledger.succession
        first = partial(succession.first, lineage, num_updates=num_updates, step=step)
        first(b"", 0.0)  # a wrong counter is refused before anything is computed
        prepared = self._first(parameters)
        state = _begun(first(prepared.digest, time.time()), prepared)
        place, parameters.place = parameters.place, None
        if self.state is None:
            place = self._write(state, place if parameters.setup is succession.setup else None)
        return First(succession, state, place)

    def prepare_first(self, first: First) -> Write | None:
        """Whether initial weights count: the write that they are; None where the same were given before.

        Under deciding(). Raises as Ledger.judge_first(); Superseded.
        """
        if not self.ledger.judge_first(first.state.version.digest):
            return None
        if self.ledger.succession is not first.succession:
            raise Superseded(f"the averages of run {self.config.run!r} changed meanwhile", retry_after=0.0)
        return self.moving_to(first.state, first.place)

    def initialise_anew(self, parameters: Parameters, replaces: str, writer: int | None = None) -> None:
        """Make the pushed parameters the first shadow in place of those that initial weights made before.

        replaces: the version that the sender means. writer: as for begin(). The run's own bytes again change nothing.
        When this returns, the weights outlive the machine, whatever the run's durability: the version before, in a new
        epoch, would have the name of this one. Raises as Ledger.judge_anew(), and NonFinite; StorageFailed as
        initialise().
        """
        anew = self.finish_anew(parameters, secrets.token_hex(8), writer)
        with self._lock:
            self._settle(self.prepare_anew(anew, replaces, writer))
            state = self.ready_state()
        # Also of a try that comes again: the one before may have failed here.
        keeper = self._keeper  # read once: None once the run is deleted
        if keeper and state.version.epoch > 1:
            keeper.settle(state)

    def finish_anew(
        self, parameters: Parameters, lineage: str, writer: int | None = None, key: str | None = None
    ) -> Anew:
        """The version that initial weights given anew make, whole, and written to its place where it is another one.

        key: of the write, on a shard; the others as for initialise_anew() and finish_first(). Raises as those.
        """
        base = self.ledger.admit_anew(writer)
        prepared = self._first(parameters)
        version = self.ledger.anew(base, lineage, prepared.digest, time.time())
        state = _begun(version.keyed(key), prepared)
        return Anew(base, state, None if self._has(base, prepared, key) else self._write(state), key)

    def prepare_anew(self, anew: Anew, replaces: str, writer: int | None = None) -> Write | None:
        """The write that initial weights given anew are; None where the run has them.

        Under deciding(). Raises as Ledger.judge_anew().
        """
        version = self.ledger.version
        if version and version.made_by(anew.key):
            return None
        digest = None if self.shard else anew.state.version.digest
        if not self.ledger.judge_anew(anew.base, replaces, digest, writer):
            return None
        return self.moving_to(anew.state, anew.place)

    def _has(self, base: Version, prepared: Prepared, key: str | None) -> bool:
        """Whether the run has initial weights that are given anew, as far as is known before they are judged."""
        return base.made_by(key) or (self.shard is None and prepared.digest == base.digest)

    def amend(self, change: Callable[[Succession, Version], Version], key: str | None = None) -> bool:
        """Go on with another decay or counter from the next update on; the weights stay.

        change: gives the version to go on with. key: of the write, which is applied once. Returns whether the write was
        applied now. Raises what ``change`` raises, AwaitingWeights, RunDegraded, RunNotFound, StorageFailed.
        """
        with self._lock:
            return self._settle(self.prepare_amended(change, key))

    def prepare_amended(self, change: Callable[[Succession, Version], Version], key: str | None) -> Write | None:
        """The write that another decay or counter is; None where the write of this key was applied before.

        Under deciding(). Raises as amend().
        """
        before = self.ledger.writable()
        if before.made_by(key):
            return None
        state = State(change(self.ledger.succession, before).keyed(key), self.ready_state().arenas)
        keep = partial(self._keeper.amend, state) if self._keeper else _nothing
        return replace(self.moving_to(state, None), keep=keep)

    def change_averages(
        self, change: Callable[[Ledger], Setup | None], keep: Callable[[Setup], None], *, epoch: int | None = None
    ) -> bool:
        """Have other averages from the next update on; the weights of those that stay are as they were.

        change: gives the averages, or None where the run has them already. keep: makes them outlive the server, before
        they count. epoch: of the versions that the change was prepared for, None where any will do. An update under way
        was begun on the state before, and is superseded. Returns whether anything was changed. Raises what ``change``
        and ``keep`` raise, RunDegraded, RunNotFound; Superseded where the run went back meanwhile.
        """
        with self._lock:
            self.ledger.check_writable()
            setup = change(self.ledger)
            if setup is None:
                return False
            state = self.state
            if epoch is not None and state and state.version.epoch != epoch:
                raise Superseded(f"run {self.config.run!r} was rewound meanwhile", retry_after=0.0)
            self._settle(Write(partial(keep, setup), partial(self._put_averages, setup)))
        self.changes.tell()
        return True

    def moving_to_averages(self, setup: Setup) -> Write:
        """The write that other averages are, which were judged. An update under way is superseded."""

        def put() -> None:
            self._put_averages(setup)
            self.changes.tell()

        return Write(_nothing, put)

    def _put_averages(self, setup: Setup) -> None:
        # In this order: who reads a state first, and the averages to come then, never begins an average anew that was
        # removed.
        state = self.state
        self.ledger.change_averages(setup)
        if state:
            self._put_in_place(state.only(setup.members))
        if self._keeper:
            self._keeper.change_averages(setup)

    def rewind(
        self,
        info: SnapshotInfo,
        averages: tuple[Average, ...],
        arenas: tuple[Arena, ...],
        descent: Descent,
        key: str | None = None,
    ) -> None:
        """Go back to the state of a snapshot, in a new epoch; updates after the snapshot are as if they had never been.

        Also a way out of ``degraded``. descent: of the version that follows the snapshot. key: of the write; not to be
        called for the key of a write that was applied (Version.made_by). Raises RunNotFound, StorageFailed, Superseded.
        """
        rewound = self.finish_rewind(info, averages, arenas, descent, secrets.token_hex(8), key)
        with self._lock:
            self._settle(self.prepare_rewound(rewound))

    def finish_rewind(
        self,
        info: SnapshotInfo,
        averages: tuple[Average, ...],
        arenas: tuple[Arena, ...],
        descent: Descent,
        lineage: str,
        key: str | None,
        after: int = 0,
    ) -> Rewound:
        """The version at a snapshot, written to its place. lineage, after: as for Ledger.rewound(). Others as for
        rewind(). Raises StorageFailed."""
        found = self.at_snapshot(info, averages, arenas, descent, lineage, after)
        state = replace(found, version=found.version.keyed(key))
        return Rewound(state, self._write(state))

    def at_snapshot(
        self,
        info: SnapshotInfo,
        averages: tuple[Average, ...],
        arenas: tuple[Arena, ...],
        descent: Descent,
        lineage: str,
        after: int = 0,
    ) -> State:
        """The version at a snapshot, written nowhere. Others as for finish_rewind()."""
        return State(self.ledger.rewound(info, averages, descent, lineage, time.time(), after), arenas)

    def prepare_rewound(self, rewound: Rewound) -> Write:
        """The write that a rewind is. Under deciding(). Raises RunNotFound, Superseded."""
        self.ledger.judge_rewind(rewound.state.version)
        return self.moving_to(rewound.state, rewound.place, self.ledger.recover)

    def accept(self, key: str | None = None) -> None:
        """Go on with the version that is there although later updates are gone: the other way out of ``degraded``.

        key: as for rewind(). Raises InvalidRequest where the run is not degraded, RunDegraded where there is no
        version, StorageFailed.
        """
        self.ledger.acceptable()
        before = self.ready_state()
        # Written anew although unchanged: so a restart finds this version before the damaged one.
        state = State(before.version.keyed(key), before.arenas)
        place = self._write(state)
        with self._lock:
            if self.state is before:
                self._settle(self.moving_to(state, place, self.ledger.recover))

    # --- trainers come, a server starts, the run goes ---------------------------------------------------------------

    def attach(self, keep: Callable[[int], None], key: str | None = None) -> int:
        """A number for a trainer that takes over: from here on updates of earlier trainers are refused.

        keep: makes the number outlive the server, before the number counts. key: of the call, which gives one number
        however often it comes. Raises what ``keep`` raises, RunNotFound.
        """
        with self._lock:
            number = self.ledger.next_writer(key)
            if number > self.ledger.writer:
                self._settle(Write(partial(keep, number), partial(self.ledger.attach, number, key)))
            return number

    def detach(self, writer: int) -> bool:
        """As Ledger.detach(), now."""
        with self._lock:
            ended = self.ledger.detach(writer, time.time())
        if ended:
            self.changes.tell()
        return ended

    def restore(self, state: State | None, steps: Iterable[int], last_epoch: int, fault: str | None) -> None:
        """Take up what storage had (persistence.Restored): at the start, or once what it had proves to be damaged."""
        with self._lock:
            self._shadows.commit(state)
            self.ledger.restore(state.version if state else None, steps, last_epoch, fault)
        self.changes.tell()

    def follow(
        self, setup: Setup, state: State | None, *, writer: int, ended_at: float | None, fault: str | None
    ) -> None:
        """Be as the run of another server is, whose replica this one is. state: of a version that is here whole."""
        with self._lock:
            self.ledger.follow(setup, writer, ended_at, fault)
            if state is None:
                self.moving_to_nothing(partial(self.ledger.follow, setup, writer, ended_at, fault)).put()
            elif state is not self.state:
                self._put_in_place(state)
        self.changes.tell()

    def write(self, state: State) -> Place | None:
        """Where a state that was copied from another host is written, whole; None where not every version is kept. The
        write that makes the state the run's is moving_to(). Raises StorageFailed, Superseded."""
        return self._write(state)

    def retire(self, forget: Callable[[], None], *, replaced: bool = False) -> None:
        """Take no update from now on: the run is deleted, or replaced by another. Waits for the update in hand.

        forget: takes the run out of what a restart brings back, before anything else. Raises what ``forget`` raises,
        and then the run goes on; RunNotFound where the run is deleted already.
        """
        with self._lock:
            self.ledger.check_exists()
            forget()  # of a shard, too: that the run goes was decided before, for all of them
            self._put_away(replaced=replaced)
        self.changes.tell()

    def _put_away(self, *, replaced: bool) -> None:
        self.ledger.retire(replaced=replaced)
        self._keeper = None  # whoever still reads this run keeps none of its files open

    # ----------------------------------------------------------------------------------------------------------------

    def _first(self, parameters: Parameters) -> Prepared:
        """The first shadow of every average, computed once for each ``parameters``."""
        if parameters.prepared is None:
            parameters.prepared = (parameters.preparation or self._shadows.cast(parameters.staged)).finish()
        return parameters.prepared

    def _write(self, state: State, place: Place | None = None) -> Place | None:
        """Write what is not written yet of a state; None where not every version is kept. place: where it is begun."""
        keeper = self._keeper  # read once: None once the run is deleted
        if place is None and keeper:
            place = keeper.take([average.name for average in state.version.averages])
        if place:
            place.finish(state)
        return place

    def _settle(self, write: Write | None) -> bool:
        """Resolve a write at once, for the run decides alone. Returns whether there was one. Under the lock.

        Raises InvalidRequest where the run is a shard.
        """
        if write is None:
            return False
        self.check_alone()
        write.keep()
        write.put()
        return True

    def check_alone(self) -> None:
        """Raises InvalidRequest where the run is a shard."""
        if self.shard:
            raise InvalidRequest(
                f"run {self.config.run!r} is here as one shard of several, which decide together",
                hint="write to the run and not to a shard",
            )

    def moving_to(self, state: State, place: Place | None, then: Callable[[], None] = _nothing) -> Write:
        """The write that makes ``state`` the run's. place: where the state was written. then: what follows, before
        anyone is told.

        Of a state that was judged.
        """

        def keep() -> None:
            if self._keeper and place:
                place.commit(state)

        def put() -> None:
            self._put_in_place(state)
            then()
            self.changes.tell()

        return Write(keep, put, state, place)

    def moving_to_nothing(self, then: Callable[[], None]) -> Write:
        """The write that leaves the run without weights, as it was created. then: as for moving_to()."""

        def put() -> None:
            last_epoch = self.ledger.version.epoch if self.ledger.version else 0
            self._shadows.commit(None)
            self.ledger.restore(None, (), last_epoch, None)
            then()
            self.changes.tell()

        return Write(_nothing, put)

    def _measure(self, finished: Finished, state: State) -> None:
        """Note what was measured of an update that has just become the run's version."""
        if self._measurements is None:
            return
        update, prepared, arrived = finished.update, finished.prepared, finished.arrived
        durable, step = self._keeper.durable_step if self._keeper else None, state.version.step
        measured = Measured(
            state.version,
            prepared.sums,
            self.layout.param_bytes,
            durable_lag=None if durable is None or step is None else step - durable,
            receive=None if arrived is None else arrived - update.begun,
            average=prepared.seconds,
            commit=time.perf_counter() - (update.begun if arrived is None else arrived),
            left_out=not update.measured,
        )
        self._measurements.note(measured)

    def _put_in_place(self, state: State) -> None:
        self._shadows.commit(state)
        self.ledger.commit(state.version)


def _begun(version: Version, prepared: Prepared) -> State:
    """A version in which the parameters themselves are the shadow of every average."""
    return State(version, prepared.arenas * len(version.averages))


def _result(version: Version, step: int, keeper: Keeper | None, *, applied: bool) -> UpdateResult:
    return UpdateResult(
        applied=applied,
        step=step,
        num_updates=version.num_updates,
        effective_decay=version.averages[0].effective_decay,
        version=str(version),
        durable_step=keeper.durable_step if keeper else None,
    )
