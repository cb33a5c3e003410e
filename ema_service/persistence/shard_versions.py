"""The versions of a shard: one of several hosts that have a run's parameters between them, and decide together.

A version is not the run's when it is written: the shard votes for it, and waits for a verdict (cluster). So the row of
a version says which *revision* of the run the version leads to, and comes with the shard's *record* in one transaction:
whatever a crash leaves, the record tells what was promised, and the version that it speaks of is on disk.

| | in one transaction |
|---|---|
| promise() | the record |
| vote() | the record; the row of the version, of the revision after the record's; no row of an earlier vote |
| confirm() | the record: from here on a restart takes that row |
| discard() | the record; the row goes |

Versions lie in slots (ShardVersions) or in memory files (ShardMemoryVersions), as those of any run do.

Beside those in memory files a shard has *checkpoints*, which are taken of one revision on all shards, and each of which
says of which: after a loss of the machine all shards go back to one that all of them have. There are two at most: one
that all have for certain, and one that is newer.

Knows which row a restart takes, by the record's revision. Does not know what else a record says, or who decides.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ema_client.errors import MalformedBody, Overloaded, SnapshotDamaged
from ema_client.protocol import RunConfig
from ema_service.memory import Arena
from ema_service.persistence.memory_versions import MemoryVersions
from ema_service.persistence.restoring import Restored
from ema_service.persistence.rows import (
    StoredVersion,
    dump,
    dump_setup,
    is_lost,
    latest_in,
    read_rows,
    revision_of,
    settled_in,
)
from ema_service.persistence.versions import Versions, Written
from ema_service.shadows.state import Setup, State, Version
from ema_service.storage import MEMORY, CheckpointRow, RowChange, RunRow, ShardRow, Slot, Store

__all__ = ["ShardMemoryVersions", "ShardRecord", "ShardVersions"]

_log = logging.getLogger(__name__)

_WAITS = "its machine went down, and all hosts go back together to a checkpoint, once all of them are there"


class ShardRecord:
    """The record of a shard, and which rows it has come to. Methods that write raise sqlite3.Error, and then wrote
    nothing.

    durable: whether a record outlives the machine when a call returns.
    """

    def __init__(self, shard: ShardRow, row: RunRow, store: Store, *, durable: bool) -> None:
        self.place, self.of, self.text = shard.place, shard.of, shard.record
        self.durable = durable
        self._row = row
        self._store = store

    @property
    def revision(self) -> int:
        """The revision that the run has come to."""
        return revision_of(self.text)

    @property
    def settled(self) -> int:
        """The revision whose checkpoint all shards have, 0 before there is one."""
        return settled_in(self.text)

    @property
    def lost(self) -> bool:
        """Whether the machine took versions with it, and the shards have not gone back yet."""
        return is_lost(self.text)

    def keep(
        self, text: str, upto: int, since: int = 0, change: RowChange | None = None, *, durable: bool = False
    ) -> None:
        """Replace the record; rows beyond revision ``upto`` go, and those before ``since``. change: of other rows, in
        the same transaction. durable: the record outlives the machine at once, as it does with a change that lasts."""
        lasts = change is not None and change.lasts
        durable = durable or lasts or self.durable or self.lost or is_lost(text)
        self._store.keep_record(self._row, text, upto, since=since, durable=durable, change=change)
        self.text = text

    def vote(
        self,
        text: str,
        folder: str,
        state: str,
        current: CheckpointRow | None,
        *,
        synced: bool,
        revision: int | None,
        durable: bool = False,
    ) -> CheckpointRow:
        """Replace the record, and add the row of a version of this revision, by default of the next. durable: the row
        outlives the machine at once, although the version does not. Others as for Store.put_vote()."""
        row = self._store.put_vote(
            self._row,
            text,
            folder,
            state,
            revision or self.revision + 1,
            current,
            synced=synced,
            durable=synced or durable or self.lost,
        )
        self.text = text
        return row

    def has_come_to(self, row: StoredVersion) -> bool:
        """Whether the version of a row was committed."""
        return (row.row.revision or 0) <= self.revision

    def voted(self, *, in_memory: bool) -> StoredVersion | None:
        """The row of the version that was voted for, None where there is none."""
        rows = read_rows(self._store.checkpoints(self._row))
        found = [row for row in rows if not self.has_come_to(row) and (row.row.folder == MEMORY) == in_memory]
        return found[0] if found else None


class ShardVersions(Versions):
    """The versions of one shard in slots. Thread-safe: all but save(), settle() and sync() under the run's lock.

    place, of: the shard is number ``place``, from 0, of so many. record: the last one that is durable, as text. voted:
    the version that the record votes for, once a restart has found one; its slot is held until the verdict. kept: the
    record in the catalog. lost: whether the machine took versions with it, so that all shards have to go back.

    More than twenty methods: what a vote, a verdict and a checkpoint do with a version, and the way back.
    """

    def __init__(self, shard: ShardRow, *args: Any, **kwargs: Any) -> None:
        """args, kwargs: as for Versions."""
        super().__init__(*args, **kwargs)
        self.kept = ShardRecord(shard, self._row, self._store, durable=self._durability == "disk")
        self.place, self.of = shard.place, shard.of
        self.voted: State | None = None
        self.lost = False
        self._vote: Written | None = None
        #: The revision of which a checkpoint is being written; None at a clean stop, of the one that the run is at.
        self._taking: int | None = None
        #: By revision: checkpoints, whose slots nobody writes to. Another mapping at each change.
        self._checkpoints: dict[int, Written] = {}

    @property
    def record(self) -> str:
        """The last record that is on disk."""
        return self.kept.text

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """The revisions of which there is a checkpoint, the oldest first."""
        return tuple(sorted(self._checkpoints))

    def has(self, state: State) -> bool:
        """Whether the newest checkpoint is of this very state."""
        return self._newest is not None and self._newest.text == dump(state, final=False)

    def take_checkpoint(self, state: State, revision: int) -> None:
        """Write a state, which is that of a revision, to the medium. Raises StorageFailed."""
        with self._saving:
            if self._closed:
                return
            self._taking = revision
            try:
                self._save(state, final=False)
            except (OSError, sqlite3.Error, Overloaded) as fault:
                raise self._failed(f"version {state.version} could not be kept: {fault}") from fault
            finally:
                self._taking = None
            self.trouble = None

    def keep_only(self, revision: int) -> None:
        """Drop all checkpoints but that of one revision, and give their slots back. Raises StorageFailed."""
        with self._saving:
            self._keep_only(revision)

    def _keep_only(self, revision: int) -> None:
        for each in self.checkpoints:
            if each == revision or self._closed:
                continue
            try:
                self._store.remove_checkpoint(self._row, self._checkpoints[each].slot.name)
            except sqlite3.Error as fault:
                raise self._failed(f"the checkpoint of revision {each} could not be dropped: {fault}") from fault
            self._checkpoints = {kept: written for kept, written in self._checkpoints.items() if kept != each}
            self._newest = self._checkpoints.get(revision)
            self._anchor = self._newest.slot if self._newest else None
            self._anchor_step = self._newest.step if self._newest else None

    def read_checkpoint(self, revision: int) -> State:
        """The state of a revision. Raises SnapshotDamaged where its checkpoint is not there, or damaged."""
        rows = [row for row in self._rows() if row.row.revision == revision and row.row.folder != MEMORY]
        try:
            if not rows:
                raise OSError("it is not there")
            return self._search.read(rows[0])
        except (OSError, MalformedBody) as fault:
            raise SnapshotDamaged(
                f"the checkpoint of revision {revision} of run {self._run!r} cannot be read: {fault}"
            ) from fault

    def remark(self, event: str, version: Version | None) -> None:
        """Log what became of the run, and add it to the run's timeline."""
        self._remark(event, version)

    @property
    def _revision(self) -> int | None:
        return self.kept.revision if self._taking is None else self._taking

    def _go_on_with(self, written: Written) -> None:
        super()._go_on_with(written)
        if not self.every and written.row.revision is not None:
            self._checkpoints = {**self._checkpoints, written.row.revision: written}

    def _hold(self, row: StoredVersion, older: Sequence[StoredVersion]) -> Written:
        written = super()._hold(row, older)
        if not self.every:
            self._checkpoints = {each.row.revision: self._held(each) for each in (row, *older) if each.row.revision}
        return written

    def _held(self, row: StoredVersion) -> Written:
        """A checkpoint that is there, whose slot is held from now on."""
        newest, anchor = self._newest, self._anchor
        if newest and newest.slot.name == row.row.folder:
            return newest
        slot = anchor if anchor and anchor.name == row.row.folder else self._slots.hold(row.row.folder)
        return Written(row.row, slot, row.row.state, row.age, row.step, row.row.synced)

    # --- what the shard does ----------------------------------------------------------------------------------------

    def promise(self, record: str) -> None:
        """Keep a record that speaks of the same versions as the one before, also of those that cannot be read. Raises
        StorageFailed."""
        self._keep(record, latest_in(record))

    def vote(self, slot: Slot | None, state: State, record: str, revision: int | None = None) -> None:
        """Keep a record that votes for a version, which is written to ``slot``; None: its bytes are the newest's.

        In place of an earlier vote. revision: that the version leads to, by default the next. Raises StorageFailed, and
        then the record and the vote before stay.
        """
        newest = self._newest
        held = slot or (newest.slot if newest else None)
        if held is None:
            raise RuntimeError("a version without weights of its own needs one that has them")
        text, synced = dump(state, final=False), newest.synced if newest and slot is None else self.kept.durable
        try:
            current = newest.row if newest else None
            row = self.kept.vote(record, held.name, text, current, synced=synced, revision=revision)
        except sqlite3.Error as fault:
            self._doubtful.append(held)
            raise self._failed(f"the vote for version {state.version} could not be kept: {fault}") from fault
        self._doubtful.clear()
        self._vote = Written(row, held, text, (state.version.epoch, state.version.n), state.version.step, synced)
        self.trouble = None

    def confirm(self, record: str, since: int = 0, change: RowChange | None = None) -> None:
        """Keep a record that has come to the next revision: the version voted for, if any, is the newest.

        since: the revision whose version is the first that the run still has. change: as for ShardRecord.keep(). Raises
        StorageFailed, and then the vote stands.
        """
        self._keep(record, revision_of(record), since, change)
        self.end_vote(committed=True)

    def discard(self, record: str, *, durable: bool = False) -> None:
        """Keep a record without the vote before, or with one that speaks of no version. durable: as for
        ShardRecord.keep(). Raises StorageFailed."""
        self._keep(record, self.kept.revision, durable=durable)
        self.end_vote(committed=False)

    def empty(self, record: str, setup: Setup) -> None:
        """Keep a record without any version, and other averages, as a host has whose disk is new. Raises StorageFailed,
        and then all is as it was."""
        self._keep(record, 0, 1, RowChange(averages=dump_setup(setup)))
        self.forget()

    def forget(self) -> None:
        """There are no versions any more: their slots are free."""
        self.end_vote(committed=False)
        self._hold_none()
        self._checkpoints = {}

    def end_vote(self, *, committed: bool) -> None:
        """The version voted for, if any, is the newest, or nobody's."""
        if committed and self._vote:
            self._go_on_with(self._vote)
        self._vote = self.voted = None

    def _keep(
        self, record: str, upto: int, since: int = 0, change: RowChange | None = None, *, durable: bool = False
    ) -> None:
        try:
            self.kept.keep(record, upto, since, change, durable=durable)
        except sqlite3.Error as fault:
            raise self._failed(f"the record of shard {self.place} could not be kept: {fault}") from fault
        self.trouble = None

    # --- what a shard does not do alone -----------------------------------------------------------------------------

    def save(self, state: State, *, final: bool = False) -> None:
        """As Versions.save(), at a clean stop alone: other checkpoints are taken on all shards at once. Where each
        version was kept by its vote, its row stays as it is, and is brought to the medium."""
        if self.every and final:
            self.sync()
        elif final:
            super().save(state, final=True)

    def _save(self, state: State, *, final: bool) -> None:
        if final and self._newest and self._newest.text != dump(state, final=False):
            self._keep_only(self.kept.settled)  # there is room for two
        super()._save(state, final=final)

    # --- the way back -----------------------------------------------------------------------------------------------

    def restore(self, *, lost: StoredVersion | None = None, fault: str | None = None) -> Restored:
        """As Versions.restore(): the newest version that the record has come to, and ``voted`` beside it.

        Where versions may be gone there is a fault, and no new epoch: shards of one run go back together or not at all.
        """
        self._checkpoints = {}
        found = super().restore(lost=lost, fault=fault)
        vote = self.kept.voted(in_memory=False)
        if self.every and self.kept.voted(in_memory=True) and not found.fault:
            return replace(found, fault=f"the memory that shard {self.place} has voted for is gone")
        if vote is None:
            return found
        try:
            self._take_up(vote, found.state)
        except (OSError, MalformedBody) as damage:
            told = f"the version that shard {self.place} has voted for cannot be read: {damage}"
            return replace(found, fault=found.fault or told)
        return found

    def _take_up(self, vote: StoredVersion, current: State | None) -> None:
        """Hold the version that was voted for. Raises OSError, MalformedBody."""
        newest, version = self._newest, vote.version(self._setup)
        same = newest is not None and newest.slot.name == vote.row.folder
        if newest and current and same:
            slot, self.voted = newest.slot, State(version, current.arenas)
        else:
            slot, self.voted = self._slots.hold(vote.row.folder), self._search.read(vote)
        self._vote = Written(vote.row, slot, vote.row.state, vote.age, vote.step, vote.row.synced)

    def _find(self, rows: Sequence[StoredVersion], lost: StoredVersion | None, fault: str | None) -> Restored:
        found = super()._find(rows, lost, fault)
        gone = self.kept.lost or found.moved or (found.state is None and lost is not None)
        # Damage is told, and waits for somebody who mends it; unless the machine took the newest version anyway.
        excused = fault is None and (self.kept.lost or lost is not None or found.fault is None)
        self.lost = not self.every and gone and excused
        if found.row and found.state and (found.moved or self.lost):
            state = State(found.row.version(self._setup), found.state.arenas)
            told = f"versions after {state.version} may be gone, and all shards have to go back together"
            return replace(found, state=state, moved=False, fault=_WAITS if self.lost else found.fault or told)
        if self.lost:
            return replace(found, fault=_WAITS)
        if found.state is None and (rows or lost):
            return replace(found, fault=found.fault or "all its versions are gone, and other shards have theirs")
        return found

    def stored(self) -> list[StoredVersion]:
        """The rows of versions that the record has come to, newest first."""
        return [row for row in super().stored() if self.kept.has_come_to(row)]

    def _forget_memory(self) -> None:
        """Nothing is forgotten: what was voted for may lie in memory files. A later vote takes the older rows along."""


