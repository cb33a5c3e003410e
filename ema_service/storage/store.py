"""The store: one data folder, its lock, its catalog, and the files of each run.

    data-dir/
        lock                     held while a server runs
        catalog.db               what counts
        runs/<name>.<id>/        by the id, a run that was deleted and created again has another folder
            slots/<k>/<average>.safetensors        (format 1 had checkpoint-{a,b}, which are slots since)
            snapshots/<name>/<average>.safetensors
            ring/<version>/<average>.safetensors
            measurements                           what charts are drawn of; no version needs it
        runs/-deleted.<id>/      of a run that was deleted, while its files are being removed

Knows where files lie and in which order file, row and removal must happen so that a crash between any two leaves either
the old or the new. Does not know torch, updates, or when something is due. Safe for several threads, one per run.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from ema_service.storage.catalog import (
    MEMORY,
    Catalog,
    CatalogUnusable,
    CheckpointRow,
    RowChange,
    RunRow,
    ShardRow,
    Shelf,
    SnapshotRow,
    SweepRow,
    TimelineRow,
)
from ema_service.storage.files import (
    FolderLock,
    TensorFile,
    file_name,
    refuse_link,
    remove_tree,
    sync_folder,
    write_whole,
)
from ema_service.storage.memory_files import MemoryFiles, MemoryFilesUnusable
from ema_service.storage.mounts import FileSystem, file_system
from ema_service.storage.slot_files import Extent
from ema_service.storage.slots import Slots
from ema_service.storage.space import DiskSpace, bytes_below, disk_space
from ema_service.threads import Threads

__all__ = ["Files", "Store", "memory_prefix", "open_store"]

_log = logging.getLogger(__name__)

#: Threads that write versions behind their computation; most of the time they wait for the disk.
_WRITE_THREADS = 4

#: By name of the average, the chunks of its file.
Files = Mapping[str, Iterable[bytes | memoryview]]

#: The file of a run's measurements.
_MEASUREMENTS = "measurements"
#: Folders of a run, each a table of the catalog.
_SHELVES: tuple[Shelf, ...] = "snapshots", "ring"
_RUN_FOLDER = re.compile(r".+\.(\d+)", re.ASCII)
#: In place of a run's name, of a folder that is being removed; no run has the name (protocol.NAME_PATTERN).
_DELETED = "-deleted"
#: The folders that checkpoints of a run alternated between in format 1.
_OLD_FOLDERS = ("checkpoint-a", "checkpoint-b")


def memory_prefix(row: RunRow) -> str:
    """What the names of a run's memory files begin with."""
    return f"{row.id}."


def open_store(folder: Path, ram_dir: Path | None = None, *, lease: float = 0.0, first: int = 1) -> Store:
    """The store of a data dir, with its memory files.

    To be opened before any memory is taken: it frees memory that an earlier server left and no run comes back for.
    lease, first: as in FolderLock. Raises FolderLocked, CatalogUnusable, OSError, sqlite3.Error.
    """
    with contextlib.ExitStack() as undo:
        store = Store(folder, lease=lease, first=first)
        undo.callback(store.close)
        store.use_memory_files(ram_dir)
        undo.pop_all()
    return store


