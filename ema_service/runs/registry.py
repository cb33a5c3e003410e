"""All runs of a server: creating, finding and deleting runs, and keeping them on disk.

Knows the names of the runs, and what is done to a run as a whole. Does not know HTTP, the event loop, which objects
make a run (making), how an update is decided (ledger) or kept (persistence). Methods may block: call them off the event
loop.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import secrets
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

from ema_client.errors import (
    BodyTooLarge,
    InvalidRequest,
    Overloaded,
    RunExists,
    RunNotFound,
    StorageDisabled,
    StorageFailed,
    Superseded,
    SynthesisRefused,
    listed,
)
from ema_client.protocol import (
    MAX_AVERAGES,
    AverageConfig,
    Durability,
    RunConfig,
    ShardInfo,
    SweepInfo,
    SweepReport,
    Writer,
    from_json,
)
from ema_service.averaging import prepare, prepare_measuring
from ema_service.memory import FrozenWeights, Layout, Memory, Staging
from ema_service.persistence import (
    MemoryVersions,
    Offload,
    ShardMemoryVersions,
    ShardRing,
    ShardVersions,
    Snapshots,
    Sweeps,
    Timeline,
    Versions,
    told_accepted,
    told_average_added,
    told_average_removed,
    told_decay,
    told_reset,
    told_rewind,
    told_writer,
)
from ema_service.persistence.rows import revision_of
from ema_service.runs.branching import check_averages, check_branch, check_state, descent_of_branch
from ema_service.runs.claims import Claim, Claims
from ema_service.runs.ledger import Ledger
from ema_service.runs.making import MORE_ROOM, Disk, Maker, Registered
from ema_service.runs.measurements import Measurements
from ema_service.runs.parts import Expired, Parts
from ema_service.runs.posthoc import Synthesiser, with_posthoc
from ema_service.runs.run import Run
from ema_service.shadows import Setup
from ema_service.storage import (
    CatalogUnusable,
    MemoryFilesUnusable,
    ObjectStore,
    RunRow,
    ShardRow,
    SnapshotRow,
    Store,
)

__all__ = ["Candidate", "Registry"]

_log = logging.getLogger(__name__)

#: Retry-After where there is no room for another average: somebody has to remove one first, or delete a run.
_FULL_SECONDS = 5.0

#: Members of a configuration that name tensors, too long to be shown in a message.
_LONG = ("layout", "copied")


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A run of a cluster that is made here, with its memory and its disk space, and that nobody finds yet: other hosts
    have to agree. Then Registry.enter() or drop()."""

    _made: Registered
    _claim: Claim

    @property
    def run(self) -> Run:
        """The run itself."""
        return self._made.run

    @property
    def row(self) -> RunRow | None:
        """In the catalog; None where nothing is kept on disk."""
        return self._made.disk.row if self._made.disk else None


