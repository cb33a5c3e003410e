"""What a run is made of, and the making of it: from a configuration, or from what storage has of it.

Knows which objects make a run: Run, Parts, and on disk its versions, snapshots, timeline and sweeps. Does not know
which runs there are, or whether there is room for one more (registry).
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ema_client.errors import Overloaded, RunExists, StorageFailed, Superseded
from ema_client.protocol import RunConfig, ShardInfo, TimelineKind, from_json, to_json
from ema_service.memory import FilePool, Layout, Memory
from ema_service.memory.arena import buffer_bytes
from ema_service.persistence import (
    MemoryVersions,
    Offload,
    Restored,
    ShardMemoryVersions,
    ShardRing,
    ShardVersions,
    Snapshots,
    StoredRing,
    Sweeps,
    Timeline,
    Versions,
)
from ema_service.persistence.measured import StoredMeasurements
from ema_service.persistence.rows import read_setup
from ema_service.runs.measurements import Measurements
from ema_service.runs.parts import Parts
from ema_service.runs.posthoc import Synthesiser
from ema_service.runs.run import Run
from ema_service.shadows import Setup
from ema_service.storage import CatalogUnusable, MemoryFilesUnusable, RunRow, ShardRow, Store, memory_prefix
from ema_service.threads import Threads

__all__ = ["MORE_ROOM", "Disk", "Maker", "Registered"]

_log = logging.getLogger(__name__)

#: What to do where memory files have no room.
MORE_ROOM = (
    "give shared memory more room (docker run --shm-size=…, Kubernetes: an emptyDir of medium Memory at /dev/shm), or "
    "another folder in memory with --ram-dir"
)

#: Retry-After for a creation while another trainer's initial weights are being received.
_RECEIVING_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Disk:
    """The objects that keep one run on disk."""

    row: RunRow
    store: Store
    versions: Versions | MemoryVersions
    snapshots: Snapshots
    ring: StoredRing | None

    def keep_writer(self, writer: int) -> None:
        """Remember the number of the writer that attached last, beyond the server's end. Raises StorageFailed."""
        try:
            self.store.set_writer(self.row, writer)
        except sqlite3.Error as fault:
            raise StorageFailed(
                f"the writer of run {self.row.name!r} could not be kept: {fault}", retry_after=1.0
            ) from fault

    def forget(self, _: RunRow | None = None) -> None:
        """Take the run out of what a restart brings back. Raises StorageFailed, and then the run is as it was."""
        try:
            self.store.forget_run(self.row)
        except sqlite3.Error as fault:
            raise StorageFailed(f"run {self.row.name!r} was not deleted: {fault}", retry_after=1.0) from fault

    def free(self) -> None:
        """Give files and memory of a forgotten run back."""
        self.store.remove_files(self.row)
        self.versions.free()


@dataclass(frozen=True, slots=True)
class Registered:
    """A run with its parts. disk: None where nothing is kept on disk."""

    run: Run
    parts: Parts
    timeline: Timeline
    sweeps: Sweeps
    measurements: Measurements
    disk: Disk | None
    synthesiser: Synthesiser | None = None

    def steady(self) -> contextlib.AbstractContextManager[None]:
        """Within the block no checkpoint is taken, and the run is not deleted."""
        return self.disk.versions.steady() if self.disk else contextlib.nullcontext()

    def keep_setup(self, setup: Setup) -> None:
        """Have a restart bring the run back with these averages. Raises StorageFailed."""
        if self.disk:
            self.disk.versions.keep_setup(setup)

    def record(self, kind: TimelineKind, text: str) -> None:
        """Add a line to the run's timeline."""
        self.timeline.record(kind, text, self.run.ledger.version)

    def check_gives_way(self, refusal: str) -> None:
        """Raises RunExists, with ``refusal``, unless nothing but a configuration would be lost with the run; Superseded
        while its initial weights are being received."""
        if self.run.state or self.run.ledger.fault or (self.disk and self.disk.snapshots.all()):
            raise RunExists(refusal)
        if self.run.links.beginning:
            raise Superseded(
                f"{refusal}, and its initial weights are being received",
                hint="another trainer makes the run at the moment: choose another name, or come again",
                retry_after=_RECEIVING_SECONDS,
            )

    def keep_measurements(self) -> None:
        """Have a restart bring back what was measured of the run. A failure is only logged: no weights depend on it."""
        if self.disk is None:
            return
        with self.steady():
            if self.run.ledger.retired:
                return
            try:
                self.measurements.save(partial(self.disk.store.put_measurements, self.disk.row))
            except OSError as fault:
                _log.warning("run %s: its measurements were not kept: %s", self.disk.row.name, fault)

    def take_up(self, found: Restored) -> None:
        """Go on with what storage had of the run."""
        # Not of a shard: when its snapshots come to the store is another moment on each host.
        stored = self.disk.snapshots.last_epoch if self.disk and not self.run.shard else 0
        last_epoch = max(found.last_epoch, stored)
        self.run.restore(found.state, found.steps, last_epoch, found.fault)
        if found.fault:
            # A server that is started again finds the same damage.
            self.timeline.record("damaged", found.fault, self.run.ledger.version, once=True)

    def retire(self, forget: Callable[[], None], *, replaced: bool = False) -> None:
        """Take the run out of use once what is being written of it is written, then give its files and memory back.

        forget, replaced: as for Run.retire(). Raises as Run.retire().
        """
        with contextlib.ExitStack() as quiet:
            if self.disk:
                quiet.enter_context(self.disk.snapshots.closing())
                quiet.enter_context(self.disk.versions.closing())
                if self.disk.ring:
                    quiet.enter_context(self.disk.ring.closing())
            self.run.retire(forget, replaced=replaced)
        if gone := self.run.ledger.gone:
            self.parts.close(gone)
        if self.disk:
            self.disk.free()


