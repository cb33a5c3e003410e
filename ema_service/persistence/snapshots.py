"""The snapshots of one run: named, immutable copies of all averages, as rows and safetensors files.

Knows how a state becomes a snapshot and how a snapshot is read back. Does not know how a file is made durable
(storage), how a run goes back to a snapshot (runs), or HTTP. Methods block: call them off the event loop.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ema_client.errors import (
    AverageNotFound,
    MalformedBody,
    RunNotFound,
    SnapshotDamaged,
    SnapshotExists,
    SnapshotNotFound,
    StorageDisabled,
    StorageFailed,
    TooManySnapshots,
)
from ema_client.protocol import RunConfig, SnapshotInfo, WeightsInfo, from_json, to_json
from ema_client.wire import Entry
from ema_service.averaging import Digest
from ema_service.bodies import WeightsStream
from ema_service.bodies.outgoing import ReadBytes
from ema_service.memory import Arena, Layout, Memory
from ema_service.persistence.cards import read_files
from ema_service.persistence.offload import Offload
from ema_service.persistence.restoring import read_arena
from ema_service.persistence.rows import descent_of
from ema_service.persistence.timeline import Timeline, told_snapshot, told_snapshot_gone
from ema_service.shadows.state import Average, Descent, Member, State, schedule_told
from ema_service.storage import ObjectGone, ObjectStoreFailed, RowChange, RunRow, SnapshotRow, Store, TensorFile
from ema_service.storage.store import Files

__all__ = ["Snapshots"]

_log = logging.getLogger(__name__)

#: Retry-After where the object store does not answer.
_STORE_SECONDS = 5.0
#: Seconds after which a snapshot that was begun, and never came to be there, makes room for another one.
_FORGOTTEN_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class _Kept:
    """A snapshot as its row tells of it. checksums, lineages: by name of the average; no lineage is an empty one.
    recovered: whether the snapshot is older than the catalog, so that its version may have the name of another one.
    begun: whether the snapshot is not there yet, for other hosts may lack it."""

    row: SnapshotRow
    info: SnapshotInfo
    checksums: Mapping[str, str]
    lineages: Mapping[str, str]
    recovered: bool
    begun: bool

    def has(self, member: Member, *, by_name: bool) -> bool:
        """Whether the snapshot has an average. by_name: or another of its name."""
        if member.name not in self.info.averages:
            return False
        return by_name or self.lineages.get(member.name, "") == member.lineage


class Snapshots:
    """The snapshots of one run. Thread-safe: one snapshot at a time is made or deleted.

    changes: grows with each snapshot that is made or deleted, so that a watcher knows when to look again.

    More than twenty methods: one for each way in which a snapshot is made, looked at and read, and their steps.
    """

    def __init__(
        self,
        config: RunConfig,
        row: RunRow,
        store: Store,
        layout: Layout,
        memory: Memory,
        tell: Callable[[], None] = lambda: None,
        *,
        most: int = sys.maxsize,
        offload: Offload | None = None,
    ) -> None:
        """config: of the run as it was created. tell: called, in any thread, after each change of the snapshots. most:
        how many there may be. offload: what moves them to an object store, None where they stay in the data dir."""
        self._config = config
        self._row = row
        self._store = store
        self._layout = layout
        self._memory = memory
        self._tell = tell
        self._most = most
        self._offload = offload
        self._timeline = Timeline(row.name, row, store)
        self.changes = 0
        self._closed = False
        self._lock = threading.Lock()

    def take(
        self, name: str, current: Callable[[], State], *, keep: int | None = None, key: str | None = None
    ) -> tuple[SnapshotInfo, bool]:
        """Copy all averages, as they are now, to a snapshot, and say whether the snapshot is new.

        current: gives the state of now, and raises where there is none. keep: of the snapshots whose names are the same
        up to the last "-", only so many, the newest, stay. key: of the call; a snapshot that the call has taken is its
        answer when the call comes again, whatever the run's version by then. Raises SnapshotExists where the name
        stands for another version, TooManySnapshots, StorageFailed, and what ``current`` raises.
        """
        with self._lock:
            state = current()
            if self._closed:
                raise RunNotFound(f"run {self._row.name!r} was deleted")
            found = self._kept()
            if name not in found:
                self._check_free(name, found)
                return self._make(name, state, keep, key), True
            existing = found[name].info
            if key is not None and _key_of(name, self._store.snapshots(self._row)) == key:
                return existing, False
            if existing.version != str(state.version) or existing.target is not None or found[name].recovered:
                of = f"version {existing.version}" if existing.target is None else existing.target
                of += ", recovered from the object store" if found[name].recovered else ""
                raise SnapshotExists(
                    f"snapshot {name!r} of run {self._row.name!r} is of {of}, the run is at {state.version}"
                )
            return existing, False

    def keep(
        self, name: str, source: Sequence[Entry], info: WeightsInfo, read: ReadBytes, *, key: str | None = None
    ) -> tuple[SnapshotInfo, bool]:
        """Write one average that was worked out elsewhere as a snapshot, and say whether the snapshot is new.

        source, read: its tensors, and what reads them. info: what is told of it. Raises SnapshotExists where the name
        stands for anything else, TooManySnapshots, StorageFailed.
        """
        with self._lock:
            if self._closed:
                raise RunNotFound(f"run {self._row.name!r} was deleted")
            if existing := self.kept_before(name, source, info, key):
                return existing, False
            self._check_free(name, self._found())
            made = replace(self._info_of(name, source, info), created_at=time.time())
            self._write_average(made, source, info, read, key)
            self._timeline.record(*told_snapshot(made))
            self._changed()
            return made, True

    def kept_before(
        self, name: str, source: Sequence[Entry], info: WeightsInfo, key: str | None
    ) -> SnapshotInfo | None:
        """The snapshot of this name, where the call of this key has taken it, or where it is of this very average; None
        where there is none of the name. source, info: as for keep(). Raises SnapshotExists for another one."""
        if (existing := self._found().get(name)) is None:
            return None
        same = replace(self._info_of(name, source, info), created_at=existing.created_at, stored=existing.stored)
        if existing != same and (key is None or _key_of(name, self._store.snapshots(self._row)) != key):
            raise SnapshotExists(f"snapshot {name!r} of run {self._row.name!r} is of something else")
        return existing

    # --- of a shard: all hosts have a snapshot, or none ---------------------------------------------------------------

    def check_free(self, name: str) -> None:
        """Whether a snapshot of this name may be taken. Raises SnapshotExists, TooManySnapshots."""
        found = self._found()
        if name in found:
            of = found[name].target or f"version {found[name].version}"
            raise SnapshotExists(f"snapshot {name!r} of run {self._row.name!r} is of {of} already")
        self._check_free(name, found)

    def taken_by(self, name: str, key: str) -> SnapshotInfo | None:
        """The snapshot of this name, where the call of this key has taken it; else None."""
        kept = self._kept().get(name)
        return kept.info if kept and _key_of(name, self._store.snapshots(self._row)) == key else None

    def taken(self, name: str, version: str, key: str) -> SnapshotInfo | None:
        """The snapshot that the call of this key has taken, or that has the averages of this very version; None where
        there is none of the name. Raises SnapshotExists for another one."""
        kept = self._kept().get(name)
        if kept is None:
            return None
        same = kept.info.version == version and kept.info.target is None and not kept.recovered
        if not same and self.taken_by(name, key) is None:
            self.check_free(name)
        return kept.info

    def series(self, name: str, keep: int | None) -> list[str]:
        """Which snapshots are to go once one of this name is there, of its series only ``keep``."""
        return self._oldest([*self._found(), name], name, keep)

    def prepare(self, name: str, state: State, *, created_at: float, key: str) -> None:
        """Write a snapshot that nobody finds before its row says so (prepared()). In place of one of its name that was
        written before and never shown; one that was, too, an hour ago goes. Raises StorageFailed, RunNotFound."""
        with self._preparing(name, created_at):
            info = replace(self._info(name, state), created_at=created_at)
            self._write(state, info, key, begun=True)

    def prepare_average(
        self, name: str, source: Sequence[Entry], info: WeightsInfo, read: ReadBytes, *, created_at: float, key: str
    ) -> None:
        """As prepare(), of one average that was worked out elsewhere. source, info, read: as for keep()."""
        with self._preparing(name, created_at):
            made = replace(self._info_of(name, source, info), created_at=created_at)
            self._write_average(made, source, info, read, key, begun=True)

    @contextlib.contextmanager
    def _preparing(self, name: str, created_at: float) -> Iterator[None]:
        """Within the block there is no snapshot of the name that was begun and never shown, nor another one of an hour
        ago."""
        with self._lock:
            if self._closed:
                raise RunNotFound(f"run {self._row.name!r} was deleted")
            for row in self._store.snapshots(self._row):
                said = json.loads(row.info)
                if said.get("begun") and (row.name == name or said["created_at"] < created_at - _FORGOTTEN_SECONDS):
                    self._store.remove_snapshot(self._row, row.name)
            yield

    def prepared(self, name: str, created_at: float, gone: Sequence[str]) -> RowChange:
        """The rows with which a snapshot is there that was written before, and ``gone`` are there no more. Raises
        SnapshotNotFound."""
        for row in self._store.snapshots(self._row):
            kept = _read_row(row)
            if row.name == name and kept.begun and kept.info.created_at == created_at:
                text = json.dumps({**json.loads(row.info), "begun": False})
                # The line of an average that was worked out names no step: it may be of a time long ago.
                line = told_snapshot(kept.info).line(kept.info if kept.info.target is None else None)
                return RowChange(shown=(name, text), gone=tuple(gone), line=line)
        raise _missing(self._row.name, name)

    def without(self, name: str, *, told: bool) -> RowChange:
        """The rows with which a snapshot is there no more. told: whether anybody found it before."""
        return RowChange(gone=(name,), line=told_snapshot_gone(name).line() if told else None)

    def shown(self, gone: Collection[str]) -> None:
        """A snapshot is there by its row; ``gone`` are there no more."""
        for old in gone:
            self._store.remove_snapshot_files(self._row, old)
        self._changed()

    def gone(self, name: str) -> None:
        """A snapshot is there no more, by its row."""
        self._store.remove_snapshot_files(self._row, name)
        self._changed()

    def lent(self) -> list[dict[str, Any]]:
        """The snapshots, for a host that is to have the same: name, text of the row, and by average the file's size.
        Raises StorageFailed where one cannot be read."""
        return [
            {"name": name, "text": kept.row.info, "files": self._sizes(kept)} for name, kept in self._kept().items()
        ]

    def _sizes(self, kept: _Kept) -> dict[str, int]:
        """By average, the bytes of a snapshot's file, wherever it lies. Raises StorageFailed."""
        try:
            if kept.row.files is not None:
                return {each: file.bytes for each, file in read_files(kept.row.files).items()}
            named = {each: self._store.snapshot_file(self._row, kept.info.name, each) for each in kept.info.averages}
            return {each: path.stat().st_size for each, path in named.items()}
        except FileNotFoundError as fault:
            now = self._kept().get(kept.info.name)
            if now and now.row.folder != kept.row.folder:  # moved meanwhile
                return self._sizes(now)
            raise _lends_none(kept.info, fault) from fault
        except OSError as fault:
            raise _lends_none(kept.info, fault) from fault

    def adopt(self, name: str, text: str, nbytes: int, files: Files) -> None:
        """Keep a snapshot that another host has lent, as lent() tells of it. nbytes: of its files, which are read
        unless this host's part of the object store has the snapshot. Raises StorageFailed, and what ``files`` raise."""
        found = self._offload.find(self._row, name, text) if self._offload else None
        with self._lock:
            if not (found and self._adopt_stored(name, text, *found)):
                self._save(name, nbytes, lambda: text, files)
            self._changed()

    def _adopt_stored(self, name: str, text: str, folder: str, files: str) -> bool:
        """Keep a snapshot that lies in the object store. False where it is being removed there. Raises
        StorageFailed."""
        try:
            return self._store.adopt_snapshot(SnapshotRow(self._row.id, name, text, time.time(), folder, files))
        except sqlite3.Error as fault:
            raise StorageFailed(f"snapshot {name!r} was not kept: {fault}", retry_after=1.0) from fault

    def drop(self, name: str) -> None:
        """Remove a snapshot that another host has no more. Raises StorageFailed."""
        try:
            with self._lock:
                self._store.remove_snapshot(self._row, name)
                self._changed()
        except sqlite3.Error as fault:
            raise StorageFailed(f"snapshot {name!r} was not removed: {fault}", retry_after=1.0) from fault

    def all(self) -> list[SnapshotInfo]:
        """All snapshots of the run, oldest first."""
        return list(self._found().values())

    def find(self, name: str, created_at: float | None = None) -> SnapshotInfo:
        """The snapshot of this name. created_at: as for delete(). Raises SnapshotNotFound."""
        info = _one(self._kept(), self._row.name, name).info
        if created_at not in (None, info.created_at):
            raise _missing(self._row.name, name)
        return info

    def open(self, name: str, average: str | None = None) -> tuple[TensorFile, WeightsInfo]:
        """The file of one average (the first by default), open for the caller to close.

        Raises SnapshotNotFound, AverageNotFound, SnapshotDamaged; of a snapshot in the object store StorageFailed where
        the store fails, Overloaded, and StorageDisabled where the server was started without the store.
        """
        return self._open(_one(self._kept(), self._row.name, name), average)

    def read(
        self, name: str, wanted: Sequence[Member], *, of: Snapshots | None = None
    ) -> tuple[SnapshotInfo, tuple[Average, ...], tuple[Arena, ...]]:
        """A snapshot with those averages of ``wanted`` that it has, read back into the run's memory.

        of: the snapshots of another run with the same shadows, whose averages are the wanted ones by their names. An
        average of this run that was removed, and added again under its name, is another.

        Raises as open(); AverageNotFound where the snapshot has none of them.
        """
        source = self if of is None else of
        with source._lock:  # nobody deletes a snapshot that is being read
            kept = _one(source._kept(), source._row.name, name)
            found = [member for member in wanted if kept.has(member, by_name=of is not None)]
            if not found:
                raise AverageNotFound(
                    f"snapshot {name!r} of run {source._row.name!r} has {', '.join(kept.info.averages)}, which are no "
                    f"averages of run {self._row.name!r} any more"
                )
            pairs = [source._read(kept, each, self._memory) for each in found]
        return kept.info, tuple(average for average, _ in pairs), tuple(arena for _, arena in pairs)

    def descent(self, info: SnapshotInfo) -> Descent:
        """Which versions led to that of a snapshot. Raises SnapshotNotFound where the snapshot is gone."""
        for row in self._store.snapshots(self._row):
            said = json.loads(row.info)
            if row.name == info.name and said["version"] == info.version:
                return descent_of(said.get("descent"))
        raise _missing(self._row.name, info.name)

    def following(self, info: SnapshotInfo) -> Descent:
        """The descent of a version that goes on from a snapshot in a later epoch. Raises as descent()."""
        epoch, n = map(int, info.version.split("."))
        return self.descent(info).followed(epoch, n, 0)

    def counter(self, info: SnapshotInfo, average: str) -> int:
        """The counter of an average of a snapshot. Raises as open()."""
        file, weights = self.open(info.name, average)
        file.close()
        return weights.num_updates

    def delete(self, name: str, created_at: float | None = None) -> None:
        """Delete a snapshot. A reader that has its files open reads on to the end.

        created_at: of the snapshot that is meant, which another of its name is not. Raises SnapshotNotFound.
        """
        with self._lock:
            self.find(name, created_at)
            self._store.remove_snapshot(self._row, name)
            self._timeline.record(*told_snapshot_gone(name))
            self._changed()

    def place(self, snapshot: SnapshotRow, folder: str, files: str) -> None:
        """Say that a snapshot lies in a folder of the object store, and give its room in the data dir back; nothing
        where the snapshot is gone. A reader that has its files open reads on to the end. Raises sqlite3.Error."""
        with self._lock:
            if not self._closed:
                self._store.place_snapshot(self._row, snapshot, folder, files)

    @property
    def last_epoch(self) -> int:
        """The largest epoch that a snapshot in the object store is of, 0 where there is none: a catalog that was lost
        does not know the run's."""
        kept = [each for each in self._kept().values() if each.row.folder]
        return max((int(each.info.version.partition(".")[0]) for each in kept), default=0)

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Within the block no snapshot is made or deleted; after it none ever, unless the block raised. Waits for one
        under way."""
        with self._lock:
            yield
            self._closed = True

    # --- making -----------------------------------------------------------------------------------------------------

    def _make(self, name: str, state: State, keep: int | None, key: str | None) -> SnapshotInfo:
        """Write a new snapshot and drop old ones of its series. Raises StorageFailed."""
        info = self._info(name, state)
        self._write(state, info, key)
        self._timeline.record(*told_snapshot(info), state.version)
        self._drop_oldest(name, keep)
        self._changed()
        return info

    def _check_free(self, name: str, others: Collection[str]) -> None:
        """Raises SnapshotExists where the files of another snapshot would be overwritten, TooManySnapshots."""
        same = [other for other in others if other.casefold() == name.casefold()]
        if same and self._store.folds_case:
            raise SnapshotExists(
                f"snapshot {same[0]!r} of run {self._row.name!r} has the same name but for its case, which the file "
                "system of the data dir does not tell apart"
            )
        if len(others) >= self._most:
            raise TooManySnapshots(f"run {self._row.name!r} has {len(others)} snapshots, and may have {self._most}")

    def _info(self, name: str, state: State) -> SnapshotInfo:
        version = state.version
        streams = [self._stream(state, average, name) for average in version.averages]
        return SnapshotInfo(
            run=self._row.name,
            name=name,
            version=str(version),
            step=version.step,
            num_updates=version.num_updates,
            averages=tuple(average.name for average in version.averages),
            bytes=sum(stream.length for stream in streams),
            created_at=time.time(),
        )

    def _write(self, state: State, info: SnapshotInfo, key: str | None, *, begun: bool = False) -> None:
        """Write one file for each average, then the row, which has the checksums of the files and the call's key.

        The state cannot change meanwhile. On a GPU, one average at a time is copied to the host. Readers' budgets are
        left alone: whether a snapshot can be taken must not depend on who reads. Raises StorageFailed.
        """
        checksums: dict[str, str] = {}
        lineages = {each.name: each.member.lineage for each in state.version.averages if each.member.lineage}
        files = {
            average.name: self._chunks(state, average, arena, info.name, checksums)
            for average, arena in zip(state.version.averages, state.arenas, strict=True)
        }
        said = {
            **to_json(info),
            "checksums": checksums,
            "lineages": lineages,
            "key": key,
            "descent": asdict(state.version.descent),
            **({"begun": True} if begun else {}),
        }
        self._save(info.name, info.bytes, lambda: json.dumps(said), files)

    def _info_of(self, name: str, source: Sequence[Entry], info: WeightsInfo) -> SnapshotInfo:
        """What is told of a snapshot of one average that was worked out elsewhere."""
        return SnapshotInfo(
            run=self._row.name,
            name=name,
            version=info.version,
            step=info.step,
            num_updates=info.num_updates,
            averages=(info.average,),
            bytes=WeightsStream(source, replace(info, snapshot=name)).length,
            created_at=0.0,
            target=info.target,
        )

    def _write_average(
        self,
        made: SnapshotInfo,
        source: Sequence[Entry],
        info: WeightsInfo,
        read: ReadBytes,
        key: str | None,
        *,
        begun: bool = False,
    ) -> None:
        """Write the file of one average that was worked out elsewhere, then the row. Raises StorageFailed."""
        stream = WeightsStream(source, replace(info, snapshot=made.name))
        said = {**to_json(made), "key": key, **({"begun": True} if begun else {})}
        self._save(made.name, made.bytes, lambda: json.dumps(said), {info.average: stream.chunks(read)})

    def _save(self, name: str, nbytes: int, text: Callable[[], str], files: Files) -> None:
        """Write files and row of a snapshot. text: gives the row's, once the files are written. Raises
        StorageFailed."""
        try:
            self._store.check_room(nbytes)
            self._store.save_snapshot(self._row, name, text, files)
        except (OSError, sqlite3.Error) as fault:
            raise StorageFailed(
                f"snapshot {name!r} of run {self._row.name!r} was not written: {fault}", retry_after=1.0
            ) from fault

    def _chunks(
        self, state: State, average: Average, arena: Arena, snapshot: str, checksums: dict[str, str]
    ) -> Iterator[memoryview]:
        """The chunks of one average's file. After the last one, ``checksums`` has the digest of the average."""
        host = self._memory.to_host(arena.data) if arena.twin is None else arena.twin
        data = host.data
        yield from self._stream(state, average, snapshot).chunks(lambda start, stop: data[start:stop])
        if arena.digest is None:
            whole = Digest()
            whole.update(data)
            arena.digest = whole.digest()
        checksums[average.name] = arena.digest.hex()

    def _stream(self, state: State, average: Average, snapshot: str) -> WeightsStream:
        info = replace(state.version.weights_info(self._config, average), snapshot=snapshot)
        return WeightsStream(self._layout.shadows, info)

    def _drop_oldest(self, name: str, keep: int | None) -> None:
        """Remove all but the newest ``keep`` snapshots of a series: of names that are the same up to the last "-".

        A name without a "-" is in no series: nothing is removed.
        """
        for old in self._oldest(list(self._found()), name, keep):
            try:
                self._store.remove_snapshot(self._row, old)
            except sqlite3.Error as fault:
                # The new snapshot is there; the next of the series tries again.
                _log.error("run %s: snapshot %s could not be removed: %s", self._row.name, old, fault)

    @staticmethod
    def _oldest(names: Sequence[str], name: str, keep: int | None) -> list[str]:
        """Of the series of ``name`` all but the newest ``keep``. names: of all snapshots, oldest first."""
        series, dash, _ = name.rpartition("-")
        same = [each for each in names if dash and each.rpartition("-")[:2] == (series, dash)]
        return same[:-keep] if keep else []

    def _changed(self) -> None:
        self.changes += 1
        self._tell()
        if self._offload:
            self._offload.wake()

    # --- reading ----------------------------------------------------------------------------------------------------

    def _found(self) -> dict[str, SnapshotInfo]:
        return {name: kept.info for name, kept in self._kept().items()}

    def _kept(self) -> dict[str, _Kept]:
        """By name, each snapshot with what its row says beside, oldest first."""
        found = {row.name: _read_row(row) for row in self._store.snapshots(self._row)}
        return {name: kept for name, kept in found.items() if not kept.begun}

    def _open(self, kept: _Kept, average: str | None) -> tuple[TensorFile, WeightsInfo]:
        info = kept.info
        chosen = info.averages[0] if average is None else average
        if chosen not in info.averages:
            raise AverageNotFound(
                f"snapshot {info.name!r} of run {info.run!r} has no average {chosen!r}; it has "
                f"{', '.join(info.averages)}"
            )
        file = self._opened(kept, chosen)
        weights = WeightsInfo.from_metadata(dict(file.header.metadata))
        if info.target is None and chosen not in kept.lineages:
            # The run was created with the average: a file of an earlier server does not name the schedule.
            weights = replace(weights, **schedule_told(self._config.average(chosen)))
        return file, weights

    def _opened(self, kept: _Kept, average: str) -> TensorFile:
        """The file of an average, wherever it lies.

        Raises SnapshotNotFound, SnapshotDamaged, StorageDisabled, StorageFailed, Overloaded.
        """
        try:
            if kept.row.folder is None:
                return self._store.open_snapshot(self._row, kept.info.name, average)
            if self._offload is None:
                raise StorageDisabled(
                    f"snapshot {kept.info.name!r} of run {kept.info.run!r} lies in an object store, and this server "
                    "was started without one",
                    hint="start the server with the --snapshot-store that it had",
                )
            return self._offload.open(kept.row, average)
        except (FileNotFoundError, ObjectGone) as fault:
            now = _one(self._kept(), self._row.name, kept.info.name)
            if now.row.folder != kept.row.folder:  # moved meanwhile
                return self._opened(now, average)
            raise _damaged(kept.info, fault) from fault
        except (OSError, MalformedBody) as fault:
            raise _unread(kept.info, fault) from fault

    def _read(self, kept: _Kept, member: Member, memory: Memory) -> tuple[Average, Arena]:
        file, weights = self._open(kept, member.name)
        try:
            arena = read_arena(file, self._layout, memory, kept.checksums.get(member.name))
        except (OSError, MalformedBody) as fault:
            raise _unread(kept.info, fault) from fault
        finally:
            file.close()
        return Average(member, weights.decay, None, weights.num_updates), arena