class ShardMemoryVersions(MemoryVersions):
    """The versions of one shard in memory files, of durability ``process``. Thread-safe as MemoryVersions.

    place, of, record, voted: as of ShardVersions. A version that waits beside the current one and a vote takes one more
    file an average than an ordinary run has.
    """

    def __init__(
        self, shard: ShardRow, config: RunConfig, row: RunRow, store: Store, *args: Any, **kwargs: Any
    ) -> None:
        """args, kwargs: as for MemoryVersions."""
        layout, memory, *_ = args
        checkpoints = ShardVersions(shard, config, row, store, layout, memory, every=False, setup=kwargs.get("setup"))
        super().__init__(config, row, store, *args, **kwargs, checkpoints=checkpoints)
        self.kept = checkpoints.kept
        self.place, self.of = shard.place, shard.of
        self._on_disk = checkpoints
        self.voted: State | None = None
        #: The row, None where the version lies in a slot: memory files were not to be had when it was voted for.
        self._vote: tuple[tuple[CheckpointRow, str] | None, State] | None = None
        self._vote_fault: str | None = None

    @property
    def record(self) -> str:
        """The last record that outlives the process."""
        return self.kept.text

    @property
    def on_disk(self) -> ShardVersions:
        """The checkpoints, and how all shards go back to one."""
        return self._on_disk

    # --- what the shard does ----------------------------------------------------------------------------------------

    def promise(self, record: str) -> None:
        """As ShardVersions.promise()."""
        self._keep(record, latest_in(record))

    def vote(
        self,
        slot: Slot | None,  # noqa: ARG002 - there is none
        state: State,
        record: str,
        revision: int | None = None,
    ) -> None:
        """As ShardVersions.vote(), of a version that lies where it was computed.

        The row of the first version outlives the machine: so a shard that comes up without a row never had weights.
        """
        self.write(state)  # of a device, after a clean stop, the current version has no memory file yet
        self._held.append(state)  # beside that of an earlier vote: the row of this one may not come to be
        text = self._dump(state)
        current = self._newest[0] if self._newest else None
        try:
            first = self._newest is None
            row = self.kept.vote(record, MEMORY, text, current, synced=False, revision=revision, durable=first)
        except sqlite3.Error as fault:
            raise self._failed(f"the vote for version {state.version} could not be kept: {fault}") from fault
        self._on_disk.end_vote(committed=False)
        self._vote, self._held, self._trouble = ((row, text), state), [state], None

    def confirm(self, record: str, since: int = 0, change: RowChange | None = None) -> None:
        """As ShardVersions.confirm()."""
        self._keep(record, revision_of(record), since, change)
        if since and not self._vote:
            self._newest = self.durable_step = None
        if self._vote:
            self._newest, state = self._vote
            self.durable_step = state.version.step
            if not self._steps or self._steps[-1] != state.version.step:
                self._note_step(state)
        self._end_vote(committed=True)

    def discard(self, record: str, *, durable: bool = False) -> None:
        """As ShardVersions.discard()."""
        self._keep(record, self.kept.revision, durable=durable)
        self._end_vote(committed=False)

    def empty(self, record: str, setup: Setup) -> None:
        """As ShardVersions.empty()."""
        self._keep(record, 0, 1, RowChange(averages=dump_setup(setup)))
        self._on_disk.forget()
        self._newest = self.durable_step = None
        self._end_vote(committed=False)

    def _keep(
        self, record: str, upto: int, since: int = 0, change: RowChange | None = None, *, durable: bool = False
    ) -> None:
        try:
            self.kept.keep(record, upto, since, change, durable=durable)
        except sqlite3.Error as fault:
            raise self._failed(f"the record of shard {self.place} could not be kept: {fault}") from fault
        self._trouble = None

    def _end_vote(self, *, committed: bool) -> None:
        self._on_disk.end_vote(committed=committed)
        self._vote = self.voted = None
        self._held = []  # the run holds its current state

    # --- now and then, and the way back -----------------------------------------------------------------------------

    def save(self, state: State, *, final: bool = False) -> None:
        """As MemoryVersions.save(), with a checkpoint at a clean stop alone. Memory that was voted for stays then."""
        super().save(state, final=final and self._vote is None)

    def restore(self) -> Restored:
        """As MemoryVersions.restore(), and as ShardVersions.restore()."""
        found = super().restore()
        if self._vote_fault and not found.fault:
            return replace(found, fault=self._vote_fault)
        if self._on_disk.voted:
            self.voted = self._on_disk.voted
            self._vote = None, self.voted
        return found

    def _gone(self) -> StoredVersion | None:
        """What was voted for, where it lies in another folder."""
        row = self.checkpoints.memory_row() or self.kept.voted(in_memory=True)
        return row if row and row.said and row.nonce != self._nonce else None

    def _beside(self, state: State | None) -> list[tuple[StoredVersion, State]]:
        row = self.kept.voted(in_memory=True)
        if row is None:
            return []
        try:
            if row.nonce != self._nonce:
                raise OSError("it is gone")
            voted = self._in_memory(row, self._attached_files(state))
        except OSError as missing:
            self._vote_fault = f"the memory that shard {self.place} has voted for cannot be read: {missing}"
            return []
        self._vote, self.voted = ((row.row, row.row.state), voted), voted
        return [(row, voted)]

    def _attached_files(self, state: State | None) -> dict[str, Arena]:
        """The arenas of a state that lie in memory files, by their files."""
        named = {self._pool.name_of(arena.host): arena for arena in (state.arenas if state else ())}
        return {name: arena for name, arena in named.items() if name}
