"""The snapshots of a shard: there on all hosts or on none, without an update that waits for a disk.

    SnapshotBegun    on all hosts: each holds its version of that revision, and writes it in the background
    SnapshotTaken    each votes that its files and row are on the medium; with the verdict the snapshot is there
    SnapshotGone     the row goes with the verdict, of a snapshot that is there, or that was only begun

The row of a snapshot that was begun says so, and nobody finds the snapshot. Its row changes, or goes, in the
transaction of the record that decides so (storage.RowChange).

Knows the snapshots of one shard. Does not know who asks for one (host), or who votes for what (shard_run).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from ema_client.errors import EmaError, Overloaded
from ema_service.cluster.hosting.borrowing import Twin
from ema_service.cluster.messages import Rewind, SnapshotBegun, SnapshotGone, SnapshotTaken
from ema_service.persistence import Snapshots
from ema_service.runs import Rewound, Run, State
from ema_service.runs.branching import descent_of_branch
from ema_service.storage import RowChange

__all__ = ["ShardSnapshots", "SourceOf"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

#: A run, another one, and the name of a snapshot of the latter -> the snapshots of the latter (Registry.source_of).
SourceOf: TypeAlias = Callable[[Run, str, str], Snapshots]


class ShardSnapshots:
    """The snapshots of one shard. Thread-safe."""

    def __init__(self, run: Run, snapshots: Snapshots, saving: Executor, source_of: SourceOf) -> None:
        """snapshots: the run's. saving: writes them, one after the other. source_of: as Registry.source_of()."""
        self._run = run
        self._source_of = source_of
        self._snapshots = snapshots
        self._saving = saving
        self._lock = threading.Lock()
        #: Names of those that are being written.
        self._writing: set[str] = set()

    def read(self, change: Rewind, lineage: str, key: str) -> Rewound:
        """The version at a snapshot, written to its place. lineage: for a run that has no version. key: of the write.

        Raises as state(), and as Run.finish_rewind().
        """
        return self._at(change, partial(self._run.finish_rewind, lineage=lineage, key=key))

    def state(self, change: Rewind, lineage: str) -> State:
        """The version at a snapshot, written nowhere. lineage: as for read().

        Raises as Snapshots.read(), SnapshotNotFound, and as Registry.source_of().
        """
        return self._at(change, partial(self._run.at_snapshot, lineage=lineage))

    def _at(self, change: Rewind, make: Callable[..., T]) -> T:
        """What is made of what a snapshot holds, and of the descent of the version that follows it."""
        own, run = self._snapshots, self._run
        of = None if change.source is None else self._source_of(run, change.source, change.snapshot)
        (own if of is None else of).find(change.snapshot, change.created_at)
        info, averages, arenas = own.read(change.snapshot, run.ledger.setup.members, of=of)
        descent = own.following(info) if of is None else descent_of_branch(averages)
        return make(info, averages, arenas, descent)

    def check(self, change: SnapshotBegun | SnapshotTaken | SnapshotGone) -> None:
        """Whether a change may be made. Under deciding().

        Raises as Ledger.writable(), Snapshots.check_free() and Snapshots.find(); Overloaded while the snapshot is being
        written.
        """
        if isinstance(change, SnapshotBegun):
            self._run.ledger.writable()
            self._snapshots.check_free(change.name)
            return
        with self._lock:
            if change.name in self._writing:
                raise Overloaded(f"snapshot {change.name!r} is still being written", retry_after=0.2)
        if isinstance(change, SnapshotGone) and not change.begun:
            self._snapshots.find(change.name, change.created_at)

    def rows(self, change: SnapshotBegun | SnapshotTaken | SnapshotGone) -> RowChange | None:
        """What of the rows changes with the verdict; None of a change that only begins. Raises as
        Snapshots.prepared()."""
        if isinstance(change, SnapshotBegun):
            return None
        if isinstance(change, SnapshotGone):
            return self._snapshots.without(change.name, told=not change.begun)
        return self._snapshots.prepared(change.name, change.created_at, change.gone.split())

    def follow(self, change: SnapshotBegun | SnapshotTaken | SnapshotGone) -> None:
        """Do what follows from a change, once it is committed. Under deciding()."""
        if isinstance(change, SnapshotBegun):
            with self._lock:
                self._writing.add(change.name)
            self._saving.submit(self._write, change, self._run.ready_state())
        elif isinstance(change, SnapshotTaken):
            self._saving.submit(self._snapshots.shown, change.gone.split())
        else:
            self._saving.submit(self._snapshots.gone, change.name)

    def lent(self) -> list[dict[str, Any]]:
        """As Snapshots.lent()."""
        return self._snapshots.lent()

    def file(self, name: str, average: str) -> Path:
        """As Snapshots.file()."""
        return self._snapshots.file(name, average)

    def copy(self, twin: Twin) -> None:
        """Have the snapshots that the twin has, and no others. Raises Overloaded, StorageFailed."""
        run = self._run.config.run
        theirs = {each["name"]: each for each in twin.snapshots(run)}
        own = {each["name"]: each for each in self._snapshots.lent()}
        for name in own.keys() - {name for name, each in own.items() if each == theirs.get(name)}:
            self._snapshots.drop(name)
        for name, each in theirs.items():
            if own.get(name) != each:
                files = {average: twin.snapshot(run, name, average, size) for average, size in each["files"].items()}
                self._snapshots.adopt(name, each["text"], sum(each["files"].values()), files)

    def _write(self, change: SnapshotBegun, state: State) -> None:
        try:
            self._snapshots.prepare(change.name, state, created_at=change.created_at, key=change.key)
        except EmaError as fault:  # whoever asks for the vote is refused it
            _log.error("run %s: snapshot %s: %s", self._run.config.run, change.name, fault)
        finally:
            with self._lock:
                self._writing.discard(change.name)
