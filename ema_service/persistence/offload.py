"""The snapshots of a server on an object store: a thread that moves them there and removes them, and reading them.

    URL/
        <run>/<snapshot>.<digits>/<average>.safetensors     byte for byte the files that the data dir had
                                  snapshot.json             what the catalog says of run and snapshot; written last

A snapshot is taken in the data dir first and moved then. The catalog says where each is: the row changes once every
file was read back from the store and was what had been written, and the files in the data dir go after that. Before
the first byte is sent the catalog has the folder among those to be removed, and the change of the row takes it out. So
whatever is killed in between, each snapshot is whole in one place, and what is left over is removed.

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
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import xxhash

from ema_client.errors import MalformedBody, Overloaded
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

__all__ = ["CARD", "CARD_FORMAT", "MOST_READERS", "Offload", "StoredFile", "read_files"]

_log = logging.getLogger(__name__)

#: What a snapshot's folder has beside the files of its averages.
CARD = "snapshot.json"
CARD_FORMAT = 1
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


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file in the object store. identity: of the file it was written from, for its ETag. xxh3: XXH3-128 of its bytes,
    in hexadecimal digits."""

    bytes: int
    identity: str
    xxh3: str


class _Unreadable(Exception):
    """A file in the data dir cannot be read."""


class _Ending(Exception):
    """The server ends."""


class Offload:
    """Moves snapshots to an object store, and removes there what has been deleted; one at a time, in a thread.

    url: the store's, for messages. fault: why the store could not be used when it was tried last, None where it could.
    """

    def __init__(self, store: Store, objects: ObjectStore) -> None:
        self.url = objects.url
        self.fault: str | None = None
        self._store = store
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
        return len(self._store.snapshots_here())

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
                self._objects.check()
                self._looked = True
            here = [row for row in self._store.snapshots_here() if row not in self._left_out]
            runs = {row.id: row for row in self._store.runs()} if here else {}
            for row in here:
                if run := runs.get(row.run_id):
                    self._move(run, row, placed)
            for folder in self._store.removals():
                self._check_ending()
                if folder not in self._read:
                    self._objects.remove(folder, CARD)
                    self._store.drop_removal(folder)
        except (ObjectStoreFailed, sqlite3.Error) as fault:
            return str(fault)
        except _Ending:
            return self.fault
        return None

    def _move(self, run: RunRow, row: SnapshotRow, placed: Placed) -> None:
        """Move one snapshot. One that cannot be read is left out until the next start. Raises ObjectStoreFailed."""
        # The same for each try, and for no other snapshot that the store may have.
        digits = xxhash.xxh3_64_hexdigest(f"{run.id} {run.created_at!r} {row.created_at!r}".encode())[:12]
        folder = f"{run.name}/{row.name}.{digits}"
        self._store.add_removal(folder)
        try:
            files = {each: self._upload(run, row, each, folder) for each in json.loads(row.info)["averages"]}
        except _Unreadable as fault:
            _log.error("snapshot %s of run %s cannot be moved to %s: %s", row.name, run.name, self.url, fault)
            self._left_out.add(row)
            return
        text = json.dumps({name: asdict(file) for name, file in files.items()})
        card = json.dumps(_card(run, row, text)).encode()
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


def read_files(text: str) -> dict[str, StoredFile]:
    """The files of a snapshot in the store, by name of the average, as its row has them. Raises ValueError, TypeError,
    KeyError on any other text."""
    found: dict[str, Any] = json.loads(text)
    return {name: StoredFile(int(e["bytes"]), str(e["identity"]), str(e["xxh3"])) for name, e in found.items()}


def _card(run: RunRow, row: SnapshotRow, files: str) -> dict[str, Any]:
    """All that a catalog which was lost needs for having the snapshot again."""
    return {
        "format": CARD_FORMAT,
        "run": json.loads(run.config),
        "averages": run.averages,
        "snapshot": json.loads(row.info),
        "created_at": row.created_at,
        "files": json.loads(files),
    }