def _key_of(name: str, rows: list[SnapshotRow]) -> str | None:
    """The key of the call that took a snapshot, None where the call had none."""
    found: list[str | None] = [json.loads(row.info).get("key") for row in rows if row.name == name]
    return found[0] if found else None


def _one(found: Mapping[str, _Kept], run: str, name: str) -> _Kept:
    """The snapshot of this name. Raises SnapshotNotFound."""
    if name not in found:
        raise _missing(run, name)
    return found[name]


def _missing(run: str, name: str) -> SnapshotNotFound:
    return SnapshotNotFound(f"run {run!r} has no snapshot {name!r}")


def _read_row(row: SnapshotRow) -> _Kept:
    said = json.loads(row.info)
    info = replace(from_json(SnapshotInfo, said), stored="local" if row.folder is None else "store")
    # Rows of format 1 have no checksums, those before format 6 no lineages.
    return _Kept(
        row,
        info,
        said.get("checksums", {}),
        said.get("lineages", {}),
        said.get("recovered", False),
        said.get("begun", False),
    )


def _lends_none(info: SnapshotInfo, fault: OSError) -> StorageFailed:
    return StorageFailed(f"snapshot {info.name!r} of run {info.run!r} cannot be lent: {fault}")


def _unread(info: SnapshotInfo, fault: Exception) -> StorageFailed | SnapshotDamaged:
    """What is told where a snapshot's file could not be read: a store that does not answer has damaged nothing."""
    if isinstance(fault, ObjectStoreFailed) and not isinstance(fault, ObjectGone):
        return StorageFailed(
            f"snapshot {info.name!r} of run {info.run!r} lies in an object store that failed: {fault}",
            hint="have the server reach its --snapshot-store, and come again; the snapshot is there",
            retry_after=_STORE_SECONDS,
        )
    return _damaged(info, fault)


def _damaged(info: SnapshotInfo, fault: Exception) -> SnapshotDamaged:
    hint = None if info.stored == "local" else "restore the object in the snapshot store, or delete the snapshot"
    return SnapshotDamaged(f"snapshot {info.name!r} of run {info.run!r} cannot be read: {fault}", hint=hint)
