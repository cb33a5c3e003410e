"""One run on disk: its checkpoints (see there), its snapshots, its history.

Knows how a snapshot becomes rows and safetensors files, and what may be kept when. Does not know how a file is made
durable (storage), how an update is decided (run), or HTTP. Its methods block: call them off the event loop.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

from ema_client.errors import MalformedBody, SnapshotDamaged, SnapshotExists, SnapshotNotFound, StorageFailed
from ema_client.protocol import SnapshotInfo, WeightsInfo, from_json, to_json
from ema_service.averaging import Digest
from ema_service.bodies.outgoing import WeightsStream
from ema_service.memory.arena import Memory
from ema_service.runs.checkpoints import Checkpoints, read_arena
from ema_service.runs.run import Average, Run, State
from ema_service.storage import RunRow, Store, TensorFile

__all__ = ["RunFiles"]

_log = logging.getLogger(__name__)


class RunFiles:
    """What the store keeps of one run. Thread-safe: one thing at a time is written or removed."""

    def __init__(self, run: Run, row: RunRow, store: Store, memory: Memory) -> None:
        self._run = run
        self._row = row
        self._store = store
        self._memory = memory
        self._checkpoints = Checkpoints(run, row, store, memory)
        self._lock = threading.Lock()
        self._removed = False
        #: Grows with each snapshot that is made or deleted, so that a watcher knows when to look again.
        self.snapshots_changed = 0

    def record(self, event: str) -> None:
        """Add a line to the run's history. A failure is logged: what the line tells of has happened all the same."""
        try:
            self._store.record(self._row, event)
        except sqlite3.Error as fault:
            _log.error("run %s: %s; not noted in its history: %s", self._row.name, event, fault)

    def remove(self) -> None:
        """Remove everything of the run from the store."""
        with self._lock:
            self._removed = True
            self._store.remove_run(self._row)

    def keep_writer(self, writer: int) -> None:
        """Remember the number of the writer that attached last. Raises StorageFailed."""
        try:
            self._store.set_writer(self._row, writer)
        except sqlite3.Error as fault:
            raise StorageFailed(
                f"the writer of run {self._row.name!r} could not be kept: {fault}", retry_after=1.0
            ) from fault

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def allocate(self) -> None:
        """Take the disk space that the run will need. Raises OSError."""
        self._checkpoints.allocate()

    def restore(self) -> None:
        """Bring the run back, as Checkpoints.restore()."""
        self._checkpoints.restore()

    @property
    def unsynced(self) -> bool:
        """Whether sync() has something to do."""
        return self._checkpoints.unsynced

    def sync(self) -> None:
        """Bring the newest version to the medium, as Checkpoints.sync()."""
        self._checkpoints.sync()

    def checkpoint(self, *, final: bool = False) -> None:
        """Take a checkpoint where one is due, as Checkpoints.save()."""
        with self._lock:
            if not self._removed:
                self._checkpoints.save(final=final)

    # --- snapshots --------------------------------------------------------------------------------------------------

    def snapshot(self, name: str, *, keep: int | None = None) -> tuple[SnapshotInfo, bool]:
        """Keep all averages as they are now under ``name``, and say whether that is new.

        keep: of the snapshots whose names are the same up to the last "-", only so many, the newest, stay.
        Raises SnapshotExists where the name stands for another version, AwaitingWeights, StorageFailed.
        """
        with self._lock:
            state = self._run.ready_state()
            existing = self._snapshots().get(name)
            if existing is None:
                info = self._snapshot_info(state, name)
                try:
                    self._write(state, info)
                    self._drop_oldest(name, keep)
                except (OSError, sqlite3.Error) as fault:
                    raise StorageFailed(
                        f"snapshot {name!r} of run {self._row.name!r} was not written: {fault}", retry_after=1.0
                    ) from fault
                self._tell_of_snapshots()
                return info, True
            if existing.version != state.version:
                raise SnapshotExists(
                    f"snapshot {name!r} of run {self._row.name!r} is of version {existing.version}, "
                    f"the run is at {state.version}"
                )
            return existing, False

    def snapshots(self) -> list[SnapshotInfo]:
        """Oldest first."""
        return list(self._snapshots().values())

    def find_snapshot(self, name: str) -> SnapshotInfo:
        """Raises SnapshotNotFound."""
        found = self._snapshots().get(name)
        if found is None:
            raise self._no_snapshot(name)
        return found

    def open_snapshot(self, name: str, average: str | None) -> tuple[TensorFile, WeightsInfo]:
        """The file of one average (by default the first), open: the caller closes it.

        Raises SnapshotNotFound, AverageNotFound, SnapshotDamaged.
        """
        info = self.find_snapshot(name)
        chosen = info.averages[0] if average is None else self._run.known_average(average)
        try:
            file = self._store.open_snapshot(self._row, name, chosen)
        except (OSError, MalformedBody) as fault:
            raise self._damaged(name, fault) from fault
        return file, WeightsInfo.from_metadata(dict(file.header.metadata))

    def rewind(self, name: str) -> None:
        """Go back to a snapshot; it outlives a crash from when this returns, whatever the run's durability.

        Raises SnapshotNotFound, SnapshotDamaged, RunNotFound; StorageFailed where it would not outlive one: the run may
        be at the snapshot all the same, and the rewinding can be repeated.
        """
        with self._lock:
            info, checksums = self._snapshots_with_checksums().get(name, (None, {}))
            if info is None:
                raise self._no_snapshot(name)
            averages = tuple(self._read_average(info, each, checksums) for each in info.averages)
            self._run.rewind(averages, info)
            self._checkpoints.keep()
            self._checkpoints.sync()
            self.record(f"rewound to snapshot {name} (version {info.version}, step {info.step})")

    def accept(self) -> None:
        """Go on with the version that is there. Raises as Run.accept(), and StorageFailed as rewind()."""
        with self._lock:
            self._run.accept()
            self._checkpoints.keep()
        self.record("the version that is there was accepted")

    def delete_snapshot(self, name: str) -> None:
        """Raises SnapshotNotFound. Whoever reads it reads on to its end."""
        with self._lock:
            self.find_snapshot(name)
            self._store.remove_snapshot(self._row, name)
            self._tell_of_snapshots()

    def _tell_of_snapshots(self) -> None:
        self.snapshots_changed += 1
        self._run.notify()

    def _snapshots(self) -> dict[str, SnapshotInfo]:
        return {name: info for name, (info, _) in self._snapshots_with_checksums().items()}

    def _snapshots_with_checksums(self) -> dict[str, tuple[SnapshotInfo, dict[str, str]]]:
        texts = {row.name: json.loads(row.info) for row in self._store.snapshots(self._row)}
        # Format 1 had no checksums.
        return {name: (from_json(SnapshotInfo, text), text.get("checksums", {})) for name, text in texts.items()}

    def _drop_oldest(self, name: str, keep: int | None) -> None:
        series = name.rpartition("-")[0]
        names = [each for each in self._snapshots() if each.rpartition("-")[0] == series]
        for old in names[:-keep] if keep else ():
            self._store.remove_snapshot(self._row, old)

    def _no_snapshot(self, name: str) -> SnapshotNotFound:
        return SnapshotNotFound(f"run {self._row.name!r} has no snapshot {name!r}")

    def _damaged(self, name: str, fault: Exception) -> SnapshotDamaged:
        return SnapshotDamaged(f"snapshot {name!r} of run {self._row.name!r} cannot be read: {fault}")

    def _read_average(self, info: SnapshotInfo, name: str, checksums: dict[str, str]) -> Average:
        file, weights = self.open_snapshot(info.name, name)
        try:
            arena = read_arena(file, self._run.layout, self._memory, checksums.get(name))
        except (OSError, MalformedBody) as fault:
            raise self._damaged(info.name, fault) from fault
        finally:
            file.close()
        return Average(name, weights.decay, None, arena)

    def _snapshot_info(self, state: State, name: str) -> SnapshotInfo:
        streams = [self._stream(state, average, name) for average in state.averages]
        return SnapshotInfo(
            run=self._row.name,
            name=name,
            version=state.version,
            step=state.step,
            num_updates=state.num_updates,
            averages=tuple(average.name for average in state.averages),
            bytes=sum(stream.length for stream in streams),
            created_at=time.time(),
        )

    # ----------------------------------------------------------------------------------------------------------------

    def _write(self, state: State, info: SnapshotInfo) -> None:
        """Write the files of a state, one for each average, then the row, which has their checksums.

        The state cannot change meanwhile; on a GPU, one average at a time is copied to the host. Readers' budgets are
        left alone: what is kept must not depend on who reads.
        """
        checksums: dict[str, str] = {}
        files = {average.name: self._chunks(state, average, info.name, checksums) for average in state.averages}
        self._store.save_snapshot(
            self._row, info.name, lambda: json.dumps({**to_json(info), "checksums": checksums}), files
        )

    def _chunks(self, state: State, average: Average, snapshot: str, checksums: dict[str, str]) -> Iterator[memoryview]:
        data = self._memory.to_host(average.arena.tensor).numpy().data
        yield from self._stream(state, average, snapshot).chunks(lambda start, stop: data[start:stop])
        digest = average.arena.digest
        if digest is None:
            whole = Digest()
            whole.update(data)
            digest = average.arena.digest = whole.digest()
        checksums[average.name] = digest.hex()

    def _stream(self, state: State, average: Average, snapshot: str | None) -> WeightsStream:
        info = replace(self._run.weights_info(state, average), snapshot=snapshot)
        return WeightsStream(self._run.layout.shadows, info)