class Maker:
    """Makes the runs of one server. Thread-safe.

    store: None keeps nothing on disk. offload: moves snapshots to an object store; None where they stay.
    """

    def __init__(
        self, memory: Memory, store: Store | None, offload: Offload | None, *, max_snapshots: int, measure: bool
    ) -> None:
        """max_snapshots: of each run. measure: whether updates are measured."""
        self._memory = memory
        self._store = store
        self._offload = offload
        self._max_snapshots = max_snapshots
        self._measure = measure
        #: Writes snapshots of rings, one after the other: the disk is shared with versions and checkpoints.
        self._followers = Threads(1, "ema-ring")

    def close(self) -> None:
        """Have no snapshot of a ring written any more."""
        self._followers.shutdown(cancel_futures=True)

    def built(
        self, config: RunConfig, layout: Layout, *, writer: int = 0, shard: ShardRow | None, created_at: float
    ) -> Registered:
        """A new run with all that it needs, on the disk as well. Raises StorageFailed, Overloaded."""
        if self._store is None:
            return self._made(config, layout, None, created_at, writer=writer)
        try:
            self._store.check_room(0)
            row = self._store.add_run(config.run, json.dumps(to_json(config)), created_at, writer, shard)
            with contextlib.ExitStack() as undo:
                undo.callback(self._store.remove_run, row)
                made = self._allocated(config, layout, row, created_at)
                if made.disk and made.disk.ring:
                    self._store.check_room(made.disk.ring.most_bytes)
                undo.pop_all()
        except (OSError, sqlite3.Error) as fault:
            raise StorageFailed(f"run {config.run!r} was not created: {fault}", retry_after=1.0) from fault
        return made

    def restored(self, row: RunRow) -> Registered:
        """The run of a row, with what storage has of it. Raises CatalogUnusable where the row is damaged."""
        setup = _setup_of(row)
        config, layout = setup.created, Layout(setup.config.layout, setup.config.copied)
        made = self._made(config, layout, row, row.created_at, setup=setup)
        if made.disk is None:
            return made
        try:
            found = _read_back(made.disk.versions)
        except Overloaded as fault:
            _log.warning("run %s: each version is written to disk: %s; %s", config.run, fault.detail, MORE_ROOM)
            made.disk.versions.free()
            made = self._made(config, layout, row, row.created_at, refusal=fault.detail, setup=setup)
            found = _read_back(made.disk.versions) if made.disk else Restored()
        made.take_up(found)
        self._restore_measurements(made.measurements, row)
        _restore_end(made)
        return made

    def _allocated(self, config: RunConfig, layout: Layout, row: RunRow, created_at: float) -> Registered:
        """The run with all the memory and disk space that its versions take. Raises OSError, Overloaded."""
        made = self._made(config, layout, row, created_at)
        if made.disk is None:
            return made
        try:
            made.disk.versions.allocate()
        except MemoryFilesUnusable as fault:
            _log.warning("run %s: each version is written to disk: %s; %s", config.run, fault, MORE_ROOM)
            made.disk.versions.free()
            made = self._made(config, layout, row, created_at, refusal=str(fault))
            if made.disk:
                made.disk.versions.allocate()
        return made

    def _made(
        self,
        config: RunConfig,
        layout: Layout,
        row: RunRow | None,
        created_at: float,
        *,
        refusal: str | None = None,
        writer: int = 0,
        setup: Setup | None = None,
    ) -> Registered:
        """config: of the run as it was created. setup: its averages by now; None: those of ``config``. refusal: why the
        run's versions can't lie in memory files. writer: of a run without a row."""
        shard = self._store.shard(row) if self._store and row else None
        whole = _whole(row, self._store.whole(row)) if self._store and row and shard else None
        measurements = Measurements(config.run, layout, _averaged(whole) if whole else None)
        noted = measurements if self._measure else None
        if self._store is None or row is None:
            run = Run(config, layout, self._memory, created_at=created_at, writer=writer, measurements=noted)
            timeline, sweeps = Timeline(config.run, None, None), Sweeps(config.run, None, None)
            return Registered(run, Parts(run), timeline, sweeps, measurements, None)
        versions, memory = self._versions(self._store, config, row, layout, shard, refusal=refusal, setup=setup)
        run = Run(
            config,
            layout,
            memory,
            versions,
            created_at=created_at,
            writer=row.writer,
            setup=setup,
            measurements=noted,
            shard=_told(shard, whole or config) if shard else None,
        )
        of = config, row, self._store, layout, memory
        snapshots = Snapshots(*of, run.changes.tell, most=self._max_snapshots, offload=self._offload)
        ring = synthesiser = None
        if config.posthoc:
            current, tell = (lambda: run.state), run.changes.tell
            kind = ShardRing if shard else StoredRing
            ring = kind(config, config.posthoc, *of[1:], self._followers, current, tell)
            run.ring = ring.told
            run.changes.tell_always(ring.moved)
            synthesiser = Synthesiser(run, config.posthoc, ring, snapshots)
        disk = Disk(row, self._store, versions, snapshots, ring)
        timeline, sweeps = Timeline(config.run, row, self._store), Sweeps(config.run, row, self._store)
        return Registered(run, Parts(run), timeline, sweeps, measurements, disk, synthesiser)

    def _versions(
        self,
        store: Store,
        config: RunConfig,
        row: RunRow,
        layout: Layout,
        shard: ShardRow | None,
        *,
        refusal: str | None,
        setup: Setup | None,
    ) -> tuple[Versions | MemoryVersions, Memory]:
        """What keeps the versions of a run, and the memory that they lie in. refusal, setup: as for _made()."""
        files, memory = store.memory_files, self._memory
        if files and not refusal and config.durability == "process":
            pool = FilePool(files, buffer_bytes(layout), memory_prefix(row), memory.pool)
            memory = memory.of_run(pool)
            in_memory = partial(ShardMemoryVersions, shard) if shard else MemoryVersions
            return in_memory(config, row, store, layout, memory, pool, files.nonce, setup=setup), memory
        why = (refusal or store.memory_fault) if config.durability == "process" else None
        on_disk = partial(ShardVersions, shard) if shard else Versions
        return on_disk(config, row, store, layout, memory, reason=why, setup=setup), memory

    def _restore_measurements(self, measurements: Measurements, row: RunRow) -> None:
        """Take up what was measured of a run. A file that is damaged is left out, and logged."""
        try:
            raw = self._store.measurements(row) if self._store else b""
            if raw:
                measurements.restore(StoredMeasurements.load(raw))
        except (OSError, ValueError) as fault:
            _log.warning("run %s: its measurements are gone: %s", row.name, fault)


