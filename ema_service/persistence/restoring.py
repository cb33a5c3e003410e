"""Restoring: which stored version a run comes up with after a restart, and what is missing.

The run comes up with the newest version whose files are whole. Where a newer version is damaged, or may have existed
without a row, the version gets a new epoch, for no name may stand for two states. A damaged newer version is a fault of
the run, unless the machine went down before that version was on the medium: ``process`` promises no protection from
such a loss.

Knows rows, files and arenas. Does not know the run, slots, or who decides how a degraded run goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import xxhash

from ema_client.errors import MalformedBody
from ema_client.protocol import Durability
from ema_service.averaging import Digest
from ema_service.memory import Arena, Layout, Memory
from ema_service.persistence.rows import StoredVersion
from ema_service.shadows.state import Setup, State
from ema_service.storage import TensorFile

__all__ = ["Restored", "Search", "read_arena"]

_log = logging.getLogger(__name__)

#: A function that opens the file of one average of a stored version. Raises OSError, MalformedBody.
Opening = Callable[[StoredVersion, str], TensorFile]


@dataclass(frozen=True, slots=True)
class Restored:
    """What storage has of a run.

    state: what the run comes up with; None where nothing was stored, or nothing could be read. steps: of the updates
    before the state, as far as they are known. last_epoch: the largest epoch that someone may have read a version of.
    fault: why the run takes no updates, None if all is well. row: of the state; older: the rows before it, newest
    first. moved: whether versions after the state may be gone.
    """

    state: State | None = None
    steps: tuple[int, ...] = ()
    last_epoch: int = 0
    fault: str | None = None
    row: StoredVersion | None = None
    older: Sequence[StoredVersion] = ()
    moved: bool = False


@dataclass(frozen=True, slots=True)
class Search:
    """The search for what a run comes up with, among the rows of its versions on disk."""

    run: str
    setup: Setup
    durability: Durability
    opening: Opening
    layout: Layout
    memory: Memory

    def find(self, rows: Sequence[StoredVersion], lost: StoredVersion | None, fault: str | None) -> Restored:
        """Read the newest version that is whole.

        rows: newest first. lost: a version that lay in memory and is newer than those; fault: why it should not be
        lost, None where that may happen.
        """
        newer = [lost] if lost else []
        faults = [fault] if fault else []
        found = Restored(last_epoch=max((row.epoch for row in [*newer, *rows]), default=0))
        for position, row in enumerate(rows):
            try:
                state = self.read(row)
            except (OSError, MalformedBody) as damage:
                newer.append(row)
                why = f"its checkpoint of {time.ctime(row.row.created_at)} cannot be read: {damage}"
                faults += [] if _is_excused(row, self.durability) else [why]
                _log.error("run %s: %s", self.run, why)
                continue
            older = rows[position + 1 :]
            moved = bool(newer) or _may_have_moved(row, self.durability)
            state = _in_new_epoch(state, [row, *newer]) if moved else state
            found = replace(found, state=state, steps=_steps_before(row, older), row=row, older=older, moved=moved)
            break
        if not faults:
            return found
        return replace(found, fault=f"{_missing(found.state, newer[0])}{faults[0]}")

    def read(self, row: StoredVersion) -> State:
        """The version of a row, with its bytes. Raises OSError; MalformedBody where it is damaged."""
        if not row.said:
            raise MalformedBody("the catalog's row of it is damaged")
        version, arenas = row.version(self.setup), []
        if not version.averages:
            raise MalformedBody("it has none of the averages that the run has by now")
        for average in version.averages:
            file = self.opening(row, average.name)
            try:
                arenas.append(read_arena(file, self.layout, self.memory, row.checksums[average.name]))
            finally:
                file.close()
        return State(version, tuple(arenas))


def read_arena(file: TensorFile, layout: Layout, memory: Memory, checksum: str | None) -> Arena:
    """The shadows in a file, with their digest.

    checksum: the digest of the bytes when they were written, None where nobody knows it. Raises OSError; MalformedBody
    where the tensors are not the layout's, or the bytes differ from those that were written.
    """
    if file.header.entries != layout.shadows:
        raise MalformedBody(f"{file.name} has other tensors than the run's layout")
    host, digest = memory.landing(layout.shadow_bytes), Digest()
    data = host.data
    for piece in file.read_whole(data):
        digest.update(piece)
    # Up to format 3 a checksum was one hash of all bytes, without blocks.
    if checksum and checksum not in (digest.digest().hex(), xxhash.xxh3_128_hexdigest(data)):
        raise MalformedBody(f"the bytes of {file.name} are not those that were written")
    arena = Arena(layout, memory.to_device(host))
    arena.digest = digest.digest()
    return arena


def _in_new_epoch(state: State, rows: Sequence[StoredVersion]) -> State:
    """The state in an epoch after those of ``rows``: someone may have read later versions, and no name may stand for
    two states."""
    version, epoch = state.version, max(row.epoch for row in rows) + 1
    descent = version.descent.followed(version.epoch, version.n, version.n)
    return replace(state, version=replace(version, epoch=epoch, descent=descent))


def _may_have_moved(row: StoredVersion, durability: Durability) -> bool:
    """Whether there may have been versions after this one that no row tells of."""
    if row.final or durability == "disk":
        return False
    return durability == "memory" or row.rebooted


def _is_excused(row: StoredVersion, durability: Durability) -> bool:
    """Whether the machine went down before ``process`` had brought this version to the medium."""
    return durability == "process" and not row.row.synced and bool(row.said) and row.rebooted


def _steps_before(row: StoredVersion, older: Sequence[StoredVersion]) -> tuple[int, ...]:
    """The steps of updates before a row's version, in the same epoch, by the rows that are left."""
    steps = (each.step for each in older if each.epoch == row.epoch and each.said["n"])
    return tuple(step for step in steps if step is not None)


def _missing(state: State | None, newest: StoredVersion) -> str:
    """Which updates are missing in the state, for people: ``newest`` is the newest row."""
    if state is None:
        return ""
    since = f"the updates after step {state.version.step}"
    return f"{since} are gone: " if newest.step is None else f"{since} up to step {newest.step} are gone: "
