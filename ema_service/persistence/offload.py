"""The snapshots of a server on an object store: a thread that moves them there and removes them, and reading them.

    URL/
        <run>/<snapshot>.<digits>/<average>.safetensors     byte for byte the files that the data dir had
                                  snapshot.json             what the catalog says of run and snapshot; written last
        _host-<i>-of-<n>/<run>/...                          the same of a host of a cluster, of its slices

A snapshot is taken in the data dir first and moved then. The catalog says where each is: the row changes once every
file was read back from the store and was what had been written, and the files in the data dir go after that. Before
the first byte is sent the catalog has the folder among those to be removed, and the change of the row takes it out. So
whatever is killed in between, each snapshot is whole in one place, and what is left over is removed.

Each host of a cluster has a folder of its own, whose name no run can have, so no host removes what another one moved.
The name of a snapshot's folder is made of what all hosts agreed on: a host whose data dir was lost finds there again
what it had moved.

Knows rows, files and the object store. Does not know how a snapshot is taken, runs, or HTTP.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import xxhash

from ema_client.errors import MalformedBody, Overloaded
from ema_client.protocol import SnapshotInfo, from_json
from ema_service.persistence.cards import (
    CARD,
    CARD_BYTES,
    StoredFile,
    card_of,
    check_homes,
    files_in,
    folder_of,
    read_files,
)
from ema_service.persistence.rows import is_begun
from ema_service.storage import (
    ObjectFile,
    ObjectStore,
    ObjectStoreFailed,
    RunRow,
    SnapshotRow,
    Store,
    TensorFile,
)
from ema_service.storage.files import file_name

__all__ = ["MOST_READERS", "Offload"]

_log = logging.getLogger(__name__)

#: Most files of the store that are read at one time: each reader holds up to 4 MiB, or twice that for a moment.
MOST_READERS = 32
#: Retry-After where all of them are taken.
_READERS_SECONDS = 1.0
#: Seconds until a store that failed is tried again: the first, and the most. A store that is back is used in a minute.
_RETRY_SECONDS = (1.0, 60.0)
#: Seconds for which the server's end waits for the thread: what is under way begins anew with the next start.
_END_SECONDS = 3.0
#: Bytes of one read when a file is compared.
_COMPARED_AT_ONCE = 8 << 20

#: Says of a snapshot of a run that it lies in a folder now, with the text about its files.
Placed = Callable[[str, SnapshotRow, str, str], None]


class _Unreadable(Exception):
    """A file in the data dir cannot be read."""


class _Ending(Exception):
    """The server ends."""


class Offload:
    """Moves snapshots to an object store, and removes there what has been deleted; one at a time, in a thread.

    url: the store's, for messages. fault: why the store could not be used when it was tried last, None where it could.
    """

    def __init__(self, store: Store, objects: ObjectStore) -> None:
        """store: of a server that decides alone, or of a host of a cluster (Store.be_host). Raises sqlite3.Error."""
        self.url = objects.url
        self.fault: str | None = None
        self._store = store
        directory = store.directory()
        #: Which host of how many this is; None of a server that decides alone.
        self._place = (directory.place, directory.of) if directory else None
        self._objects = objects
        self._changed = threading.Condition()
        self._asked = True
        self._ending = False
        self._looked = False
        self._left_out: set[SnapshotRow] = set()
        #: By folder, how many files are open there, which are not removed meanwhile.
        self._read: Counter[str] = Counter()
        self._thread: threading.Thread | None = None

    def start(self, placed: Placed) -> None:
        """Begin to move what there is. placed: called in the thread, once for each snapshot."""
        # A daemon: a store that does not answer must not keep the server from ending.
        self._thread = threading.Thread(target=self._work, args=(placed,), name="ema-offload", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """A snapshot was taken or deleted."""
        with self._changed:
            self._asked = True
            self._changed.notify()

    def close(self) -> None:
        """End the thread, or leave it where it waits for the store: the catalog tells nothing of what it does then."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self._thread:
            self._thread.join(_END_SECONDS)

    @property
    def waiting(self) -> int:
        """How many snapshots are to be moved. Raises sqlite3.Error."""
        return len(self._here())

    @property
    def removals(self) -> int:
        """How many folders of the store are to be removed. Raises sqlite3.Error."""
        return len(self._store.removals())

    def open(self, row: SnapshotRow, average: str) -> TensorFile:
        """The file of one average of a snapshot that lies in the store, for the caller to close.

        Raises ObjectStoreFailed, MalformedBody; Overloaded while too many files are open.
        """
        folder = row.folder or ""
        self._lend(folder)
        with contextlib.ExitStack() as undo:
            undo.callback(self._give_back, folder)
            about = read_files(row.files or "{}")[average]
            file = _Lent(self._objects, f"{folder}/{file_name(average)}", about, partial(self._give_back, folder))
            undo.pop_all()
        return file

    def find(self, run: RunRow, name: str, text: str) -> tuple[str, str] | None:
        """In which folder a snapshot lies that another host of the cluster has, and the text about its files, where
        this host had moved it there before it lost its data dir. None where it is not there, or the store fails.

        text: of the snapshot's row at the other host.
        """
        if self.fault:
            return None
        try:
            folder = folder_of(self._place, run, name, json.loads(text)["created_at"])
            files = files_in(self._objects.read(f"{folder}/{CARD}", 0, CARD_BYTES), text)
        except ObjectStoreFailed as fault:
            _log.info("snapshot %s of run %s is copied from the twin: %s", name, run.name, fault)
            return None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return (folder, files) if files else None

    def _lend(self, folder: str) -> None:
        with self._changed:
            if self._read.total() >= MOST_READERS:
                raise Overloaded(
                    f"{MOST_READERS} snapshots are being read from {self.url} already", retry_after=_READERS_SECONDS
                )
            self._read[folder] += 1

    def _give_back(self, folder: str) -> None:
        with self._changed:
            self._read[folder] -= 1
            if not self._read[folder]:
                del self._read[folder]
                self._asked = True  # it may wait to be removed
                self._changed.notify()

    # --- the thread -------------------------------------------------------------------------------------------------

    def _work(self, placed: Placed) -> None:
        try:
            self._try_until_the_end(placed)
        finally:
            if not self._ending:
                self.fault = (
                    "a defect ended the moving of snapshots: report the log's traceback, and restart the server"
                )

    def _try_until_the_end(self, placed: Placed) -> None:
        delay: float | None = None
        while self._waited(delay):
            fault = self._tried(placed)
            delay = min(delay * 2, _RETRY_SECONDS[1]) if fault and delay else _RETRY_SECONDS[0] if fault else None
            if fault and fault != self.fault:
                _log.error("snapshot store: %s; snapshots stay in the data dir, and it is tried again", fault)
            elif self.fault and not fault:
                _log.info("snapshot store: %s answers again", self.url)
            self.fault = fault

    def _waited(self, seconds: float | None) -> bool:
        """Wait until there is something to do, or so many seconds are over. False once the server ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._asked or self._ending, seconds)
            self._asked = False
            return not self._ending

    def _tried(self, placed: Placed) -> str | None:
        """Do what there is to do. Why it could not be done, None where it was."""
        try:
            if self.fault or not self._looked:
                check_homes(self._objects.names(), self._place, self.url)
                self._looked = True
            here = [row for row in self._here() if row not in self._left_out]
            runs = {row.id: row for row in self._store.runs()} if here else {}
            for row in here:
                if run := runs.get(row.run_id):
                    self._move(run, row, placed)
            for folder in self._store.removals():
                self._check_ending()
                # Written once more, as only the process that has the data dir can: one that took over from this process
                # may have moved a snapshot of a host to that folder meanwhile.
                if folder not in self._read and self._store.add_removal(folder):
                    self._objects.remove(folder, CARD)
                    self._store.drop_removal(folder)
        except (ObjectStoreFailed, sqlite3.Error) as fault:
            return str(fault)
        except _Ending:
            return self.fault
        return None

    def _here(self) -> list[SnapshotRow]:
        """The snapshots that are to be moved. Raises sqlite3.Error."""
        return [row for row in self._store.snapshots_here() if not is_begun(row.info)]

    def _move(self, run: RunRow, row: SnapshotRow, placed: Placed) -> None:
        """Move one snapshot. One that cannot be read is left out until the next start. Raises ObjectStoreFailed."""
        try:
            info = from_json(SnapshotInfo, json.loads(row.info))
            folder = folder_of(self._place, run, row.name, info.created_at if self._place else row.created_at)
            if not self._store.add_removal(folder):
                return  # found there meanwhile, in the place of this row
            files = {each: self._upload(run, row, each, folder) for each in info.averages}
            text = json.dumps({name: asdict(file) for name, file in files.items()})
            card = json.dumps(card_of(self._store, self._place, run, row, text)).encode()
        except (_Unreadable, ValueError) as fault:
            _log.error("snapshot %s of run %s cannot be moved to %s: %s", row.name, run.name, self.url, fault)
            self._left_out.add(row)
            return
        self._objects.write(f"{folder}/{CARD}", [card], len(card))
        placed(run.name, row, folder, text)

    def _upload(self, run: RunRow, row: SnapshotRow, average: str, folder: str) -> StoredFile:
        """Write the file of one average to the store, and compare what the store has then."""
        path = f"{folder}/{file_name(average)}"
        try:
            opened = self._store.open_snapshot(run, row.name, average)
        except (OSError, MalformedBody) as fault:
            raise _Unreadable(str(fault)) from fault
        with contextlib.closing(opened) as file:
            digest = xxhash.xxh3_128()
            self._objects.write(path, self._pieces(file, digest), file.size)
            found = StoredFile(file.size, file.identity, digest.hexdigest())
        self._compare(path, found)
        return found

    def _pieces(self, file: TensorFile, digest: xxhash.xxh3_128) -> Iterator[memoryview]:
        try:
            for piece in file.pieces():
                self._check_ending()
                digest.update(piece)
                yield piece
        except OSError as fault:
            raise _Unreadable(str(fault)) from fault

    def _compare(self, path: str, wanted: StoredFile) -> None:
        """Read a file back. Raises ObjectStoreFailed where the store has other bytes than were written."""
        digest, done = xxhash.xxh3_128(), 0
        while done < wanted.bytes and (
            piece := self._objects.read(path, done, min(done + _COMPARED_AT_ONCE, wanted.bytes))
        ):
            self._check_ending()
            digest.update(piece)
            done += len(piece)
        if digest.hexdigest() != wanted.xxh3:
            raise ObjectStoreFailed(f"{self.url}/{path} has other bytes than were written there")

    def _check_ending(self) -> None:
        if self._ending:
            raise _Ending


class _Lent(ObjectFile):
    """A file of the store, one of those that may be open at one time."""

    def __init__(self, objects: ObjectStore, path: str, about: StoredFile, give_back: Callable[[], None]) -> None:
        super().__init__(objects, path, about.bytes, about.identity)
        self._give_back = [give_back]

    def close(self) -> None:
        super().close()
        while self._give_back:
            self._give_back.pop()()
