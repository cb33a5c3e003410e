"""The snapshots of one run's ring: which there are, and which of them led to a version.

Knows rows, files and descents. Does not know when a snapshot is taken, or what is made of them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ema_client.errors import MalformedBody, SnapshotDamaged
from ema_client.protocol import TensorSpec
from ema_client.wire import Entry, build_header, place
from ema_service.averaging import Ring
from ema_service.averaging.strides import Strides
from ema_service.shadows.state import Descent, Version
from ema_service.storage import RunRow, SnapshotRow, Store, TensorFile
from ema_service.storage.store import Files

__all__ = ["STRIDES", "Leading", "RingShelf", "RingSnapshot", "text_of", "version_in"]

_log = logging.getLogger(__name__)

#: In place of an average's name: the file of the strides.
STRIDES = "-strides"


@dataclass(frozen=True, slots=True)
class RingSnapshot:
    """A snapshot of the ring, of version epoch.n. time: the averages' counter. step: the trainer's, None if unknown.

    averages: those that are stored. begin: whether these are the weights that the run began with: one average, for all
    are the same then. begun: whether the snapshot is none of the ring yet, for other hosts may lack it.
    """

    epoch: int
    n: int
    time: int
    step: int | None
    averages: tuple[str, ...]
    bytes: int
    begin: bool = False
    begun: bool = False

    @property
    def version(self) -> str:
        """The version's name, which its row and its folder have too."""
        return f"{self.epoch}.{self.n}"


@dataclass(frozen=True, slots=True)
class Leading:
    """Of all snapshots those that led to the versions of one descent, the oldest first, and the ring of their times.

    begun: of those that led there, the ones that are none of the ring yet.
    """

    descent: Descent | None
    all: tuple[RingSnapshot, ...]
    snapshots: tuple[RingSnapshot, ...]
    ring: Ring
    begun: tuple[RingSnapshot, ...] = ()

    @property
    def has_stray(self) -> bool:
        """Whether there are snapshots that did not lead there."""
        return len(self.snapshots) + len(self.begun) < len(self.all)

    @property
    def stray(self) -> list[RingSnapshot]:
        """The snapshots that did not lead there."""
        return [each for each in self.all if each not in self.snapshots and each not in self.begun]

    @property
    def has_surplus(self) -> bool:
        """Whether the ring has more snapshots than it is to have."""
        return len(self.ring.times) > self.ring.capacity

    @property
    def surplus(self) -> list[RingSnapshot]:
        """What the ring has too many."""
        time = self.ring.surplus()
        return [each for each in self.snapshots if each.time == time and not each.begin]