def _restore_end(made: Registered) -> None:
    """Take up whether the training was said to be over, for people to read; a timeline that cannot be read, such as
    that of a damaged catalog, does not tell."""
    try:
        made.run.ledger.ended_at = made.timeline.ended_at()
    except sqlite3.Error as fault:
        _log.warning("run %s: its timeline cannot be read: %s", made.run.config.run, fault)


def _read_back(versions: Versions | MemoryVersions) -> Restored:
    """What storage has of a run. Where memory has no room for it: a fault that says so, with everything as it was.

    Raises Overloaded where there is no room in memory files.
    """
    try:
        return versions.restore()
    except Overloaded as fault:
        if isinstance(versions, MemoryVersions):
            raise
        return versions.leave(f"{fault.detail}; start the server with more memory, and --memory-limit")


def _setup_of(row: RunRow) -> Setup:
    """The configuration in a run's row, with its averages by now. Raises CatalogUnusable where the row is damaged."""
    try:
        return read_setup(from_json(RunConfig, json.loads(row.config)), row.averages)
    except ValueError as fault:
        raise _damaged(row, fault) from None


def _whole(row: RunRow, text: str) -> RunConfig | None:
    """The configuration of a whole run, of which a row has one shard; None where the shard was made alone. Raises
    CatalogUnusable where the row is damaged."""
    try:
        return from_json(RunConfig, json.loads(text)) if text else None
    except ValueError as fault:
        raise _damaged(row, fault) from None


def _averaged(config: RunConfig) -> list[str]:
    """The names of the averaged tensors."""
    copied = frozenset(config.copied)
    return [spec.name for spec in config.layout if spec.name not in copied]


def _told(shard: ShardRow, whole: RunConfig) -> ShardInfo:
    """What is told of a shard. whole: the configuration of the whole run."""
    return ShardInfo(shard.place, shard.of, shard.birth, len(whole.layout), len(frozenset(whole.copied)))


def _damaged(row: RunRow, fault: ValueError) -> CatalogUnusable:
    return CatalogUnusable(
        f"the catalog's row of run {row.name!r} is damaged: {fault}; restore the data dir from a backup"
    )
