"""The snapshots of a shard: there on all hosts or on none, without an update that waits for a disk.

    SnapshotBegun    on all hosts: each holds its version of that revision, and writes it in the background
    SnapshotTaken    each votes that its files and row are on the medium; with the verdict the snapshot is there
    SnapshotGone     the row goes with the verdict, of a snapshot that is there, or that was only begun

A snapshot of an average that is worked out is begun by holding the version. The host that was asked finds the recipe,
and each writes its sum when it is asked to vote that the snapshot is there, and votes once the sum is written.

The row of a snapshot that was begun says so, and nobody finds the snapshot. Its row changes, or goes, in the
transaction of the record that decides so (storage.RowChange).

Knows the snapshots of one shard. Does not know who asks for one (host), or who votes for what (shard_run).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

from ema_client.errors import EmaError, InvalidRequest, Overloaded, SnapshotNotFound, StorageFailed, VersionGone
from ema_service.cluster.hosting.borrowing import Twin
from ema_service.cluster.messages import Rewind, SnapshotBegun, SnapshotGone, SnapshotTaken
from ema_service.persistence import Snapshots
from ema_service.runs import Rewound, Run, State
from ema_service.runs.branching import check_state, descent_of_branch
from ema_service.runs.recipes import read
from ema_service.runs.summing import Summing
from ema_service.storage import RowChange, TensorFile

__all__ = ["ShardSnapshots", "SourceOf"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

#: A run, another one, and the name of a snapshot of the latter -> the snapshots of the latter (Registry.source_of).
SourceOf: TypeAlias = Callable[[Run, str, str], Snapshots]


#: Seconds for which a version is held for a recipe: in these a ring that is being stored is waited for, and all decide.
_HELD_SECONDS = 120.0


@dataclass(slots=True)
class _Making:
    """A snapshot that was begun, on its way to the disk. begun: the change. state: the version that is held until a
    recipe comes. ended: whether nothing is to be written any more. fault: why nothing was. timer: ends the holding."""

    begun: SnapshotBegun
    state: State | None = None
    ended: bool = False
    fault: EmaError | None = None
    timer: threading.Timer | None = None

    def take(self) -> State | None:
        """The version that is held, which is held no longer."""
        state, self.state = self.state, None
        if self.timer:
            self.timer.cancel()
        return state

    @property
    def is_being_written(self) -> bool:
        """Whether files of the snapshot are being written, or are about to be."""
        return self.state is None and not self.ended


class ShardSnapshots:
    """The snapshots of one shard. Thread-safe."""

    def __init__(
        self, run: Run, snapshots: Snapshots, saving: Executor, source_of: SourceOf, summing: Summing | None = None
    ) -> None:
        """snapshots: the run's. saving: writes them, one after the other. source_of: as Registry.source_of(). summing:
        works averages out of the run's ring; None where the run has none."""
        self._run = run
        self._source_of = source_of
        self._snapshots = snapshots
        self._saving = saving
        self._summing = summing
        self._lock = threading.Lock()
        #: By name, those that were begun here since the start, until they are there or gone.
        self._making: dict[str, _Making] = {}

    def read(self, change: Rewind, lineage: str, key: str) -> Rewound:
        """The version at a snapshot, written to its place. lineage: for a run that has no version. key: of the write.

        Raises as state(), and as Run.finish_rewind().
        """
        return self._at(change, partial(self._run.finish_rewind, lineage=lineage, key=key))

    def state(self, change: Rewind, lineage: str) -> State:
        """The version at a snapshot, written nowhere. lineage: as for read().

        Raises as Snapshots.read(), SnapshotNotFound, as check_state(), and as Registry.source_of().
        """
        return self._at(change, partial(self._run.at_snapshot, lineage=lineage))

    def _at(self, change: Rewind, make: Callable[..., T]) -> T:
        """What is made of what a snapshot holds, and of the descent of the version that follows it."""
        own, run = self._snapshots, self._run
        of = None if change.source is None else self._source_of(run, change.source, change.snapshot)
        check_state((own if of is None else of).find(change.snapshot, change.created_at))
        info, averages, arenas = own.read(change.snapshot, run.ledger.setup.members, of=of)
        descent = own.following(info) if of is None else descent_of_branch(averages)
        # The same on all hosts, of which each has its own list of epochs that it gave: they have the same snapshots.
        after = max((int(each.version.partition(".")[0]) for each in own.all()), default=0)
        return make(info, averages, arenas, descent, after=after)

    def check(self, change: SnapshotBegun | SnapshotTaken | SnapshotGone) -> None:
        """Whether a change may be made. Under deciding().

        Raises as Ledger.writable(), Snapshots.check_free() and Snapshots.find(); Overloaded while the snapshot is being
        written; of one to be there why its files were not written.
        """
        if isinstance(change, SnapshotBegun):
            self._run.ledger.writable()
            self._snapshots.check_free(change.name)
            if change.held and self._summing is None:
                raise InvalidRequest(f"run {self._run.config.run!r} has no ring that averages are worked out of")
            return
        making = self._of(change)
        if making and isinstance(change, SnapshotTaken) and change.recipe:
            self._begin_sum(making, change.recipe)
        if making and making.is_being_written:
            raise Overloaded(f"snapshot {change.name!r} is still being written", retry_after=0.2)
        if making and making.fault and isinstance(change, SnapshotTaken):
            raise making.fault
        if isinstance(change, SnapshotGone) and not change.begun:
            self._snapshots.find(change.name, change.created_at)

    def rows(self, change: SnapshotBegun | SnapshotTaken | SnapshotGone) -> RowChange | None:
        """What of the rows changes with the verdict; None of a change that only begins. Raises VersionGone where this
        host was started anew before it had written what is to be there."""
        if isinstance(change, SnapshotBegun):
            return None
        if isinstance(change, SnapshotGone):
            return self._snapshots.without(change.name, told=not change.begun)
        try:
            return self._snapshots.prepared(change.name, change.created_at, change.gone.split())
        except SnapshotNotFound:
            raise VersionGone(
                f"a host no longer has the version of which snapshot {change.name!r} was to be: it was started anew "
                "meanwhile, or another snapshot was begun under the name",
                hint="take the snapshot again; nothing is left of this one",
                retry_after=0.0,
            ) from None

    def follow(self, change: SnapshotBegun | SnapshotTaken | SnapshotGone) -> None:
        """Do what follows from a change, once it is committed. Under deciding()."""
        if isinstance(change, SnapshotBegun):
            self._begin(change, self._run.ready_state())
            return
        self._forget(change.name, change.created_at)
        if isinstance(change, SnapshotTaken):
            self._saving.submit(self._snapshots.shown, change.gone.split())
        else:
            self._saving.submit(self._snapshots.gone, change.name)

    def held(self, name: str, created_at: float) -> State:
        """The version that a snapshot was begun with, which an average is to be worked out of. Raises VersionGone."""
        with self._lock:
            making = self._making.get(name)
        if making is None or making.begun.created_at != created_at or making.state is None:
            raise VersionGone(f"the version of snapshot {name!r} is no longer held", retry_after=0.0)
        return making.state

    def close(self) -> None:
        """Hold no version any more."""
        with self._lock:
            for making in self._making.values():
                making.take()
            self._making.clear()

    def lent(self) -> list[dict[str, Any]]:
        """As Snapshots.lent()."""
        return self._snapshots.lent()

    def open(self, name: str, average: str) -> TensorFile:
        """The file of one average of a snapshot, for the caller to close. Raises as Snapshots.open()."""
        return self._snapshots.open(name, average)[0]

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

    def _of(self, change: SnapshotTaken | SnapshotGone) -> _Making | None:
        """What is known of the snapshot that a change is about."""
        with self._lock:
            making = self._making.get(change.name)
        return making if making and making.begun.created_at == change.created_at else None

    def _begin(self, begun: SnapshotBegun, state: State) -> None:
        """Write a version as a snapshot, or hold it, in place of another of the name that was begun."""
        making = _Making(begun, state if begun.held else None)
        with self._lock:
            if before := self._making.get(begun.name):
                before.take()
            self._making[begun.name] = making
        if begun.held:
            making.timer = threading.Timer(_HELD_SECONDS, self._let_go, (making,))
            making.timer.daemon = True
            making.timer.start()
        else:
            self._saving.submit(self._make, making, partial(self._write, begun, state))

    def _begin_sum(self, making: _Making, recipe: str) -> None:
        """Write what a recipe makes of the version that is held, if any is."""
        with self._lock:
            state = making.take()
        if state:
            self._saving.submit(self._make, making, partial(self._write_sum, making.begun, recipe, state))

    def _let_go(self, making: _Making) -> None:
        """Hold a version no longer: whoever was to bring the recipe is gone."""
        with self._lock:
            if making.take():
                making.ended = True

    def _make(self, making: _Making, write: Callable[[], None]) -> None:
        """Write a snapshot, and note the end of that."""
        try:
            write()
        except EmaError as fault:  # whoever asks for the vote is refused it
            # Overloaded stands for "still being written", and is asked again.
            lasting = StorageFailed(fault.detail, retry_after=1.0) if isinstance(fault, Overloaded) else fault
            making.fault = lasting
            _log.error("run %s: snapshot %s: %s", self._run.config.run, making.begun.name, fault)
        finally:
            making.ended = True

    def _write(self, begun: SnapshotBegun, state: State) -> None:
        self._snapshots.prepare(begun.name, state, created_at=begun.created_at, key=begun.key)

    def _write_sum(self, begun: SnapshotBegun, recipe: str, state: State) -> None:
        """Raises VersionGone where the ring has lost what the recipe names, and as Snapshots.prepare_average()."""
        if self._summing is None:
            raise InvalidRequest(f"run {self._run.config.run!r} has no ring that averages are worked out of")
        [found] = self._summing.synthesiser.given(read(recipe), state)
        with ExitStack() as opened:
            try:
                source = self._summing.opened([found], opened)
            except FileNotFoundError as dropped:
                raise VersionGone(
                    f"the ring has dropped a snapshot of the recipe: {dropped}", retry_after=0.0
                ) from None
            entries = self._run.layout.shadows
            self._snapshots.prepare_average(
                begun.name, entries, found.info, source.read, created_at=begun.created_at, key=begun.key
            )

    def _forget(self, name: str, created_at: float) -> None:
        with self._lock:
            if name in self._making and self._making[name].begun.created_at == created_at:
                self._making.pop(name).take()
