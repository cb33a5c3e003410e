"""A run's checkpoints: its versions written to slots, and the way back into memory.

With ``durability`` beyond ``memory`` every version is written to disk as it is computed, piece by piece behind the
averaging, and its row is committed before anyone is told of it: there is no journal and nothing to replay. With
``memory`` a checkpoint is taken every so often.

Which slots may be written over follows from who holds them (Slots). Held are the newest version's, that of the newest
*synced* version (the anchor: what a power loss leaves for certain), and those being written or synced.

Knows how a state becomes rows and files and back, and in which order. Does not know how a file or a row is made durable
(storage), how an update is decided (run), or HTTP. Its methods block: call them off the event loop.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from ema_client.errors import MalformedBody, StorageFailed
from ema_client.protocol import MAX_STEP, WeightsInfo
from ema_service.averaging import Digest
from ema_service.bodies.outgoing import header_of
from ema_service.memory.arena import Arena, Memory
from ema_service.memory.layout import Layout
from ema_service.runs.run import Average, Run, State
from ema_service.storage import CheckpointRow, Extent, RunRow, Slot, Store, TensorFile, padded_bytes

__all__ = ["Checkpoints", "read_arena"]

_log = logging.getLogger(__name__)

#: Slots made when a run is created, so that a disk too small for it says so then: one being written beside the newest,
#: and where syncing runs behind, the anchor.
_SLOTS = {"memory": 0, "process": 3, "disk": 2}
#: So much of a version that is there already is digested at a time, while what came before is written.
_PIECE_BYTES = 16 << 20
#: A write that failed may succeed after this many seconds.
_RETRY_SECONDS = 1.0
#: What the state of every row has, in every format.
_MEMBERS = {"lineage", "epoch", "n", "step", "num_updates", "digest", "updated_at", "final", "averages"}


@dataclass(slots=True)
class _Kept:
    """A checkpoint on disk, holding its slot as long as it lives (and no memory: the run may be further on).

    text: what its row says now of the state. synced: it outlives the machine, not only the process.
    """

    row: CheckpointRow
    slot: Slot
    text: str
    synced: bool


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the catalog with its state parsed; empty where that is damaged."""

    row: CheckpointRow
    stored: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. Thread-safe: commit() and amend() are called under the run's lock."""

    def __init__(self, run: Run, row: RunRow, store: Store, memory: Memory) -> None:
        self._run = run
        self._row = row
        self._store = store
        self._memory = memory
        self._durability = run.config.durability or "memory"
        names = [average.name for average in run.config.averages]
        self._extents = {name: Extent(_header_bytes(run, name), run.layout.shadow_bytes) for name in names}
        self._slots = store.slots(row, self._extents, patient=self._durability == "disk")
        self._newest: _Kept | None = None
        self._anchor: Slot | None = None
        #: Slots whose row could not be committed. It may be in the catalog's log all the same, and come up after a
        #: crash; so nobody writes to them before a later row says otherwise.
        self._doubtful: list[Slot] = []
        #: The row of a version that could not be synced. Asking again would succeed and say nothing: the kernel forgets
        #: what it failed to write.
        self._unsyncable: int | None = None
        self._syncing = threading.Lock()
        if self._durability != "memory":
            run.keeper = self

    # --- every version ----------------------------------------------------------------------------------------------

    def allocate(self) -> None:
        """Take the disk space that the run will need. Raises OSError."""
        self._slots.allocate(_SLOTS[self._durability])

    def take(self) -> Slot:
        """Where the next version is written to, from now on; given back by dropping it."""
        return self._slots.take()

    def write(self, slot: Slot, state: State) -> None:
        """Bring to the slot what is not yet there of the state, and with ``disk`` all of it to the medium.

        Raises StorageFailed.
        """
        try:
            for average in state.averages:
                if slot.written(average.name) < self._run.layout.shadow_bytes:
                    # Not written behind the averaging: on a GPU, and the initial weights.
                    self._write_whole(slot, average)
            slot.finish({a.name: self._header(state, a) for a in state.averages})
            if self._durability == "disk":
                slot.sync()
        except OSError as fault:
            raise self._failed(f"version {state.version} could not be written: {fault}") from fault

    def _write_whole(self, slot: Slot, average: Average) -> None:
        data = self._memory.to_host(average.arena.tensor).numpy().data
        digest = Digest() if average.arena.digest is None else None
        for start in range(0, len(data), _PIECE_BYTES):
            stop = min(start + _PIECE_BYTES, len(data))
            if digest:
                digest.update(data[start:stop])
            slot.write(average.name, data, stop)
        if digest:
            average.arena.digest = digest.digest()

    def commit(self, slot: Slot, state: State) -> None:
        """Make the state what a restart brings back, as far as the run's durability goes. Raises StorageFailed."""
        self._put(slot, state, final=False, synced=self._durability == "disk")
        self._run.unkept = None

    def amend(self, state: State) -> None:
        """The newest version has another decay or counter; its weights are as they were. Raises StorageFailed."""
        if self._newest is None:
            return
        try:
            self._amend(self._newest, state, final=False, durable=self._durability == "disk")
        except sqlite3.Error as fault:
            raise self._failed(f"the change could not be kept: {fault}") from fault

    @property
    def unsynced(self) -> bool:
        """Whether sync() has something to do."""
        newest = self._newest
        return newest is not None and not newest.synced and newest.row.id != self._unsyncable

    def sync(self) -> None:
        """Bring the newest version to the medium: what a power loss leaves. Versions superseded meanwhile are skipped.

        A failure is logged and makes the run ``degraded``; the version synced before stays what a power loss leaves.
        """
        if not self._syncing.acquire(blocking=False):
            return
        try:
            newest = self._newest
            if newest is None or not self.unsynced:
                return
            try:
                newest.slot.sync()
                # The anchor's slot is given up for a row that outlives the machine, never before: the rows of versions
                # are committed without a sync, so a power loss may roll back the newest of them; were the old anchor
                # overwritten by then, both would be gone.
                self._store.mark_synced(newest.row)
            except (OSError, sqlite3.Error) as fault:
                self._unsyncable = newest.row.id
                self._note(f"what {newest.slot.name} holds could not be synced: {fault}")
                return
            newest.synced, self._anchor = True, newest.slot
        finally:
            self._syncing.release()

    # --- now and then -----------------------------------------------------------------------------------------------

    def save(self, *, final: bool) -> None:
        """Keep the current state if it moved since the last time; ``durable_step`` says what a restart brings back.

        final: nothing will be applied after it, so that the versions may go on from here when the run comes back.
        A failure is logged, makes the run ``degraded`` and leaves the checkpoint before; the next call tries again.
        """
        with contextlib.suppress(StorageFailed):
            self.keep(final=final)

    def keep(self, *, final: bool = False) -> None:
        """As save(), for whoever promised that it is kept: raises StorageFailed as well."""
        state = self._run.state
        if state is None or self._run.fault or (self._durability != "memory" and not final):
            return
        if final:
            self.sync()
        try:
            self._save(state, final=final)
        except (OSError, sqlite3.Error) as fault:
            raise self._failed(f"version {state.version} could not be kept: {fault}") from fault
        self._run.unkept = None

    def _save(self, state: State, *, final: bool) -> None:
        newest = self._newest
        if newest is None or not newest.synced or newest.text != self._dump(state, final=False):
            slot = self._slots.take()
            self.write(slot, state)
            slot.sync()
            self._put(slot, state, final=final, synced=True)
        elif final:
            self._amend(newest, state, final=True, durable=True)

    def _put(self, slot: Slot, state: State, *, final: bool, synced: bool) -> None:
        text = self._dump(state, final=final)
        try:
            row = self._store.put_checkpoint(self._row, slot.name, text, synced=synced, durable=synced)
        except sqlite3.Error as fault:
            self._doubtful.append(slot)
            raise self._failed(f"version {state.version} could not be committed: {fault}") from fault
        self._doubtful.clear()
        self._newest = _Kept(row, slot, text, synced)
        if synced:
            self._anchor = slot
        self._run.durable_step = state.step

    def _amend(self, kept: _Kept, state: State, *, final: bool, durable: bool) -> None:
        text = self._dump(state, final=final)
        if text != kept.text:
            self._store.amend_checkpoint(kept.row, text, durable=durable)
            kept.text = text

    def _header(self, state: State, average: Average) -> bytes:
        return header_of(self._run.layout.shadows, self._run.weights_info(state, average))

    # --- the way back -----------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Bring the run back from the newest checkpoint that is whole. For a run that nobody uses yet.

        Where a newer one was damaged the run is ``degraded``: with the older one's weights, if there is an older one.
        So it is, without weights, where its folder, or a slot in it, is not its own.
        Raises sqlite3.Error.
        """
        rows = [_Row(row, _parse(row.state)) for row in self._store.checkpoints(self._row)]
        self._run.last_epoch = max((row.stored.get("epoch", 0) for row in rows), default=0)
        try:
            self._slots.check()
        except OSError as fault:
            # Told here and not by reading: there may be no row yet, or only one that a power loss would excuse.
            self._run.fault = f"its files cannot be read: {fault}"
            _log.error("run %s is degraded: %s", self._row.name, self._run.fault)
            return
        damaged: list[_Row] = []
        faults = []
        for position, row in enumerate(rows):
            try:
                state = self._read(row)
            except (OSError, MalformedBody) as fault:
                damaged.append(row)
                faults.append(f"its checkpoint of {time.ctime(row.row.created_at)} cannot be read: {fault}")
                _log.error("run %s: %s", self._row.name, faults[-1])
                continue
            self._take_up(row, state, damaged, rows[position + 1 :])
            break
        lost = [fault for row, fault in zip(damaged, faults, strict=True) if not self._excused(row)]
        if lost:
            self._run.fault = f"{self._missing(rows[0])}{lost[0]}"
            _log.error("run %s is degraded: %s", self._row.name, self._run.fault)

    def _take_up(self, row: _Row, state: State, damaged: Sequence[_Row], older: Sequence[_Row]) -> None:
        if damaged or self._may_have_moved(row.stored):
            # Later versions may have been read by someone, and no version may name two states.
            epoch = max(each.stored.get("epoch", 0) for each in (row, *damaged))
            state = replace(state, epoch=max(epoch, state.epoch) + 1)
            self._remark(f"back at step {state.step} as version {state.version}; later updates, if any, are gone")
        self._run.lineage = row.stored["lineage"]
        before = [each.stored for each in older if each.stored.get("epoch") == row.stored["epoch"] and each.stored["n"]]
        self._run.restore(state, [each["step"] for each in before])
        slot = self._slots.hold(row.row.folder)
        self._newest = _Kept(row.row, slot, row.row.state, synced=row.row.synced)
        anchor = next((each.row for each in (row, *older) if each.row.synced), None)
        if anchor is row.row:
            self._anchor = self._newest.slot
        elif anchor:
            self._anchor = self._slots.hold(anchor.folder)
        if all(self._excused(each) for each in damaged):
            # It is no longer final, and of this epoch: said before anything can follow it. A damaged run is left as it
            # is until someone decides.
            self._amend(self._newest, state, final=False, durable=True)

    def _may_have_moved(self, stored: dict[str, Any]) -> bool:
        """Whether there may have been versions after this one that no row tells of."""
        if stored["final"] or self._durability == "disk":
            return False
        return self._durability == "memory" or _rebooted(stored)

    def _excused(self, row: _Row) -> bool:
        """Whether the machine went down with a version that ``process`` had not brought to the medium yet."""
        return self._durability == "process" and not row.row.synced and bool(row.stored) and _rebooted(row.stored)

    def _missing(self, newest: _Row) -> str:
        """Which updates are not in the weights that are there."""
        state, step = self._run.state, newest.stored.get("step")
        if state is None:
            return ""
        if step is None:
            return f"the updates after step {state.step} are gone: "
        return f"the updates after step {state.step} up to step {step} are gone: "

    def _read(self, row: _Row) -> State:
        stored = row.stored
        if not stored:
            raise MalformedBody("the catalog's row of it is damaged")
        averages = []
        for each in stored["averages"]:
            # Format 1 had no checksums.
            arena = self._read_arena(row.row, each["name"], each.get("checksum"))
            averages.append(Average(each["name"], each["decay"], each["effective_decay"], arena))
        return State(
            epoch=stored["epoch"],
            n=stored["n"],
            step=stored["step"],
            num_updates=stored["num_updates"],
            digest=bytes.fromhex(stored["digest"]),
            averages=tuple(averages),
            updated_at=stored["updated_at"],
        )

    def _read_arena(self, row: CheckpointRow, average: str, checksum: str | None) -> Arena:
        file = self._store.open_checkpoint(self._row, row, average)
        try:
            return read_arena(file, self._run.layout, self._memory, checksum)
        finally:
            file.close()

    # ----------------------------------------------------------------------------------------------------------------

    def _dump(self, state: State, *, final: bool) -> str:
        """What a row says of a state, for whoever has to repair it as well."""
        return json.dumps(
            {
                "lineage": self._run.lineage,
                "epoch": state.epoch,
                "n": state.n,
                "step": state.step,
                "num_updates": state.num_updates,
                "digest": state.digest.hex(),
                "updated_at": state.updated_at,
                "final": final,
                "boot": _boot(),
                "averages": [
                    {
                        "name": a.name,
                        "decay": a.decay,
                        "effective_decay": a.effective_decay,
                        "checksum": a.arena.digest.hex() if a.arena.digest else None,
                    }
                    for a in state.averages
                ],
            }
        )

    def _failed(self, fault: str) -> StorageFailed:
        self._note(fault)
        return StorageFailed(f"run {self._row.name!r}: {fault}", retry_after=_RETRY_SECONDS)

    def _note(self, fault: str) -> None:
        self._run.unkept = fault
        _log.error("run %s: %s", self._row.name, fault)

    def _remark(self, event: str) -> None:
        _log.warning("run %s is %s", self._row.name, event)
        self._store.record(self._row, event)


def read_arena(file: TensorFile, layout: Layout, memory: Memory, checksum: str | None) -> Arena:
    """The shadows of a file, with their digest. checksum: what it was when they were written, None where nobody knows.

    Raises OSError; MalformedBody where they are not the layout's, or not those that were written.
    """
    if file.header.entries != layout.shadows:
        raise MalformedBody(f"{file.name} has other tensors than the run's layout")
    host, digest = memory.pool.lend(layout.shadow_bytes), Digest()
    data = host.numpy().data
    for piece in file.read_whole(data):
        digest.update(piece)
    # Before format 4 a checksum was that of all bytes as one.
    if checksum and checksum not in (digest.digest().hex(), xxhash.xxh3_128_hexdigest(data)):
        raise MalformedBody(f"the bytes of {file.name} are not those that were written")
    arena = Arena(layout, memory.to_device(host))
    arena.digest = digest.digest()
    return arena


def _parse(state: str) -> dict[str, Any]:
    """What a row says of a state; empty where that is damaged (SQLite does not checksum its pages)."""
    try:
        stored = json.loads(state)
    except ValueError:
        return {}
    return stored if isinstance(stored, dict) and stored.keys() >= _MEMBERS else {}


def _header_bytes(run: Run, average: str) -> int:
    """Room for the header of any version."""
    widest = WeightsInfo(
        run=run.config.run,
        average=average,
        version=f"{MAX_STEP}.{MAX_STEP}",
        step=MAX_STEP,
        num_updates=MAX_STEP,
        decay=sys.float_info.min,  # 23 digits, as many as a float can have
    )
    return padded_bytes(header_of(run.layout.shadows, widest))


def _boot() -> str | None:
    """Another text each time the machine starts, None where that cannot be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _rebooted(stored: dict[str, Any]) -> bool:
    """Whether the machine may have gone down since: then bytes that were not synced may be gone."""
    return stored.get("boot") is None or stored["boot"] != _boot()