class Registry:
    """The runs of one server. Thread-safe.

    The registry's lock is held for its dictionaries alone, never for a disk, for memory or for another lock. Whoever
    waits for one run takes that run's locks first, and so holds up no other run.

    store: None keeps nothing on disk. staging, frozen: the budgets that pushes and reads draw from.
    More than twenty methods: one for each thing that is done to a run as a whole, or to all runs. More than a dozen
    attributes: what runs are made of and share.
    """

    def __init__(
        self,
        memory: Memory,
        store: Store | None,
        *,
        staging_bytes: int,
        frozen_bytes: int,
        max_snapshots: int = sys.maxsize,
        measure: bool = True,
        objects: ObjectStore | None = None,
    ) -> None:
        """Brings back every run of the store; a run whose files are damaged comes up ``degraded`` and says why.

        measure: whether updates are measured. objects: where snapshots are moved to. Raises CatalogUnusable;
        sqlite3.Error where the catalog is damaged.
        """
        prepare()
        if measure:
            threading.Thread(target=prepare_measuring, name="ema-prepare").start()
        self.memory = memory
        self.staging = Staging(memory, staging_bytes)
        self.frozen = FrozenWeights(memory, frozen_bytes)
        self._store = store
        #: What moves snapshots to an object store; None where they stay in the data dir.
        self.offload = Offload(store, objects) if store and objects else None
        self._maker = Maker(memory, store, self.offload, max_snapshots=max_snapshots, measure=measure)
        in_files = store is not None and store.memory_files is not None
        #: Guards which runs there are, which are being made, and what they claim. Told when a run is made, or is not.
        self._lock = threading.Condition(threading.Lock())
        self._runs: dict[str, Registered] = {}
        #: Names that somebody makes a run of, one at a time.
        self._making: set[str] = set()
        self._claims = Claims(memory, in_files=in_files, measured=measure)
        #: By name: made, and not agreed on by the hosts of a cluster.
        self._candidates: dict[str, Candidate] = {}
        agreed = _agreed(store)
        for row in store.runs() if store else []:
            made = self._maker.restored(row)
            shard = store.shard(row) if store else None
            if shard and shard.birth > agreed:
                self._candidates[row.name] = self._candidate(made)
            else:
                self._runs[row.name] = made
        if self.offload:
            self.offload.start(self._place_snapshot)

    def verify(self) -> None:
        """Compare versions that were taken up from memory with their digests; one that differs is a fault of its run.

        Until then no update of the run is applied.
        """
        for each in self._all():
            if each.disk and isinstance(each.disk.versions, MemoryVersions):
                each.disk.versions.verify(each.take_up)

    # --- the server as a whole --------------------------------------------------------------------------------------

    def close(self) -> None:
        """Take a last checkpoint of every run that moved, and close the store."""
        if self.offload:
            self.offload.close()
        self._maker.close()
        self.checkpoint(final=True)
        if self._store:
            self._store.close()

    @property
    def store(self) -> Store | None:
        """What is kept on disk, for questions; None where nothing is."""
        return self._store

    def checkpoint(self, *, final: bool = False) -> None:
        """Take a checkpoint of every run that moved since its last one.

        A failure is told by the run (Versions.trouble).

        final: no update will be applied any more.
        """
        for each in self._all():
            state = each.run.state
            if each.disk and state and not each.run.ledger.fault:
                with contextlib.suppress(StorageFailed):
                    each.disk.versions.save(state, final=final)
            each.keep_measurements()

    def unsynced(self) -> list[Versions]:
        """The versions of runs whose newest version a power loss would take: call sync() of each."""
        found = [each.disk.versions for each in self._all() if each.disk]
        return [versions for versions in found if isinstance(versions, Versions) and versions.unsynced]

    @property
    def gathering(self) -> int:
        """How many updates are being put together from parts."""
        return sum(each.parts.count() for each in self._all())

    def expire_parts(self, silence: float) -> list[tuple[str, Expired]]:
        """Give up the steps of which no part arrived for ``silence`` seconds, each with the name of its run."""
        return [(each.run.config.run, expired) for each in self._all() for expired in each.parts.expire(silence)]

    # --- finding ----------------------------------------------------------------------------------------------------

    # created_at, wherever a method takes it: of the run that is meant, which a run made since in its place is not.

    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        return sorted((each.run for each in self._all()), key=lambda run: run.created_at)

    def get(self, name: str, created_at: float | None = None) -> Run:
        """The run of this name. Raises RunNotFound."""
        return self._find(name, created_at).run

    def parts(self, name: str, created_at: float | None = None) -> Parts:
        """The parts of a run. Raises RunNotFound."""
        return self._find(name, created_at).parts

    def snapshots(self, name: str) -> Snapshots:
        """The snapshots of a run. Raises RunNotFound; StorageDisabled where nothing is kept on disk."""
        return self._disk(name).snapshots

    def measurements(self, name: str) -> Measurements:
        """What was measured of a run. Raises RunNotFound."""
        return self._find(name).measurements

    def timeline(self, name: str) -> Timeline:
        """What was done to a run. Raises RunNotFound."""
        return self._find(name).timeline

    def sweeps(self, name: str) -> Sweeps:
        """What sweeps over averages of a run found. Raises RunNotFound."""
        return self._find(name).sweeps

    def shard(self, name: str) -> ShardVersions | ShardMemoryVersions:
        """The versions of a run that is a shard. Raises RunNotFound; InvalidRequest where the run is none."""
        disk = self._find(name).disk
        if disk is None or not isinstance(disk.versions, ShardVersions | ShardMemoryVersions):
            raise InvalidRequest(f"run {name!r} is no shard: it decides alone")
        return disk.versions

    def ring(self, name: str) -> ShardRing | None:
        """The ring of a run that is a shard; None where it has none. Raises RunNotFound."""
        disk = self._find(name).disk
        return disk.ring if disk and isinstance(disk.ring, ShardRing) else None

    def whole(self, name: str) -> RunConfig:
        """The configuration with which a run was created: of a shard, that of the whole run. Raises RunNotFound,
        StorageFailed."""
        found = self._find(name)
        try:
            text = found.disk.store.whole(found.disk.row) if found.disk else ""
            return from_json(RunConfig, json.loads(text)) if text else found.run.ledger.setup.created
        except (sqlite3.Error, ValueError) as fault:
            raise StorageFailed(f"the configuration of run {name!r} cannot be read: {fault}") from fault

    def synthesiser(self, name: str) -> Synthesiser:
        """What works out averages of other lengths for a run. Raises RunNotFound, StorageDisabled, SynthesisRefused."""
        found = self._find(name)
        if found.synthesiser is None:
            raise SynthesisRefused(
                f"run {name!r} keeps no snapshots that an average of another length could be worked out of",
                hint="create a run with posthoc={} to have them from the beginning, or ask for one of its averages",
            )
        return found.synthesiser

    # --- what is done to a run as a whole ---------------------------------------------------------------------------

    def create(self, config: RunConfig, shard: ShardRow | None = None) -> tuple[Run, bool]:
        """The run of this configuration, and whether it is new.

        shard: which shard of a run on several hosts the run is to be; ``config`` has the shard's part of the layout.

        A run of this name with another configuration gives way where it has neither weights nor snapshots: its creator
        failed, or began anew. While its initial weights are being received Superseded is raised, as they decide.

        A ``durability`` left out is that of the run if it exists, else ``process``, or ``memory`` where there is no
        store. Raises RunExists, TooManyRuns, InvalidRequest, StorageDisabled, StorageFailed; Overloaded where memory
        has no room for the run.
        """
        config = self._with_posthoc(config)
        _check_averages(config, folds_case=self._store is not None and self._store.folds_case)
        layout = Layout(config.layout, config.copied)
        config = replace(config, layout=tuple(entry.spec for entry in layout.params), copied=layout.copied)
        with self._alone(config.run):
            found = self._runs.get(config.run)
            _check_shard(shard, found)
            if found is None:
                config = replace(config, durability=self._durability(config, shard))
                with self._claimed(config, layout) as claim:
                    return self._add(config, layout, claim, shard=shard).run, True
            # Whatever became of its averages since: a creator that comes again asks for those of the beginning.
            created = found.run.ledger.setup.created
            same = replace(config, durability=config.durability or created.durability)
            if created == same:
                return found.run, False
            refusal = f"run {config.run!r} exists with another {_difference(created, same)}"
            found.check_gives_way(refusal)
            config = replace(config, durability=self._durability(config))
            with self._claimed(config, layout, found) as claim:
                return self._replaced(found, config, layout, refusal, claim).run, True

    def propose(self, config: RunConfig, shard: ShardRow, created_at: float) -> Candidate:
        """A run as create() makes it, that is one only once all hosts of its cluster agree: then enter(), else drop().

        Name, memory and disk space are taken until then. config: with the shard's part of the layout. Raises as
        create(), and RunExists for any run of this name.
        """
        layout = Layout(config.layout, config.copied)
        _check_averages(config, folds_case=self._store is not None and self._store.folds_case)
        config = replace(config, durability=self._durability(config, shard))
        with self._alone(config.run):
            if config.run in self._runs:
                raise RunExists(f"run {config.run!r} exists")
            with self._claimed(config, layout) as claim:
                made = self._maker.built(config, layout, shard=shard, created_at=created_at)
                kept = replace(claim)
                with self._lock:  # one goes as the other comes: memory is counted once
                    self._claims.discard(claim)
                    self._claims.keep(kept)
                    candidate = self._candidates[config.run] = Candidate(made, kept)
        return candidate

    def enter(self, candidate: Candidate) -> Run:
        """Have a run found from now on."""
        made = self._entered(candidate._made, candidate._claim)
        with self._lock:
            self._candidates.pop(candidate._claim.name, None)
        return made.run

    def drop(self, candidate: Candidate) -> None:
        """Give back what a run was promised that is not to be. Raises StorageFailed."""
        if disk := candidate._made.disk:
            disk.forget()
            disk.free()
        with self._lock:
            self._claims.discard(candidate._claim)
            self._candidates.pop(candidate._claim.name, None)

    def candidates(self) -> list[Candidate]:
        """What was proposed, here or by the server before, and neither entered nor dropped."""
        return list(self._candidates.values())

    def _candidate(self, made: Registered) -> Candidate:
        """A run that the hosts of a cluster had not agreed on when the server ended."""
        claim = self._claims.claim_for(made.run.config, made.run.layout)
        self._claims.keep(claim)
        return Candidate(made, claim)

    def follow(self, setup: Setup, created_at: float, shard: ShardInfo | None) -> Run:
        """A run as another server has it, without weights yet, in place of any other of its name (Run.follow).

        setup: as that run has it. Raises Overloaded where memory has no room for the run; TooManyRuns.
        """
        config = setup.config
        layout = Layout(config.layout, config.copied)
        with self._alone(config.run):
            found = self._runs.get(config.run)
            with self._claimed(config, layout, found) as claim:
                if found:
                    self.delete(config.run)
                run = Run(setup.created, layout, self.memory, created_at=created_at, setup=setup, shard=shard)
                parts = Timeline(config.run, None, None), Sweeps(config.run, None, None)
                made = Registered(run, Parts(run), *parts, Measurements(config.run, layout), None)
                return self._entered(made, claim).run

    # key, wherever a method takes it: of the write, which is applied once however often it comes.

    def set_decay(self, name: str, decay: float, average: str | None, key: str | None = None) -> Run:
        """Use ``decay`` from the next update on, and note the change in the run's timeline. Raises as Run.amend()."""
        found = self._find(name)
        applied = found.run.amend(lambda succession, version: succession.with_decay(version, decay, average), key)
        if applied:
            found.record(*told_decay(average or found.run.config.averages[0].name, decay))
        return found.run

    def add_average(self, name: str, average: AverageConfig, key: str | None = None) -> tuple[Run, bool]:
        """The run with one more average, which begins with the next update's parameters, and whether it is new.

        Memory and disk space of the average are taken first: where there is none nothing is changed.

        Raises AverageExists, TooManyAverages, InvalidRequest, Overloaded, StorageFailed, and as Run.change_averages().
        """
        found = self._find(name)
        run, lineage = found.run, secrets.token_hex(4)

        def change(ledger: Ledger) -> Setup | None:
            return None if ledger.setup.made_by(key) else ledger.succession.with_average(average, lineage, key)

        with found.steady():
            # Deleted while this waited: files that are made now nobody would remove.
            run.ledger.check_exists()
            run.ledger.check_writable()
            if (setup := change(run.ledger)) is None:
                return run, False
            _check_averages(setup.config, folds_case=self._store is not None and self._store.folds_case)
            with self._claimed(setup.config, run.layout, found), self._room_for(found, setup):
                run.change_averages(change, found.keep_setup)
        found.record(*told_average_added(average))
        return run, True

    def remove_average(self, name: str, average: str, key: str | None = None) -> None:
        """Remove an average of a run, and give its memory and disk space back; who reads the average reads on.

        The newest version is brought to the medium first: what the machine's end leaves has another average then.

        Raises AverageNotFound, LastAverage, StorageFailed, and as Run.change_averages().
        """
        found = self._find(name)
        run = found.run

        def change(ledger: Ledger) -> Setup | None:
            if ledger.setup.made_by(key):
                return None
            return ledger.succession.without_average(ledger.version, average, key)

        run.ledger.check_writable()
        if change(run.ledger) is None:
            return
        state = run.state
        if found.disk and state:
            found.disk.versions.settle(state)
        with found.steady():
            removed = run.change_averages(change, found.keep_setup, epoch=state.version.epoch if state else None)
            if found.disk:
                found.disk.versions.give_back()
        if removed:
            found.record(*told_average_removed(average))

    def room_for_averages(self, run: Run, setup: Setup) -> Callable[[bool], None]:
        """Take memory and disk space for the averages of ``setup``, which the run is to have if others say so. The
        result is called once that is known: where the run does not have them their room is given back.

        Raises InvalidRequest, Overloaded, StorageFailed, RunNotFound, and then took nothing.
        """
        found = self._find(run.config.run)
        _check_averages(setup.config, folds_case=self._store is not None and self._store.folds_case)
        with found.steady(), contextlib.ExitStack() as undo:
            run.ledger.check_exists()
            claim = self._claim(setup.config, run.layout, found)
            undo.callback(self._disclaim, claim)
            self._take_room(found, setup)
            undo.pop_all()

        def end(made: bool) -> None:
            if not made and found.disk:
                with found.steady():
                    found.disk.versions.give_back()
            self._disclaim(claim)

        return end

    def reset_num_updates(self, name: str, key: str | None = None) -> Run:
        """Begin the warm-up anew; a counter that is off stays off. Raises as Run.amend()."""
        found = self._find(name)
        if found.run.amend(lambda succession, version: succession.with_counter_reset(version), key):
            found.record(*told_reset())
        return found.run

    def attach(self, name: str, key: str | None = None) -> Writer:
        """A number for a trainer that takes over the run; earlier trainers are fenced off. Raises as Run.attach()."""
        found = self._find(name)
        before = found.run.ledger.writer
        number = found.run.attach(found.disk.keep_writer if found.disk else _nothing, key)
        if number > before:
            found.record(*told_writer(number))
        return Writer(name, number)

    def add_sweep(self, name: str, report: SweepReport, key: str | None = None) -> SweepInfo:
        """Keep what a sweep over averages of a run found; the run is as it was. Raises RunNotFound, StorageFailed."""
        found = self._find(name)
        info, new = found.sweeps.add(report, found.run.ledger.version, key)
        if new:
            found.record("sweep", _told(report))
        return info

    def detach(self, name: str, writer: int) -> Run:
        """The training of a trainer that attached is over. Raises as Ledger.detach()."""
        found = self._find(name)
        if found.run.detach(writer):
            found.record("ended", f"the training of trainer {writer} is over")
        return found.run

    def rewind(
        self,
        name: str,
        snapshot: str,
        key: str | None = None,
        *,
        source: str | None = None,
        created_at: float | None = None,
    ) -> Run:
        """Take a run back to a snapshot. When this returns, the rewind outlives a crash, whatever the run's durability.

        source: the run of the snapshot, where the run branches from another; it may have no weights yet. Raises
        SnapshotNotFound, SnapshotDamaged, RunNotFound; AverageNotFound where the snapshot has none of the run's
        averages, or, of another run, not all of them; LayoutMismatch or InvalidRequest where the run cannot go on from
        the other's snapshot; StorageFailed where the rewind would not outlive a crash: the run may be
        at the snapshot all the same, and the rewind can be repeated.
        """
        found = self._find(name, created_at)
        run, disk = found.run, self._disk_of(found)
        if run.ledger.version and run.ledger.version.made_by(key):
            self._settle(run, disk)
            return run
        of, wanted = None, run.ledger.setup.members
        if source is not None:
            of = self.source_of(run, source, snapshot)
        check_state((disk.snapshots if of is None else of).find(snapshot))
        info, averages, arenas = disk.snapshots.read(snapshot, wanted, of=of)
        descent = disk.snapshots.following(info) if of is None else descent_of_branch(averages)
        run.rewind(info, averages, arenas, descent, key)
        self._settle(run, disk)
        found.record(*told_rewind(snapshot, info.version, info.step, source))
        return run

    def source_of(self, run: Run, source: str, snapshot: str) -> Snapshots:
        """The snapshots of another run, from one of which ``run`` is to branch. Raises as rewind()."""
        check_branch(run, self.get(source))
        found = self._disk(source).snapshots
        check_averages(run.config, found.find(snapshot))
        return found

    def accept(self, name: str, key: str | None = None, *, created_at: float | None = None) -> Run:
        """Let a degraded run go on with the version that is there. Raises as Run.accept(), and StorageFailed."""
        found = self._find(name, created_at)
        run, disk = found.run, self._disk_of(found)
        if run.ledger.version and run.ledger.version.made_by(key):
            self._settle(run, disk)
            return run
        run.accept(key)
        self._settle(run, disk)
        found.record(*told_accepted())
        return run

    def delete(
        self, name: str, created_at: float | None = None, forget_row: Callable[[RunRow], None] | None = None
    ) -> None:
        """Delete a run with its weights, versions and snapshots, once what is being written of the run is written.

        forget_row: takes the run's row out of the catalog, in place of doing just that; given where all hosts of a
        cluster have decided. Raises RunNotFound; InvalidRequest where the run is a shard, and that is not given;
        StorageFailed, and then the run is as it was.
        """
        found = self._find(name, created_at)
        if forget_row is None and found.disk:
            found.run.check_alone()

        def forget() -> None:
            if found.disk:
                (forget_row or found.disk.forget)(found.disk.row)
            with self._lock:
                del self._runs[name]

        found.retire(forget)
        if self.offload:
            self.offload.wake()

    # ----------------------------------------------------------------------------------------------------------------

    def _replaced(self, found: Registered, config: RunConfig, layout: Layout, refusal: str, claim: Claim) -> Registered:
        """A new run in the place of ``found``, which is forgotten first: there may be no room for both.

        Until the new run is there requests for the name are Superseded; where it cannot be made there is neither.
        refusal: what RunExists says. Raises as Registered.check_gives_way() and _add(); InvalidRequest where the run is
        a shard.
        """
        found.run.check_alone()

        def forget() -> None:
            found.check_gives_way(refusal)
            if found.disk:
                found.disk.forget()

        with contextlib.suppress(RunNotFound):  # deleted meanwhile
            found.retire(forget, replaced=True)
        try:
            made = self._add(config, layout, claim, found.run)
        finally:
            with self._lock:
                if self._runs.get(config.run) is found:
                    del self._runs[config.run]
        _log.info("run %s, which had no weights, was made anew with another configuration", config.run)
        return made

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Within the block nobody else makes a run of this name; waits for whoever does."""
        with self._lock:
            while name in self._making:
                self._lock.wait()
            self._making.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._making.remove(name)
                self._lock.notify_all()

    @contextlib.contextmanager
    def _claimed(self, config: RunConfig, layout: Layout, instead: Registered | None = None) -> Iterator[Claim]:
        """Within the block memory is promised as by _claim()."""
        claim = self._claim(config, layout, instead)
        try:
            yield claim
        finally:
            self._disclaim(claim)

    def _claim(self, config: RunConfig, layout: Layout, instead: Registered | None) -> Claim:
        """Promise memory to a run of this configuration, in place of that of ``instead``.

        Raises Overloaded where there is no room beside all other runs and claims; TooManyRuns.
        """
        claim = self._claims.claim_for(config, layout, instead)
        with self._lock:
            self._claims.add(claim, self._runs)
        return claim

    def _disclaim(self, claim: Claim) -> None:
        with self._lock:
            self._claims.discard(claim)

    @contextlib.contextmanager
    def _room_for(self, found: Registered, setup: Setup) -> Iterator[None]:
        """Take memory and disk space for the averages that a run is to have; give back where the block raises.

        Raises as _take_room().
        """
        self._take_room(found, setup)
        with contextlib.ExitStack() as undo:
            if found.disk:
                undo.callback(found.disk.versions.give_back)
            yield
            undo.pop_all()

    def _take_room(self, found: Registered, setup: Setup) -> None:
        """Take memory and disk space for the averages that a run is to have. Raises Overloaded, StorageFailed."""
        new = ", ".join(repr(each.name) for each in setup.members if each not in found.run.ledger.setup.members)
        try:
            self.staging.needed(found.run.layout, len(setup.members))
            if found.disk:
                found.disk.versions.make_room(setup)
        except BodyTooLarge as fault:
            raise Overloaded(fault.detail, hint=fault.hint, retry_after=_FULL_SECONDS) from None
        except MemoryFilesUnusable as fault:
            raise Overloaded(
                f"no room for average {new}: {fault}", hint=MORE_ROOM, retry_after=_FULL_SECONDS
            ) from fault
        except OSError as fault:
            raise StorageFailed(f"average {new} was not added: {fault}", retry_after=1.0) from fault

    def _with_posthoc(self, config: RunConfig) -> RunConfig:
        """The configuration with the averages that post-hoc averages are made of, behind its own.

        Raises InvalidRequest, StorageDisabled.
        """
        if config.posthoc is None:
            return config
        if self._store is None:
            raise StorageDisabled(
                "posthoc: snapshots are files, and this server was started with --memory",
                hint="leave posthoc out, or start the server with --data-dir",
            )
        return with_posthoc(config)

    def _durability(self, config: RunConfig, shard: ShardRow | None = None) -> Durability:
        """The durability of a new run. Raises StorageDisabled where it needs a disk and there is none; InvalidRequest
        where the run is a shard and would keep no version."""
        if shard and (self._store is None or config.durability == "memory"):
            raise InvalidRequest(
                f"durability: run {config.run!r} is a shard, whose vote has to outlive the server",
                hint='ask for "process" or "disk", of a server with --data-dir',
            )
        chosen = config.durability or ("process" if self._store else "memory")
        if chosen != "memory" and not self._store:
            raise StorageDisabled(
                f"durability: {chosen!r} needs a disk, and this server was started with --memory",
                hint='leave durability out or ask for "memory", or start the server with --data-dir',
            )
        return chosen

    def _add(
        self,
        config: RunConfig,
        layout: Layout,
        claim: Claim,
        before: Run | None = None,
        shard: ShardRow | None = None,
    ) -> Registered:
        """Add a new run, first to the disk, then to the registry. Raises StorageFailed, Overloaded.

        claim: of the run's memory, which the run itself counts for once it is there. before: the run that gave way. The
        new one has another ``created_at`` whatever the clock says, and counts writers on: a number that a trainer has
        of the run before is never given to another.
        """
        created_at, writer = time.time(), 0
        if before:
            created_at, writer = max(created_at, math.nextafter(before.created_at, math.inf)), before.ledger.writer
        return self._entered(
            self._maker.built(config, layout, writer=writer, shard=shard, created_at=created_at), claim
        )

    def _entered(self, made: Registered, claim: Claim) -> Registered:
        """A run that is made, which can be found from now on, in place of its claim."""
        with self._lock:
            self._runs[claim.name] = made
            self._claims.discard(claim)
        made.record("created", _created(made.run.config))
        return made

    def _place_snapshot(self, run: str, snapshot: SnapshotRow, folder: str, files: str) -> None:
        """A snapshot lies in the object store now. Raises sqlite3.Error."""
        with contextlib.suppress(RunNotFound):
            self._disk(run).snapshots.place(snapshot, folder, files)

    def _settle(self, run: Run, disk: Disk) -> None:
        """Bring to the medium what was decided, whatever the run's durability. Raises StorageFailed."""
        if run.state:
            disk.versions.settle(run.state)

    def _all(self) -> list[Registered]:
        # Without the lock, which may be held for a disk, since the event loop calls this too. (Copying a dict's values
        # is atomic.)
        return list(self._runs.values())

    def _find(self, name: str, created_at: float | None = None) -> Registered:
        found = self._runs.get(name)
        if found is None and name in self._candidates:
            raise Superseded(f"run {name!r} is being made on several hosts", retry_after=0.1)
        if found is None:
            raise RunNotFound(f"there is no run {name!r}")
        if created_at not in (None, found.run.created_at):
            raise RunNotFound(f"there is no run {name!r} of that time any more")
        return found

    def _disk(self, name: str) -> Disk:
        return self._disk_of(self._find(name))

    @staticmethod
    def _disk_of(found: Registered) -> Disk:
        if found.disk is None:
            raise StorageDisabled("snapshots are files, and this server was started with --memory")
        return found.disk


