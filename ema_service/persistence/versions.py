"""A run's versions on disk: written to slots as they are computed, or as checkpoints now and then.

With ``durability`` beyond ``memory`` every version is written to disk as it is computed, piece by piece behind the
averaging, and its row is committed before anyone is told of the version: there is no journal and nothing to replay.
With ``memory`` a checkpoint is taken every so often.

A slot may be overwritten when nobody holds it (Slots). Versions hold the newest version's slot, the slot of the newest
*synced* version (the anchor: what a power loss leaves for certain), and the slots being written or synced.

Knows how a state becomes rows and files, and in which order. Does not know how a file or a row is made durable
(storage), how an update is decided, or HTTP. Methods block: call them off the event loop.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from ema_client.errors import Overloaded, StorageFailed, Superseded
from ema_client.protocol import MAX_STEP, Durability, RunConfig, WeightsInfo
from ema_service.averaging import Digest
from ema_service.bodies.outgoing import header_of
from ema_service.memory import Arena, Layout, Memory
from ema_service.persistence.restoring import Restored, Search
from ema_service.persistence.rows import StoredVersion, dump, dump_setup, read_rows
from ema_service.persistence.timeline import Timeline
from ema_service.shadows.state import Average, Member, Setup, State, Version, schedule_told
from ema_service.storage import MEMORY, CheckpointRow, Extent, RunRow, Slot, Store, TensorFile, padded_bytes

__all__ = ["SlotPlace", "Versions", "Written"]

_log = logging.getLogger(__name__)

#: Slots made when a run is created, so that a disk too small for the run is noticed then: one to write beside the
#: newest, and where syncing runs behind, the anchor.
_SLOTS = {"memory": 0, "process": 3, "disk": 2}
#: Where versions lie in memory files: a checkpoint being written beside the newest.
_CHECKPOINT_SLOTS = {"memory": 0, "process": 2, "disk": 2}
#: Bytes digested at once, of a version that lies in memory, while the bytes before them are written.
_DIGESTED_AT_ONCE = 16 << 20
#: Retry-After of a push whose version could not be written, in seconds.
_RETRY_SECONDS = 1.0


@dataclass(slots=True)
class Written:
    """A version on disk. It holds its slot as long as this object lives, and no memory: the run may be further on.

    text: of its row, as it is in the catalog now. age: as StoredVersion.age. step: the version's. synced: whether the
    version outlives the machine, not only the process.
    """

    row: CheckpointRow
    slot: Slot
    text: str
    age: tuple[int, int]
    step: int | None
    synced: bool


class SlotPlace:
    """A slot that one version is written to, and its row."""

    def __init__(self, versions: Versions, slot: Slot) -> None:
        self.slot = slot
        self._versions = versions

    def write(self, average: str, data: memoryview, upto: int, start: int = 0) -> None:
        """As Slot.write()."""
        self.slot.write(average, data, upto, start)

    def finish(self, state: State) -> None:
        """As Versions.write()."""
        self._versions.write(self.slot, state)

    def commit(self, state: State) -> None:
        """As Versions.commit()."""
        self._versions.commit(self.slot, state)


class Versions:
    """The versions of one run on disk. Thread-safe: commit() and amend() are called under the run's lock.

    every: whether each version is on disk before anyone is told of it; else a checkpoint now and then, by save().
    durable_step: the latest step that a restart would bring back. trouble: why the current state could not be kept, or
    None.

    More than twenty methods: what a version goes through, from the slot that is taken for it to the row that makes it
    count, and the way back. More than a dozen attributes: what a version is made of (row, store, layout, memory, run,
    durability), where versions lie (slots, newest, anchor, doubtful), what was learnt of the disk, and the locks.
    """

    def __init__(
        self,
        config: RunConfig,
        row: RunRow,
        store: Store,
        layout: Layout,
        memory: Memory,
        *,
        every: bool | None = None,
        reason: str | None = None,
        setup: Setup | None = None,
    ) -> None:
        """config: of the run as it was created. setup: which averages it has by now; None: those of ``config``.

        every: by default where the run's durability wants it; False where versions are kept elsewhere, too.

        reason: why a run of durability ``process`` has its versions here and not in memory files.
        """
        self._config = config
        self._run = config.run
        self._durability: Durability = config.durability or "memory"
        self.every = self._durability != "memory" if every is None else every
        self._reason = reason
        self._row = row
        self._store = store
        self._layout = layout
        self._memory = memory
        self._setup = setup or Setup.of(config)
        extents = {member.name: self._extent(member) for member in self._setup.members}
        # Nobody waits for a checkpoint, and a push that comes meanwhile wants the cores.
        self._slots = store.slots(row, extents, behind=self.every, patient=not self.every or self._durability == "disk")
        self._newest: Written | None = None
        self._anchor: Slot | None = None
        self._anchor_step: int | None = None
        #: Slots whose row could not be committed. The row may be in the catalog's log all the same, and come up after a
        #: crash; so nobody writes to these slots until a later row is committed.
        self._doubtful: list[Slot] = []
        #: The row of a version that could not be synced. A second sync would succeed and mean nothing: the kernel
        #: forgets which pages it failed to write.
        self._unsyncable: int | None = None
        self.durable_step: int | None = None
        self.trouble: str | None = None
        self._closed = False
        self._syncing = threading.Lock()
        self._saving = threading.Lock()

    # --- every version ----------------------------------------------------------------------------------------------

    def allocate(self) -> None:
        """Take the disk space that the run will need. Raises OSError."""
        count = (_SLOTS if self.every else _CHECKPOINT_SLOTS)[self._durability]
        with self._store.taking(count * len(self._setup.members) * self._layout.shadow_bytes):
            self._slots.allocate(count)

    def take(self, averages: Collection[str]) -> SlotPlace | None:
        """A place for the next version, in a slot; None where versions are kept now and then only.

        averages: of that version, by name. Touches no disk; dropping the place gives its slot back. Raises Superseded
        where an average was removed.
        """
        return SlotPlace(self, self._take(averages)) if self.every else None

    def write(self, slot: Slot, state: State) -> None:
        """Write to the slot whatever of the state is not written yet; with ``disk``, sync all of it.

        Raises StorageFailed; Superseded where the run was deleted meanwhile.
        """
        try:
            self._write(slot, state)
            if self._durability == "disk":
                slot.files.sync()
        except OSError as fault:
            raise self._failed(f"version {state.version} could not be written: {fault}") from fault

    def commit(self, slot: Slot, state: State) -> None:
        """Make the state what a restart brings back, as far as the run's durability goes. Raises StorageFailed."""
        self._put(slot, state, final=False, synced=self._durability == "disk")
        self.trouble = None

    def amend(self, state: State) -> None:
        """Note another decay or counter of the newest version; its weights are as they were. Raises StorageFailed."""
        if not self.every or self._newest is None:
            return
        try:
            self._amend(self._newest, state, final=False, durable=self._durability == "disk")
        except sqlite3.Error as fault:
            raise self._failed(f"the change could not be kept: {fault}") from fault

    @property
    def checkpoint_step(self) -> int | None:
        """The latest step that the machine's end leaves for certain."""
        return self._anchor_step

    @property
    def where(self) -> str:
        """Where versions are kept, for people to read."""
        if not self.every:
            return "checkpoints on disk"
        return f"slots on disk, each of them: {self._reason}" if self._reason else "slots on disk"

    @property
    def unsynced(self) -> bool:
        """Whether sync() has something to do."""
        newest = self._newest
        return newest is not None and not newest.synced and newest.row.id != self._unsyncable

    def sync(self) -> None:
        """Sync the newest version: a power loss then leaves at least this version.

        Versions superseded meanwhile are skipped.

        A failure is logged and told as ``trouble``; the version synced before stays what a power loss leaves. While
        another thread syncs there is nothing to do.
        """
        if self._syncing.acquire(blocking=False):
            try:
                self._sync()
            finally:
                self._syncing.release()

    def _sync(self) -> bool:
        """Sync the newest version, and say whether it is on the medium. Under the lock of syncing."""
        newest = self._newest
        if newest and self.unsynced:
            try:
                newest.slot.files.sync()
                # The old anchor's slot is given up for a row that outlives the machine, never before: the rows of
                # versions are committed without a sync, so a power loss may roll back the newest row; if the old anchor
                # were overwritten by then, both versions would be gone.
                self._store.mark_synced(newest.row)
            except (OSError, sqlite3.Error) as fault:
                self._unsyncable = newest.row.id
                self._tell(f"what {newest.slot.name} holds could not be synced: {fault}")
            else:
                newest.synced, self._anchor, self._anchor_step = True, newest.slot, newest.step
        return newest is None or newest.synced

    # --- now and then -----------------------------------------------------------------------------------------------

    def save(self, state: State, *, final: bool = False) -> None:
        """Take a synced checkpoint, if the state moved since the last one. Raises StorageFailed.

        final: nothing will be applied after this state, so versions may go on from it when the run comes back. Where
        every version is kept, only a final call has anything to do. After a failure the checkpoint before stays, and
        the next call tries again.
        """
        with self._saving:
            if self._closed or (self.every and not final):
                return
            if final:
                self.sync()
            try:
                self._save(state, final=final)
            except (OSError, sqlite3.Error, Overloaded) as fault:
                # Overloaded: of the host's memory, for the copy of a device's shadows.
                raise self._failed(f"version {state.version} could not be kept: {fault}") from fault
            self.trouble = None

    def settle(self, state: State) -> None:
        """Bring the state, or a later one, to the medium now. Waits for a sync under way. Raises StorageFailed."""
        self.save(state)
        with self._syncing:
            if not self._sync():
                raise self._failed(self.trouble or f"version {state.version} could not be synced")

    # --- other averages ---------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """How many averages the run is to have."""
        return len(self._setup.members)

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """Within the block nothing is saved, and the run is not deleted. Waits for a save under way."""
        with self._saving:
            yield

    def make_room(self, setup: Setup) -> None:
        """Take the disk space that the averages of ``setup`` will need, in every slot, beside those that are there.
        Raises OSError, and then took none."""
        more = self._slots.lacking({member.name: self._extent(member) for member in setup.members})
        count = (_SLOTS if self.every else _CHECKPOINT_SLOTS)[self._durability]
        if more:
            with self._store.taking(count * len(more) * self._layout.shadow_bytes):
                self._slots.add(more)

    def keep_setup(self, setup: Setup) -> None:
        """Make these averages those of the run, from the answer on, whatever becomes of the machine. Raises
        StorageFailed."""
        try:
            self._store.set_averages(self._row, dump_setup(setup))
        except sqlite3.Error as fault:
            raise StorageFailed(
                f"the averages of run {self._run!r} could not be kept: {fault}", retry_after=_RETRY_SECONDS
            ) from fault

    def change_averages(self, setup: Setup) -> None:
        """Versions have these averages from now on; nothing is written."""
        self._setup = setup

    def give_back(self) -> None:
        """Give back the disk space of averages that the run does not have any more.

        Also at a start: the server before may have been killed once they were removed.
        """
        self._slots.keep_only([member.name for member in self._setup.members])

    # --- the end ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Within the block nothing is saved; after it nothing ever, unless the block raised. Waits for a save under
        way."""
        with self._saving:
            yield
            self._closed = True

    def free(self) -> None:
        """Nothing to do: disk space goes with the run's folder."""

    # --- the way back -----------------------------------------------------------------------------------------------

    def restore(self, *, lost: StoredVersion | None = None, fault: str | None = None) -> Restored:
        """What the run comes up with: the newest version that is whole. Called before anyone uses the run.

        Where a newer version was damaged there is a fault, with the older version's weights, if there is one. Without
        weights there is a fault where a symbolic link stands in the place of the run's folder, or of a slot in it.

        lost: a newer version that lay in memory, by default that of the catalog. fault: why it should not have been
        lost, None where that may happen.
        Raises sqlite3.Error.
        """
        self._newest = self._anchor = None
        rows = self._rows()
        lost = lost or self.memory_row()
        try:
            self._slots.check()
        except OSError as unreadable:
            # Told here and not by reading: there may be no row yet, or only a row that a power loss would excuse.
            last_epoch = max((row.epoch for row in [*rows, *([lost] if lost else [])]), default=0)
            found = Restored(last_epoch=last_epoch, fault=f"its files cannot be read: {unreadable}")
        else:
            self.give_back()
            found = self._find(rows, lost, fault)
        self._go_on_from(found)
        if found.fault:
            _log.error("run %s is degraded: %s", self._run, found.fault)
        return found

    def _find(self, rows: Sequence[StoredVersion], lost: StoredVersion | None, fault: str | None) -> Restored:
        """As Search.find()."""
        return self._search.find(rows, lost, fault)

    @property
    def _search(self) -> Search:
        return Search(self._run, self._setup, self._durability, self._open, self._layout, self._memory)

    def _go_on_from(self, found: Restored) -> None:
        """Hold the slots of the restored version and of its anchor: the versions that follow are written beside
        them."""
        row, state = found.row, found.state
        if row is None or state is None:
            return
        version = state.version
        if found.moved:
            self._remark(f"back at step {version.step} as version {version}; later updates, if any, are gone", version)
        written = self._hold(row, found.older)
        self.durable_step = version.step
        if found.fault is None:
            # The version is no longer final, and of this epoch: said before anything can follow it. A damaged run is
            # left as it is until someone decides.
            self._amend(written, state, final=False, durable=True)
            self._forget_memory()

    def _forget_memory(self) -> None:
        """A version in memory files, if there is one, is not the newest any more."""
        self._store.remove_checkpoint(self._row, MEMORY)

    def leave(self, fault: str) -> Restored:
        """Read nothing, and let nobody write over what is there: the run comes up without weights, for ``fault``."""
        rows = self._rows()
        self._doubtful += [self._slots.hold(row.row.folder) for row in rows]
        return Restored(last_epoch=max((row.epoch for row in rows), default=0), fault=fault)

    def go_on_beside(self) -> None:
        """Hold the newest checkpoint as it is, unread: the run comes up with a newer version from elsewhere."""
        self.give_back()
        rows = [row for row in self._rows() if row.said and row.row.synced]
        if rows:
            self._hold(rows[0], rows[1:])
            self.durable_step = rows[0].step

    def _hold(self, row: StoredVersion, older: Sequence[StoredVersion]) -> Written:
        """Let nobody write over the version of ``row``, nor over the newest that is on the medium."""
        written = Written(row.row, self._slots.hold(row.row.folder), row.row.state, row.age, row.step, row.row.synced)
        anchor = next((each for each in (row, *older) if each.row.synced), None)
        self._newest = written
        self._anchor = written.slot if anchor is row else self._slots.hold(anchor.row.folder) if anchor else None
        self._anchor_step = anchor.step if anchor else None
        return written

    def _hold_none(self) -> None:
        """There are no versions any more, and anybody may write to their slots."""
        self._newest = self._anchor = None
        self._anchor_step = self.durable_step = None

    def memory_row(self) -> StoredVersion | None:
        """The row of a version in memory files that is newer than every version on disk, or cannot be read."""
        found = [row for row in self.stored() if row.row.folder == MEMORY]
        newest = max((row.age for row in self._rows()), default=(0, -1))
        return found[0] if found and (not found[0].said or found[0].age > newest) else None

    def stored(self) -> list[StoredVersion]:
        """The rows of versions, on disk and in memory files, newest first. Raises sqlite3.Error."""
        return read_rows(self._store.checkpoints(self._row))

    def _rows(self) -> list[StoredVersion]:
        """The rows of versions on disk, newest first."""
        return [row for row in self.stored() if row.row.folder != MEMORY]

    def _open(self, row: StoredVersion, average: str) -> TensorFile:
        return self._store.open_checkpoint(self._row, row.row, average)

    # ----------------------------------------------------------------------------------------------------------------

    def _save(self, state: State, *, final: bool) -> None:
        """Write and sync a new checkpoint, or mark the newest row as final. Raises OSError, sqlite3.Error."""
        newest, version = self._newest, state.version
        if newest and newest.age > (version.epoch, version.n):
            return  # a later state was saved while this one waited for its turn
        state = state.only(self._setup.members)  # an average may have been removed meanwhile
        if newest is None or not newest.synced or newest.text != dump(state, final=False):
            slot = self._take([average.name for average in state.version.averages])
            self._write(slot, state)
            slot.files.sync()
            self._put(slot, state, final=final, synced=True)
        elif final:
            self._amend(newest, state, final=True, durable=True)

    def _write(self, slot: Slot, state: State) -> None:
        """Write the averages that are not written yet, then the headers. Raises OSError."""
        pairs = list(zip(state.version.averages, state.arenas, strict=True))
        for average, arena in pairs:
            if slot.written(average.name) < self._layout.shadow_bytes:
                # Not written behind the averaging: initial weights, rewinds, and checkpoints.
                self._write_whole(slot, average.name, arena)
        slot.finish({average.name: self._header(state, average) for average, _ in pairs})

    def _write_whole(self, slot: Slot, average: str, arena: Arena) -> None:
        """Write one average from memory, and work out its digest where nobody has."""
        host = self._memory.to_host(arena.data) if arena.twin is None else arena.twin
        data = host.data
        digest = Digest() if arena.digest is None else None
        for start in range(0, len(data), _DIGESTED_AT_ONCE):
            stop = min(start + _DIGESTED_AT_ONCE, len(data))
            if digest:
                digest.update(data[start:stop])
            slot.write(average, data, stop)
        if digest:
            arena.digest = digest.digest()

    def _put(self, slot: Slot, state: State, *, final: bool, synced: bool) -> None:
        """Commit the row of a version that is written to ``slot``: the run's newest. Raises StorageFailed."""
        text = dump(state, final=final)
        try:
            revision = self._revision
            row = self._store.put_checkpoint(
                self._row, slot.name, text, synced=synced, durable=synced, revision=revision
            )
        except sqlite3.Error as fault:
            self._doubtful.append(slot)
            raise self._failed(f"version {state.version} could not be committed: {fault}") from fault
        self._doubtful.clear()
        age = state.version.epoch, state.version.n
        self._go_on_with(Written(row, slot, text, age, state.version.step, synced))

    @property
    def _revision(self) -> int | None:
        """That the state being saved is of, where the run is a shard."""
        return None

    def _go_on_with(self, written: Written) -> None:
        """A version on disk is the run's newest from now on."""
        self._newest = written
        if written.synced:
            self._anchor, self._anchor_step = written.slot, written.step
        self.durable_step = written.step

    def _amend(self, written: Written, state: State, *, final: bool, durable: bool) -> None:
        """Replace the text of a version's row, where it differs. Raises sqlite3.Error."""
        text = dump(state, final=final)
        if text != written.text:
            self._store.amend_checkpoint(written.row, text, durable=durable)
            written.text = text

    def _take(self, averages: Collection[str]) -> Slot:
        try:
            return self._slots.take(averages)
        except KeyError:
            raise Superseded(f"an average of run {self._run!r} was removed meanwhile", retry_after=0.0) from None

    def _extent(self, member: Member) -> Extent:
        """The size of an average's file in a slot."""
        return Extent(_header_bytes(self._config, member, self._layout), self._layout.shadow_bytes)

    def _header(self, state: State, average: Average) -> bytes:
        return header_of(self._layout.shadows, state.version.weights_info(self._config, average))

    def _failed(self, fault: str) -> StorageFailed | Superseded:
        """The error for a push whose version could not be written; ``trouble`` tells of it as well."""
        self._tell(fault)
        if self._closed:
            return Superseded(f"run {self._run!r} was deleted, or made anew, meanwhile", retry_after=0.0)
        return StorageFailed(f"run {self._run!r}: {fault}", retry_after=_RETRY_SECONDS)

    def _tell(self, fault: str) -> None:
        """Log a fault and show it as ``trouble``; of a run that was deleted neither, as its files are gone."""
        if self._closed:
            return
        self.trouble = fault
        _log.error("run %s: %s", self._run, fault)

    def _remark(self, event: str, version: Version | None) -> None:
        """Log an event and add it to the run's timeline."""
        _log.warning("run %s is %s", self._run, event)
        Timeline(self._run, self._row, self._store).record("damaged", event, version, once=True)


def _header_bytes(config: RunConfig, member: Member, layout: Layout) -> int:
    """Room that the header of any version of this average takes in a slot's file."""
    widest = WeightsInfo(
        run=config.run,
        average=member.name,
        version=f"{MAX_STEP}.{MAX_STEP}",
        step=MAX_STEP,
        num_updates=MAX_STEP,
        decay=sys.float_info.min,  # 23 digits, as many as a float can have
        **schedule_told(member.config),
    )
    return padded_bytes(header_of(layout.shadows, widest))