class Store:
    """Everything a server keeps on disk. The caller checks names (protocol.NAME_PATTERN).

    More than twenty methods: one for each thing that is written, read or removed, in an order that outlives a crash.
    """

    def __init__(self, folder: Path, *, lease: float = 0.0, first: int = 1) -> None:
        """Open or make the data folder. lease, first: as in FolderLock. Raises FolderLocked, CatalogUnusable, OSError,
        sqlite3.Error."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        mounted = file_system(folder)
        self._lock = FolderLock(folder, mounted, lease=lease, first=first)
        #: Whether names that differ by case alone are one file here, as on the disks of most Macs.
        self.folds_case = self._lock.path.with_name(self._lock.path.name.upper()).exists()
        self._writers = Threads(_WRITE_THREADS, "ema-write")
        self._runs = folder / "runs"
        #: What the data dir lies on.
        self.mounted = mounted
        #: Bytes of the disk that callers of taking() have not taken yet, or not all, and who may change the number.
        self._promised = 0
        self._promising = threading.Lock()
        #: Memory that outlives the process, once use_memory_files() found some; and why it found none.
        self.memory_files: MemoryFiles | None = None
        self.memory_fault: str | None = None
        with contextlib.ExitStack() as undo:
            undo.callback(self._lock.release)
            self._catalog = self._open_catalog(folder / "catalog.db", mounted)
            undo.pop_all()
            undo.callback(self.close)
            self._runs.mkdir(exist_ok=True)
            self._sweep()
            undo.pop_all()

    def use_memory_files(self, ram_dir: Path | None = None) -> None:
        """Open the memory files of this data dir, and free those that no run comes back for.

        ram_dir: None for a folder of this user's own in shared memory. Where there is no such memory, ``memory_fault``
        says why. Raises sqlite3.Error.
        """
        prefixes = tuple(memory_prefix(row) for row in self._catalog.runs())
        try:
            files = MemoryFiles(self._folder, ram_dir)
        except MemoryFilesUnusable as fault:
            self.memory_fault = str(fault)
            _log.warning("versions are written to disk as they come: %s", fault)
            return
        files.sweep({name for name in files.names() if name.startswith(prefixes)} if prefixes else ())
        self.memory_files = files

    def close(self) -> None:
        """Finish the writes in hand, close the catalog, release the folder's lock."""
        if self.memory_files:
            self.memory_files.close()
        self._writers.shutdown()
        self._catalog.close()
        self._lock.release()

    @property
    def number(self) -> int:
        """Of this server among those that had the data dir: larger than that of every earlier one."""
        return self._lock.number

    def taken_over(self) -> bool:
        """Whether a later server has the data dir, which no lock kept out: this one has to end."""
        return self._lock.taken_over()

    # --- runs -------------------------------------------------------------------------------------------------------

    def runs(self) -> list[RunRow]:
        """All runs, oldest first."""
        return self._catalog.runs()

    def add_run(
        self, name: str, config: str, created_at: float, writer: int = 0, shard: ShardRow | None = None
    ) -> RunRow:
        """Add a run that nobody has: its row, then its folder. Raises OSError, sqlite3.Error.

        writer: the largest number that a trainer may have of a run of this name. shard: of a run on several hosts.
        """
        try:
            row = self._catalog.add_run(name, config, created_at, writer, shard)
        except sqlite3.IntegrityError:
            # The row of a run that could not be made, and that could not be removed then.
            self._catalog.remove_named(name)
            row = self._catalog.add_run(name, config, created_at, writer, shard)
        folder = self._run_folder(row)
        if folder.is_symlink():
            folder.unlink()  # planted before the run was made: it is not the run's
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self._runs)
        return row

    def be_host(self, place: tuple[int, int] | None) -> None:
        """Be the data dir of a host of a cluster, the how manieth of how many; None: of a server that decides alone.

        Raises CatalogUnusable where this is the data dir of another, sqlite3.Error.
        """
        found = self._catalog.directory()
        if place is None and found:
            raise CatalogUnusable(
                f"{self._folder} belongs to host {found.place} of {found.of} of a cluster: start its server with "
                f"--shard {found.place}/{found.of}, or use another --data-dir"
            )
        if place is None or (found and (found.place, found.of) == place):
            return
        if found:
            raise CatalogUnusable(
                f"{self._folder} belongs to host {found.place} of {found.of}, not {place[0]} of {place[1]}: give "
                f"--shard {found.place}/{found.of}, or use another --data-dir"
            )
        if self._catalog.runs():
            raise CatalogUnusable(
                f"{self._folder} has runs of a server that was no host of a cluster: use another --data-dir with "
                "--shard"
            )
        self._catalog.open_directory(*place)

    def directory(self) -> ShardRow | None:
        """What this host has of the directory of its cluster's runs; None where the server is no host. Raises
        sqlite3.Error."""
        return self._catalog.directory()

    def keep_directory(self, record: str, gone: RunRow | None = None) -> None:
        """Replace the directory's record. gone: a run that there is no more, by the record; remove_files() then.
        Raises sqlite3.Error, and then both are as they were."""
        self._catalog.keep_directory(record, gone.id if gone else None)

    def remove_run(self, row: RunRow) -> None:
        """Remove a run: its row first, so that a crash in between leaves files without a row, never a row without
        files."""
        self.forget_run(row)
        self.remove_files(row)

    def forget_run(self, row: RunRow) -> None:
        """Remove the row of a run: from here on there is no such run. Raises sqlite3.Error, and then the run is as it
        was."""
        self._catalog.remove_run(row.id)

    def remove_files(self, row: RunRow) -> None:
        """Remove the files of a run whose row is gone.

        The run's folder loses its name first, in one step. Whoever is still writing to the run finds no folder from
        then on and makes none (_write_files, SlotFiles.open), so nothing is added to what is being removed.
        """
        folder = self._run_folder(row)
        with contextlib.suppress(OSError):  # removed by hand; or of a disk that takes no change, which is told next
            folder = folder.rename(self._runs / f"{_DELETED}.{row.id}")
        remove_tree(folder)

    def check_room(self, nbytes: int) -> None:
        """Raises OSError where ``nbytes`` more would leave the disk with less than updates and the catalog may need."""
        disk = self.space()
        if disk.free - nbytes < disk.floor:
            raise OSError(
                errno.ENOSPC,
                f"{self._folder} has {disk.free} bytes free; with {nbytes} more, fewer would be left than {disk.floor}",
            )

    @contextlib.contextmanager
    def taking(self, nbytes: int) -> Iterator[None]:
        """Within the block the caller takes ``nbytes`` of the disk, which are promised to nobody else meanwhile.

        Raises OSError as check_room(), also where what others are taking leaves no room.
        """
        with self._promising:
            self.check_room(self._promised + nbytes)
            self._promised += nbytes
        try:
            yield
        finally:
            with self._promising:
                self._promised -= nbytes

    def space(self) -> DiskSpace:
        """The room of the data dir's disk. Raises OSError."""
        return disk_space(self._folder)

    def used_bytes(self) -> int:
        """What the data dir takes of its disk."""
        return bytes_below(self._folder)

    def set_writer(self, row: RunRow, writer: int) -> None:
        """Remember the number of the writer that attached last. Raises sqlite3.Error."""
        self._catalog.set_writer(row.id, writer)

    def set_averages(self, row: RunRow, averages: str) -> None:
        """Say which averages the run has from now on. Raises sqlite3.Error."""
        self._catalog.set_averages(row.id, averages)

    def record(self, row: RunRow, line: TimelineRow) -> None:
        """Add a line to the run's timeline. Raises sqlite3.Error."""
        self._catalog.add_line(row.id, line)

    def timeline(self, row: RunRow, since: float, most: int) -> list[TimelineRow]:
        """The newest lines of the run's timeline that are later than ``since``, at most so many, in order. Raises
        sqlite3.Error."""
        return self._catalog.timeline(row.id, since, most)

    def add_sweep(self, row: RunRow, sweep: SweepRow) -> None:
        """Add a sweep to the run, in place of a sweep of its key; the oldest of too many goes.

        Raises sqlite3.Error; sqlite3.IntegrityError where the run is gone.
        """
        self._catalog.add_sweep(row.id, sweep)

    def sweeps(self, row: RunRow) -> list[SweepRow]:
        """The run's sweeps, the newest last. Raises sqlite3.Error."""
        return self._catalog.sweeps(row.id)

    # --- measurements -----------------------------------------------------------------------------------------------

    def put_measurements(self, row: RunRow, data: bytes) -> None:
        """Keep a run's measurements, in place of those before. Raises OSError, also where updates may need the room."""
        refuse_link(self._run_folder(row), _MEASUREMENTS)
        self.check_room(len(data))
        write_whole(self._run_folder(row) / _MEASUREMENTS, [data], self._lock.hold)

    def measurements(self, row: RunRow) -> bytes:
        """A run's measurements as they were kept last; empty where none were. Raises OSError."""
        refuse_link(self._run_folder(row), _MEASUREMENTS)
        try:
            return (self._run_folder(row) / _MEASUREMENTS).read_bytes()
        except FileNotFoundError:
            return b""

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def slots(self, row: RunRow, extents: Mapping[str, Extent], *, behind: bool, patient: bool) -> Slots:
        """The run's slots: those that rows speak of, those that lie in the folder, and as many new ones as are taken.

        behind: whether large versions are written behind the caller. patient: as for Slots.
        """
        folder = self._run_folder(row)
        known = [each.folder for each in self._catalog.checkpoints(row.id) if each.folder != MEMORY]
        if not folder.is_symlink():  # a linked folder is not touched: Slots.check() refuses it
            folder.mkdir(exist_ok=True)  # a power loss may have left the row without the folder
            for name in _OLD_FOLDERS:
                if name not in known:
                    remove_tree(folder / name)
        return Slots(folder, extents, known, self._writers if behind else None, patient=patient, hold=self._lock.hold)

    def checkpoints(self, row: RunRow) -> list[CheckpointRow]:
        """The versions that the run's slots hold, newest first. All but the newest may have been overwritten since."""
        return self._catalog.checkpoints(row.id)

    def put_checkpoint(
        self, row: RunRow, slot: str, state: str, *, synced: bool, durable: bool, revision: int | None = None
    ) -> CheckpointRow:
        """Make the version in a slot the run's newest checkpoint. durable: the row outlives a power loss at once.
        revision: of the version, where the run is a shard."""
        return self._catalog.put_checkpoint(
            row.id, slot, state, time.time(), synced=synced, durable=durable, revision=revision
        )

    def amend_checkpoint(self, checkpoint: CheckpointRow, state: str, *, durable: bool) -> None:
        """Replace the text of a checkpoint's state; its files stay."""
        self._catalog.amend_checkpoint(checkpoint.id, state, durable=durable)

    def remove_checkpoint(self, row: RunRow, slot: str) -> None:
        """Forget what a slot, or MEMORY, holds."""
        self._catalog.remove_checkpoint(row.id, slot)

    def shard(self, row: RunRow) -> ShardRow | None:
        """Which shard of a run on several hosts a run is; None where it is none. Raises sqlite3.Error."""
        return self._catalog.shard(row.id)

    def whole(self, row: RunRow) -> str:
        """The configuration of the whole run that a shard is of; empty where the run is none. Raises sqlite3.Error."""
        return self._catalog.whole(row.id)

    def keep_record(
        self,
        row: RunRow,
        record: str,
        upto: int,
        *,
        durable: bool,
        since: int = 0,
        change: RowChange | None = None,
    ) -> None:
        """Replace a shard's record; rows of versions before revision ``since`` and beyond ``upto`` go with the one
        before. change: of other rows, all or nothing. Raises sqlite3.Error."""
        self._catalog.keep_record(row.id, record, upto, durable=durable, since=since, change=change)

    def put_vote(
        self,
        row: RunRow,
        record: str,
        slot: str,
        state: str,
        revision: int,
        current: CheckpointRow | None,
        *,
        synced: bool,
        durable: bool,
    ) -> CheckpointRow:
        """Replace a shard's record by one that votes for the version in a slot: the newest checkpoint once a record has
        come to that revision. current: the newest one until then. synced: whether the version is on the medium.
        durable: the record outlives a power loss at once. Raises sqlite3.Error."""
        vote = CheckpointRow(0, row.id, slot, state, synced, time.time(), revision)
        return self._catalog.put_vote(row.id, record, vote, current.id if current else None, durable=durable)

    def mark_synced(self, checkpoint: CheckpointRow) -> None:
        """Say that a checkpoint's bytes are on the medium.

        When this returns, all earlier transactions are there as well.
        """
        self._catalog.mark_synced(checkpoint.id)

    def open_checkpoint(self, row: RunRow, checkpoint: CheckpointRow, average: str) -> TensorFile:
        """The file of one average of a checkpoint. The run's slots must have passed check().

        Raises FileNotFoundError, MalformedBody.
        """
        return TensorFile(self._run_folder(row) / checkpoint.folder / file_name(average))

    # --- snapshots --------------------------------------------------------------------------------------------------

    # shelf, wherever a method takes it: where the snapshot stands, among those that somebody named or in the ring.

    def save_snapshot(
        self, row: RunRow, name: str, info: Callable[[], str], files: Files, shelf: Shelf = "snapshots"
    ) -> None:
        """Write a snapshot under a name that is free. info: gives the row's text, once the files are written.

        Raises OSError, sqlite3.Error, and as ``files`` and ``info`` do; then nothing of the snapshot stays.
        """
        refuse_link(self._run_folder(row), shelf)
        folder = self._snapshot_folder(row, shelf, name)
        remove_tree(folder)  # the files of a snapshot whose row was never written
        with contextlib.ExitStack() as undo:
            undo.callback(remove_tree, folder)
            self._write_files(folder, files)
            self._catalog.add_snapshot(SnapshotRow(row.id, name, info(), time.time()), shelf)
            undo.pop_all()

    def snapshots(self, row: RunRow, shelf: Shelf = "snapshots") -> list[SnapshotRow]:
        """The snapshots of a run, in the order they were made."""
        return self._catalog.snapshots(row.id, shelf)

    def open_snapshot(
        self, row: RunRow, name: str, average: str, shelf: Shelf = "snapshots", data_bytes: int | None = None
    ) -> TensorFile:
        """The file of one average of a snapshot. data_bytes: as for TensorFile. Raises OSError, MalformedBody."""
        path = self._snapshot_folder(row, shelf, name) / file_name(average)
        refuse_link(self._run_folder(row), f"{shelf}/{name}/{path.name}")
        return TensorFile(path, data_bytes)

    def snapshot_file(self, row: RunRow, name: str, average: str, shelf: Shelf = "snapshots") -> Path:
        """The file of one average of a snapshot in the data dir. Raises OSError where a link leads elsewhere."""
        path = self._snapshot_folder(row, shelf, name) / file_name(average)
        refuse_link(self._run_folder(row), f"{shelf}/{name}/{path.name}")
        return path

    def remove_snapshot(self, row: RunRow, name: str, shelf: Shelf = "snapshots") -> None:
        """Remove a snapshot: its row, then its files. What it has in the object store is among removals() then."""
        self._catalog.remove_snapshot(row.id, name, shelf)
        self.remove_snapshot_files(row, name, shelf)

    def remove_snapshot_files(self, row: RunRow, name: str, shelf: Shelf = "snapshots") -> None:
        """Remove the files of a snapshot whose row is gone."""
        with contextlib.suppress(OSError):  # the files behind a symbolic link are not the server's
            refuse_link(self._run_folder(row), shelf)
            remove_tree(self._snapshot_folder(row, shelf, name))

    # --- the object store ---------------------------------------------------------------------------------------------

    # Rows only: what lies in the object store nobody here knows.

    def snapshots_here(self) -> list[SnapshotRow]:
        """The snapshots of all runs whose files lie in the data dir, oldest first. Raises sqlite3.Error."""
        return self._catalog.snapshots_here()

    def place_snapshot(self, row: RunRow, snapshot: SnapshotRow, folder: str, files: str) -> None:
        """Say that a snapshot lies in a folder of the object store, then remove its files here; nothing where the
        snapshot is gone, and then the folder stays among removals(). Raises sqlite3.Error.

        Nobody may make or remove a snapshot of this run meanwhile.
        """
        if self._catalog.place_snapshot(snapshot, folder, files):
            self.remove_snapshot_files(row, snapshot.name)

    def adopt_snapshot(self, snapshot: SnapshotRow) -> bool:
        """Add a snapshot that lies in the object store. False where its folder is to be removed. Raises
        sqlite3.Error."""
        return self._catalog.adopt_snapshot(snapshot)

    def add_removal(self, folder: str) -> bool:
        """Have a folder of the object store removed, unless a snapshot is placed there before. False where one lies
        there already: then the folder stays. Raises sqlite3.Error."""
        return self._catalog.add_removal(folder)

    def drop_removal(self, folder: str) -> None:
        """Forget a folder of the object store that was removed. Raises sqlite3.Error."""
        self._catalog.drop_removal(folder)

    def removals(self) -> list[str]:
        """The folders of the object store that are to be removed: of snapshots that were deleted, and of uploads that
        did not come to an end. Raises sqlite3.Error."""
        return self._catalog.removals()

    # ----------------------------------------------------------------------------------------------------------------

    def _open_catalog(self, path: Path, mounted: FileSystem) -> Catalog:
        """The catalog. Raises CatalogUnusable, also where the file is missing and folders of runs are there."""
        if not path.exists() and self._runs.is_dir() and any(self._runs.iterdir()):
            raise CatalogUnusable(
                f"{path} is missing, but there are runs beside it: restore it from a backup, or use another --data-dir"
            )
        if mounted.shared:
            _log.info("%s is on a network's file system (%s): nobody else may open it", path, mounted.kind)
        return Catalog(path, alone=mounted.shared, hold=self._lock.hold)

    def _sweep(self) -> None:
        """Remove the folders of deleted runs, where a crash left them.

        Only folders with ids that this catalog gave out: an older catalog, restored from a backup, must not cost the
        runs that are newer than the backup.
        """
        rows = self._catalog.runs()
        for row in rows:
            self._sweep_snapshots(row)
        known = {row.id for row in rows}
        last = self._catalog.last_run_id()
        for folder in self._runs.iterdir():
            found = _RUN_FOLDER.fullmatch(folder.name)
            if found and int(found[1]) in known:
                continue
            if found and int(found[1]) <= last:
                _log.info("removing %s: its run was deleted", folder)
                remove_tree(folder)
            else:
                _log.warning("%s belongs to no run that the catalog knows; it is left alone", folder)

    def _sweep_snapshots(self, row: RunRow) -> None:
        """Remove the files of snapshots whose row was never written, or says that they lie in the object store."""
        for shelf in _SHELVES:
            with contextlib.suppress(OSError):  # no folder, or a symbolic link: nothing there is the server's
                refuse_link(self._run_folder(row), shelf)
                rows = self._catalog.snapshots(row.id, shelf)
                known = {snapshot.name for snapshot in rows if snapshot.folder is None}
                for folder in (self._run_folder(row) / shelf).iterdir():
                    if folder.name not in known:
                        remove_tree(folder)

    def _run_folder(self, row: RunRow) -> Path:
        return self._runs / f"{row.name}.{row.id}"

    def _snapshot_folder(self, row: RunRow, shelf: Shelf, name: str) -> Path:
        return self._run_folder(row) / shelf / name

    def _write_files(self, folder: Path, files: Files) -> None:
        """Write the files of a snapshot, whole, and make their names durable. Raises OSError, also where the run's
        own folder is gone: the run was deleted, and its folder must not come back."""
        folder.parent.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)
        for average, chunks in files.items():
            write_whole(folder / file_name(average), chunks, self._lock.hold)
        for parent in (folder.parent, folder.parent.parent):  # each of these folders may have a new entry
            sync_folder(parent)