def _check_shard(shard: ShardRow | None, found: Registered | None) -> None:
    """Raises InvalidRequest for a shard that cannot be; RunExists where the run that is there is another shard, or none
    where a shard is asked for."""
    if shard and not 0 <= shard.place < shard.of:
        raise InvalidRequest(f"shard {shard.place} of {shard.of}: shards are numbered from 0 to {shard.of - 1}")
    if found is None:
        return
    versions = found.disk.versions if found.disk else None
    here = (versions.place, versions.of) if isinstance(versions, ShardVersions | ShardMemoryVersions) else None
    if here != ((shard.place, shard.of) if shard else None):
        told = "no shard" if here is None else f"shard {here[0]} of {here[1]}"
        raise RunExists(f"run {found.run.config.run!r} exists, as {told}")


def _told(report: SweepReport) -> str:
    """What a sweep found, for a line of the timeline."""
    lengths = f"sweep of {len(report.points)} {'length' if len(report.points) == 1 else 'lengths'}"
    if (best := report.best) is None:
        return f"{lengths} of {report.kind}, without a result"
    named = f"{report.name} " if report.name else ""
    return f"{lengths}, best {report.kind} {best.value:.6g}: {named}{best.result:.6g}"


def _nothing(_: int) -> None:
    """Keeps no writer's number: there is no disk."""


