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

Knows which row a restart takes, by the record's revision. Does not know what else a record says, or who decides.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ema_client.errors import MalformedBody
from ema_client.protocol import RunConfig
from ema_service.memory import Arena
from ema_service.persistence.memory_versions import MemoryVersions
from ema_service.persistence.restoring import Restored
from ema_service.persistence.rows import StoredVersion, dump, read_rows, revision_of
from ema_service.persistence.versions import Versions, Written
from ema_service.shadows.state import State
from ema_service.storage import MEMORY, CheckpointRow, RunRow, ShardRow, Slot, Store

__all__ = ["ShardMemoryVersions", "ShardRecord", "ShardVersions"]


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

    def keep(self, text: str, upto: int) -> None:
        """Replace the record; rows beyond revision ``upto`` go."""
        self._store.keep_record(self._row, text, upto, durable=self.durable)
        self.text = text

    def vote(self, text: str, folder: str, state: str, current: CheckpointRow | None, *, synced: bool) -> CheckpointRow:
        """Replace the record, and add the row of a version of the next revision. Others as for Store.put_vote()."""
        row = self._store.put_vote(self._row, text, folder, state, self.revision + 1, current, synced=synced)
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
    record in the catalog.
    """

    def __init__(self, shard: ShardRow, *args: Any, **kwargs: Any) -> None:
        """args, kwargs: as for Versions."""
        super().__init__(*args, **kwargs)
        self.kept = ShardRecord(shard, self._row, self._store, durable=self._durability == "disk")
        self.place, self.of = shard.place, shard.of
        self.voted: State | None = None
        self._vote: Written | None = None

    @property
    def record(self) -> str:
        """The last record that is on disk."""
        return self.kept.text

    # --- what the shard does ----------------------------------------------------------------------------------------

    def promise(self, record: str) -> None:
        """Keep a record that speaks of the same versions as the one before. Raises StorageFailed."""
        self._keep(record, self.kept.revision + (1 if self._vote else 0))

    def vote(self, slot: Slot | None, state: State, record: str) -> None:
        """Keep a record that votes for a version, which is written to ``slot``; None: its bytes are the newest's.

        In place of an earlier vote. Raises StorageFailed, and then the record and the vote before stay.
        """
        newest = self._newest
        held = slot or (newest.slot if newest else None)
        if held is None:
            raise RuntimeError("a version without weights of its own needs one that has them")
        text, synced = dump(state, final=False), newest.synced if newest and slot is None else self.kept.durable
        try:
            row = self.kept.vote(record, held.name, text, newest.row if newest else None, synced=synced)
        except sqlite3.Error as fault:
            self._doubtful.append(held)
            raise self._failed(f"the vote for version {state.version} could not be kept: {fault}") from fault
        self._doubtful.clear()
        self._vote = Written(row, held, text, (state.version.epoch, state.version.n), state.version.step, synced)
        self.trouble = None

    def confirm(self, record: str) -> None:
        """Keep a record that has come to the next revision: the version voted for, if any, is the newest.

        Raises StorageFailed, and then the vote stands.
        """
        self._keep(record, revision_of(record))
        self.end_vote(committed=True)

    def discard(self, record: str) -> None:
        """Keep a record without the vote before, or with one that speaks of no version. Raises StorageFailed."""
        self._keep(record, self.kept.revision)
        self.end_vote(committed=False)

    def end_vote(self, *, committed: bool) -> None:
        """The version voted for, if any, is the newest, or nobody's."""
        if committed and self._vote:
            self._go_on_with(self._vote)
        self._vote = self.voted = None

    def _keep(self, record: str, upto: int) -> None:
        try:
            self.kept.keep(record, upto)
        except sqlite3.Error as fault:
            raise self._failed(f"the record of shard {self.place} could not be kept: {fault}") from fault
        self.trouble = None

    # --- what a shard does not do alone -----------------------------------------------------------------------------

    def save(self, state: State, *, final: bool = False) -> None:
        """As Versions.save(). Where each version was kept by its vote, its row stays as it is: it is brought to the
        medium at a clean stop."""
        if not self.every:
            super().save(state, final=final)
        elif final:
            self.sync()

    # --- the way back -----------------------------------------------------------------------------------------------

    def restore(self, *, lost: StoredVersion | None = None, fault: str | None = None) -> Restored:
        """As Versions.restore(): the newest version that the record has come to, and ``voted`` beside it.

        Where versions may be gone there is a fault, and no new epoch: shards of one run go back together or not at all.
        """
        found = super().restore(lost=lost, fault=fault)
        vote = self.kept.voted(in_memory=False)
        if self.every and self.kept.voted(in_memory=True) and not found.fault:
            return replace(found, fault=f"the memory that shard {self.place} has voted for is gone")
        if vote is None or found.fault:
            return found
        try:
            self._take_up(vote, found.state)
        except (OSError, MalformedBody) as damage:
            return replace(found, fault=f"the version that shard {self.place} has voted for cannot be read: {damage}")
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
        if found.row and found.state and found.moved:
            state = State(found.row.version(self._setup), found.state.arenas)
            gone = f"versions after {state.version} may be gone, and all shards have to go back together"
            return replace(found, state=state, moved=False, fault=found.fault or gone)
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

    # --- what the shard does ----------------------------------------------------------------------------------------

    def promise(self, record: str) -> None:
        """As ShardVersions.promise()."""
        self._keep(record, self.kept.revision + (1 if self._vote else 0))

    def vote(self, slot: Slot | None, state: State, record: str) -> None:  # noqa: ARG002 - there is none
        """As ShardVersions.vote(), of a version that lies where it was computed."""
        self.write(state)  # of a device, after a clean stop, the current version has no memory file yet
        self._held.append(state)  # beside that of an earlier vote: the row of this one may not come to be
        text = self._dump(state)
        current = self._newest[0] if self._newest else None
        try:
            row = self.kept.vote(record, MEMORY, text, current, synced=False)
        except sqlite3.Error as fault:
            raise self._failed(f"the vote for version {state.version} could not be kept: {fault}") from fault
        self._on_disk.end_vote(committed=False)
        self._vote, self._held, self._trouble = ((row, text), state), [state], None

    def confirm(self, record: str) -> None:
        """As ShardVersions.confirm()."""
        self._keep(record, revision_of(record))
        if self._vote:
            self._newest, state = self._vote
            self.durable_step = state.version.step
            if not self._steps or self._steps[-1] != state.version.step:
                self._note_step(state)
        self._end_vote(committed=True)

    def discard(self, record: str) -> None:
        """As ShardVersions.discard()."""
        self._keep(record, self.kept.revision)
        self._end_vote(committed=False)

    def _keep(self, record: str, upto: int) -> None:
        try:
            self.kept.keep(record, upto)
        except sqlite3.Error as fault:
            raise self._failed(f"the record of shard {self.place} could not be kept: {fault}") from fault
        self._trouble = None

    def _end_vote(self, *, committed: bool) -> None:
        self._on_disk.end_vote(committed=committed)
        self._vote = self.voted = None
        self._held = []  # the run holds its current state

    # --- now and then, and the way back -----------------------------------------------------------------------------

    def save(self, state: State, *, final: bool = False) -> None:
        """As MemoryVersions.save(). Memory that was voted for stays at a clean stop, too."""
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
