"""One run on disk: its checkpoint, its snapshots, its history, and the way back into memory.

Knows how a state becomes rows and safetensors files and back, and what may be kept when. Does not know how a file
is made durable (storage), how an update is decided (run), or HTTP. Its methods block: call them off the event loop.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from ema_client.errors import MalformedBody, SnapshotDamaged, SnapshotExists, SnapshotNotFound, StorageFailed
from ema_client.protocol import SnapshotInfo, WeightsInfo, from_json, to_json
from ema_service.runs.arena import Arena, Memory
from ema_service.runs.layout import Layout
from ema_service.runs.run import Average, Run, State
from ema_service.runs.weights import WeightsStream
from ema_service.storage import CheckpointRow, RunRow, Store, TensorFile
from ema_service.storage.store import Files

__all__ = ["RunFiles"]

_log = logging.getLogger(__name__)


class RunFiles:
    """What the store keeps of one run. Thread-safe: one thing at a time is written or removed."""

    def __init__(self, run: Run, row: RunRow, store: Store, memory: Memory) -> None:
        self._run = run
        self._row = row
        self._store = store
        self._memory = memory
        self._lock = threading.Lock()
        self._saved: State | None = None
        self._removed = False
        #: Grows with each snapshot that is made or deleted, so that a watcher knows when to look again.
        self.snapshots_changed = 0

    def record(self, event: str) -> None:
        """Add a line to the run's history."""
        self._store.record(self._row, event)

    def remove(self) -> None:
        """Remove everything of the run from the store."""
        with self._lock:
            self._removed = True
            self._store.remove_run(self._row)

    # --- checkpoint -------------------------------------------------------------------------------------------------

    def checkpoint(self, *, final: bool = False) -> None:
        """Keep the current state if it moved since the last time; ``durable_step`` says what a restart brings back.

        final: nothing will be applied after it, so that the versions may go on from here when the run comes back.
        A failure is logged, makes the run ``degraded`` and leaves the checkpoint before; the next call tries again.
        """
        with self._lock:
            state = self._run.state
            if state is None or self._run.fault or self._removed:
                return
            try:
                self._save(state, final=final)
            except (OSError, sqlite3.Error) as fault:
                self._run.unkept = f"version {state.version} could not be kept: {fault}"
                _log.error("run %s: %s", self._row.name, self._run.unkept)
                return
            self._run.unkept = None
            self._saved, self._run.durable_step = state, state.step

    def restore(self) -> None:
        """Bring the run back from its checkpoint, if it has one; if that is damaged the run is ``degraded``."""
        checkpoint = self._store.checkpoint(self._row)
        if checkpoint is None:
            return
        try:
            state = self._read_state(checkpoint)
        except (OSError, MalformedBody) as fault:
            self._run.fault = f"its checkpoint of {time.ctime(checkpoint.created_at)} cannot be read: {fault}"
            _log.error("run %s is degraded: %s", self._row.name, self._run.fault)
            return
        self._run.restore(state)
        self._saved = state
        # From here on the checkpoint may be followed by updates that a crash would lose.
        self._store.amend_checkpoint(self._row, self._dump(state, final=False))

    def _save(self, state: State, *, final: bool) -> None:
        if state is not self._saved:
            text = self._dump(state, final=final)
            self._write(state, None, lambda files: self._store.save_checkpoint(self._row, text, files))
        elif final:
            self._store.amend_checkpoint(self._row, self._dump(state, final=final))

    def _read_state(self, checkpoint: CheckpointRow) -> State:
        stored = json.loads(checkpoint.state)
        if stored["final"]:
            self._run.lineage = stored["lineage"]
        averages = [
            Average(a["name"], a["decay"], a["effective_decay"], self._read_arena(checkpoint, a["name"]))
            for a in stored["averages"]
        ]
        return State(
            # Updates after an earlier checkpoint were seen by readers and are gone: their versions must not come again.
            epoch=stored["epoch"] + (0 if stored["final"] else 1),
            n=stored["n"],
            step=stored["step"],
            num_updates=stored["num_updates"],
            digest=bytes.fromhex(stored["digest"]),
            averages=tuple(averages),
            updated_at=stored["updated_at"],
        )

    def _dump(self, state: State, *, final: bool) -> str:
        return json.dumps(
            {
                "lineage": self._run.lineage,
                "epoch": state.epoch,
                "n": state.n,
                "step": state.step,
                "num_updates": state.num_updates,
                "digest": state.digest.hex(),
                "updated_at": state.updated_at,
                "final": final,
                "averages": [
                    {"name": a.name, "decay": a.decay, "effective_decay": a.effective_decay} for a in state.averages
                ],
            }
        )

    def _read_arena(self, checkpoint: CheckpointRow, average: str) -> Arena:
        layout = self._run.layout
        file = self._store.open_checkpoint(self._row, checkpoint, average)
        try:
            _check_same(layout, file)
            host = self._memory.pool.lend(layout.shadow_bytes)
            file.read_into(host.numpy().data)
        finally:
            file.close()
        return Arena(layout, self._on_device(host))

    def _on_device(self, host: Tensor) -> Tensor:
        return host if self._memory.on_host else host.to(self._memory.device)

    # --- snapshots --------------------------------------------------------------------------------------------------

    def snapshot(self, name: str) -> tuple[SnapshotInfo, bool]:
        """Keep all averages as they are now under ``name``, and say whether that is new.

        Raises SnapshotExists where the name stands for another version, AwaitingWeights, StorageFailed.
        """
        with self._lock:
            state = self._run.ready_state()
            existing = self._snapshots().get(name)
            if existing is None:
                info = self._snapshot_info(state, name)
                text = json.dumps(to_json(info))
                try:
                    self._write(state, name, lambda files: self._store.save_snapshot(self._row, name, text, files))
                except OSError as fault:
                    raise StorageFailed(
                        f"snapshot {name!r} of run {self._row.name!r} was not written: {fault}"
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
            raise SnapshotNotFound(f"run {self._row.name!r} has no snapshot {name!r}")
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
            raise SnapshotDamaged(f"snapshot {name!r} of run {self._row.name!r} cannot be read: {fault}") from fault
        return file, WeightsInfo.from_metadata(dict(file.header.metadata))

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
        return {row.name: from_json(SnapshotInfo, json.loads(row.info)) for row in self._store.snapshots(self._row)}

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

    def _write(self, state: State, snapshot: str | None, save: Callable[[Files], None]) -> None:
        """Hand the files of a state to ``save``, one for each average.

        The state cannot change meanwhile; on a GPU, one average at a time is copied to the host. Readers' budgets are
        left alone: what is kept must not depend on who reads.
        """
        save({average.name: self._chunks(state, average, snapshot) for average in state.averages})

    def _chunks(self, state: State, average: Average, snapshot: str | None) -> Iterator[memoryview]:
        data = self._memory.to_host(average.arena.tensor).numpy().data
        yield from self._stream(state, average, snapshot).chunks(lambda start, stop: data[start:stop])

    def _stream(self, state: State, average: Average, snapshot: str | None) -> WeightsStream:
        info = replace(self._run.weights_info(state, average), snapshot=snapshot)
        return WeightsStream(self._run.layout.shadows, info)


def _check_same(layout: Layout, file: TensorFile) -> None:
    if file.header.entries != layout.shadows:
        raise MalformedBody("its tensors are not those of the run's layout")