def _agreed(store: Store | None) -> int:
    """The revision that the directory of a cluster's runs has come to here; 0 where the server is no host.

    Raises CatalogUnusable where the record is damaged.
    """
    directory = store.directory() if store else None
    try:
        return revision_of(directory.record) if directory else 0
    except (ValueError, LookupError, TypeError) as fault:
        raise CatalogUnusable(f"the catalog's directory is damaged: {fault}; restore the data dir") from None


def _check_averages(config: RunConfig, *, folds_case: bool) -> None:
    """Raises InvalidRequest where the averages are too many, two have one name, or a field does not go with a schedule.

    folds_case: two names are one also where they differ in case.
    """
    names = Counter(average.name.casefold() if folds_case else average.name for average in config.averages)
    if not 1 <= len(config.averages) <= MAX_AVERAGES:
        raise InvalidRequest(f"averages: {len(config.averages)} were given; 1 to {MAX_AVERAGES} are possible")
    name, count = names.most_common(1)[0]
    if count > 1:
        raise InvalidRequest(f"averages: the name {name!r} stands there {count} times")
    for average in config.averages:
        if average.fault:
            raise InvalidRequest(f"averages: {average.name!r}: {average.fault}")


def _created(config: RunConfig) -> str:
    """What a new run is, for people."""
    averages = ", ".join(average.name for average in config.averages)
    return f"created with {len(config.layout)} tensors and the averages {averages}"


def _difference(old: RunConfig, new: RunConfig) -> str:
    """What differs between two configurations of one run, for people."""
    names = [f.name for f in fields(RunConfig) if getattr(old, f.name) != getattr(new, f.name)]
    shown = [f"{name} ({getattr(old, name)}, not {getattr(new, name)})" for name in names if name not in _LONG]
    if "copied" in names:
        tensors = sorted(set(old.copied) ^ set(new.copied))
        shown.append(f"choice of copied tensors ({listed(tensors)})")
    return " and ".join([*shown, *(["layout"] if "layout" in names else [])])