class RingShelf:
    """The snapshots of one ring. Thread-safe; one thread at a time adds and drops.

    entries: of the tensors in every average's file. lost: the versions of snapshots that could not be read.
    """

    def __init__(self, row: RunRow, store: Store, empty: Ring, entries: Sequence[Entry]) -> None:
        """empty: the ring before any snapshot."""
        self.entries = entries
        self.lost: frozenset[str] = frozenset()
        self._row = row
        self._store = store
        self._empty = empty
        self._lock = threading.Lock()
        self._all = tuple(_read(store.snapshots(row, "ring")))
        self._leading = Leading(None, (), (), empty)

    @property
    def bytes(self) -> int:
        """Of the averages' files."""
        return sum(each.bytes for each in self._all)

    def leading_to(self, version: Version) -> Leading:
        """The snapshots that led to a version. Those of a later version of one descent are the same."""
        known, snapshots, descent = self._leading, self._all, version.descent
        if known.descent is descent and known.all is snapshots:
            return known
        placed = [(descent.updates(version, each.epoch, each.n, each.time), each) for each in snapshots]
        led = sorted((each for passed, each in placed if passed is not None), key=lambda each: (each.time, each.n))
        there = tuple(each for each in led if not each.begun)
        begun = tuple(each for each in led if each.begun)
        self._leading = Leading(descent, snapshots, there, self.ring_of(there), begun)
        return self._leading

    def ring_of(self, snapshots: Iterable[RingSnapshot]) -> Ring:
        """The ring of the times of snapshots, given the oldest first."""
        ring = self._empty
        for each in snapshots:
            ring = ring if each.begin else ring.taken(each.time)
        return ring

    @property
    def all(self) -> tuple[RingSnapshot, ...]:
        """All snapshots, also those that are none of the ring yet, or any more."""
        return self._all

    def has(self, version: Version) -> bool:
        """Whether there is a snapshot of a version."""
        return any(each.version == str(version) for each in self._all)

    def add(self, snapshot: RingSnapshot, averages: Files, strides: Strides) -> None:
        """Write a file for each average and one for the strides, then the row. Raises OSError, sqlite3.Error."""
        self._store.check_room(snapshot.bytes)
        files = {STRIDES: _strides_file(strides), **averages}
        self._store.save_snapshot(self._row, snapshot.version, lambda: text_of(snapshot), files, "ring")
        with self._lock:
            self._all = (*self._all, snapshot)

    def file(self, version: str, name: str) -> Path:
        """The file of one average of a snapshot, or of the strides (STRIDES). Raises OSError."""
        return self._store.snapshot_file(self._row, version, name, "ring")

    def adopt(self, text: str, files: Files) -> None:
        """Keep a snapshot that another host has: its row's text, and its files. Raises OSError, sqlite3.Error, what
        ``files`` raise, and ValueError for a text that is none."""
        snapshot = _parsed(text)
        self._store.check_room(snapshot.bytes)
        self._store.save_snapshot(self._row, snapshot.version, lambda: text, files, "ring")
        with self._lock:
            self._all = (*self._all, snapshot)

    def drop(self, snapshot: RingSnapshot) -> None:
        """Remove a snapshot. Raises sqlite3.Error."""
        # First for readers: whoever finds the file gone finds the snapshot gone.
        with self._lock:
            self._all = tuple(each for each in self._all if each is not snapshot)
            self.lost -= {snapshot.version}
        self._store.remove_snapshot(self._row, snapshot.version, "ring")

    def become(self, there: Collection[str], gone: Collection[str]) -> None:
        """The rows say by now that these snapshots, by their versions, are the ring's, and others there no more."""
        with self._lock:
            self.lost -= set(gone)
            left = (each for each in self._all if each.version not in gone)
            self._all = tuple(replace(each, begun=each.begun and each.version not in there) for each in left)

    def remove_files(self, version: str) -> None:
        """Remove the files of a snapshot whose row is gone."""
        self._store.remove_snapshot_files(self._row, version, "ring")

    def open(self, snapshot: RingSnapshot, average: str) -> TensorFile:
        """The file of one average of a snapshot, with ``entries``, open for the caller to close.

        Raises FileNotFoundError where the snapshot was dropped meanwhile; SnapshotDamaged.
        """
        data_bytes = None if average == STRIDES else self.entries[-1].end
        try:
            return self._store.open_snapshot(self._row, snapshot.version, average, "ring", data_bytes)
        except FileNotFoundError:
            if snapshot not in self._all:
                raise
            raise self._damaged(snapshot, "its file is gone") from None
        except (OSError, MalformedBody) as fault:
            raise self._damaged(snapshot, fault) from fault

    def strides(self, version: Version) -> Strides:
        """The strides that were stored with the newest snapshot that led to a version; none where none can be read."""
        for snapshot in reversed(self.leading_to(version).snapshots):
            with (
                contextlib.suppress(OSError, SnapshotDamaged),
                contextlib.closing(self.open(snapshot, STRIDES)) as file,
            ):
                return Strides(np.frombuffer(file.read(0, file.header.data_bytes), np.int64).reshape(-1, 2))
        return Strides()

    def _damaged(self, snapshot: RingSnapshot, fault: object) -> SnapshotDamaged:
        self.lost |= {snapshot.version}
        return SnapshotDamaged(f"ring of run {self._row.name!r}: snapshot {snapshot.version} cannot be read: {fault}")


def text_of(snapshot: RingSnapshot) -> str:
    """The text of a snapshot's row, which earlier servers read too where the run lies on one server."""
    said = asdict(snapshot)
    return json.dumps(said if snapshot.begun else {name: value for name, value in said.items() if name != "begun"})


def version_in(text: str) -> str:
    """The version of the snapshot of a row's text. Raises ValueError."""
    return _parsed(text).version


def _strides_file(strides: Strides) -> Iterator[bytes]:
    runs = strides.runs
    yield build_header(place([TensorSpec("runs", runs.shape, "I64")]))
    yield runs.tobytes()


def _read(rows: Iterable[SnapshotRow]) -> Iterator[RingSnapshot]:
    """The snapshots of rows; a damaged row is logged and left out."""
    for row in rows:
        try:
            yield _parsed(row.info)
        except ValueError as fault:
            _log.error("ring of run %d: the catalog's row of %s is damaged: %s", row.run_id, row.name, fault)


def _parsed(text: str) -> RingSnapshot:
    """The snapshot of a row's text. Raises ValueError."""
    try:
        said: dict[str, Any] = json.loads(text)
        return RingSnapshot(**{**said, "averages": tuple(said["averages"])})
    except (TypeError, KeyError) as fault:
        raise ValueError(f"no snapshot of a ring: {fault}") from None
