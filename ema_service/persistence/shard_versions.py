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

Knows which row a restart takes, by the record's revision. Does not know what else a record says, or who decides.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ema_client.errors import MalformedBody
from ema_service.persistence.restoring import Restored
from ema_service.persistence.rows import StoredVersion, dump, read_rows, revision_of
from ema_service.persistence.versions import Versions, Written
from ema_service.shadows.state import State
from ema_service.storage import MEMORY, ShardRow, Slot

__all__ = ["ShardVersions"]


class ShardVersions(Versions):
    """The versions of one shard in slots. Thread-safe: all but save(), settle() and sync() under the run's lock.

    place, of: the shard is number ``place``, from 0, of so many. record: the last one that is durable, as text. voted:
    the version that the record votes for, once a restart has found one; its slot is held until the verdict.

    Versions are kept in slots, also with durability ``process``.
    """

    def __init__(self, shard: ShardRow, *args: Any, **kwargs: Any) -> None:
        """args, kwargs: as for Versions."""
        super().__init__(*args, **kwargs)
        self.place, self.of, self.record = shard.place, shard.of, shard.record
        self.voted: State | None = None
        self._vote: Written | None = None

    @property
    def revision(self) -> int:
        """The revision that the record says the run has come to."""
        return revision_of(self.record)

    # --- what the shard does ----------------------------------------------------------------------------------------

    def promise(self, record: str) -> None:
        """Keep a record that speaks of the same versions as the one before. Raises StorageFailed."""
        self._keep(record, self.revision + (1 if self._vote else 0))

    def vote(self, slot: Slot | None, state: State, record: str) -> None:
        """Keep a record that votes for a version, which is written to ``slot``; None: its bytes are the newest's.

        In place of an earlier vote. Raises StorageFailed, and then the record and the vote before stay.
        """
        newest = self._newest
        held = slot or (newest.slot if newest else None)
        if held is None:
            raise RuntimeError("a version without weights of its own needs one that has them")
        text, synced = dump(state, final=False), newest.synced if newest and slot is None else self._synced_at_once
        try:
            row = self._store.put_vote(
                self._row,
                record,
                held.name,
                text,
                self.revision + 1,
                newest.row if newest else None,
                synced=synced,
            )
        except sqlite3.Error as fault:
            self._doubtful.append(held)
            raise self._failed(f"the vote for version {state.version} could not be kept: {fault}") from fault
        self._doubtful.clear()
        self._vote = Written(row, held, text, (state.version.epoch, state.version.n), state.version.step, synced)
        self.record, self.trouble = record, None

    def confirm(self, record: str) -> None:
        """Keep a record that has come to the next revision: the version voted for, if any, is the newest.

        Raises StorageFailed, and then the vote stands.
        """
        self._keep(record, revision_of(record))
        if self._vote:
            self._go_on_with(self._vote)
        self._vote = self.voted = None

    def discard(self, record: str) -> None:
        """Keep a record without the vote before, or with one that speaks of no version. Raises StorageFailed."""
        self._keep(record, self.revision)
        self._vote = self.voted = None

    def _keep(self, record: str, upto: int) -> None:
        try:
            self._store.keep_record(self._row, record, upto, durable=self._synced_at_once)
        except sqlite3.Error as fault:
            raise self._failed(f"the record of shard {self.place} could not be kept: {fault}") from fault
        self.record, self.trouble = record, None

    @property
    def _synced_at_once(self) -> bool:
        return self._durability == "disk"

    # --- what a shard does not do alone -----------------------------------------------------------------------------

    def save(self, state: State, *, final: bool = False) -> None:  # noqa: ARG002 - each version was kept by its vote
        """Bring the newest version to the medium at a clean stop; its row stays as it was voted for."""
        if final:
            self.sync()

    # --- the way back -----------------------------------------------------------------------------------------------

    def restore(self, *, lost: StoredVersion | None = None, fault: str | None = None) -> Restored:
        """As Versions.restore(): the newest version that the record has come to, and ``voted`` beside it.

        Where versions may be gone there is a fault, and no new epoch: shards of one run go back together or not at all.
        """
        found = super().restore(lost=lost, fault=fault)
        vote = next((row for row in self._all_rows() if (row.row.revision or 0) > self.revision), None)
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
        if not found.moved or found.row is None or found.state is None:
            return found
        state = State(found.row.version(self._setup), found.state.arenas)
        gone = f"versions after {state.version} may be gone, and all shards have to go back together"
        return replace(found, state=state, moved=False, fault=found.fault or gone)

    def _rows(self) -> list[StoredVersion]:
        """The rows of versions that the record has come to, newest first."""
        return [row for row in self._all_rows() if (row.row.revision or 0) <= self.revision]

    def _all_rows(self) -> list[StoredVersion]:
        return [row for row in read_rows(self._store.checkpoints(self._row)) if row.row.folder != MEMORY]
