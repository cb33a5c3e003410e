"""The ring of one run on disk: snapshots of the averages from which an average of any length can be worked out.

The ring follows the run: after each update it is asked whether a snapshot is due (averaging.Ring). If so, a thread
writes the averages' files and then the row that makes them count, and drops what the ring has too many, while updates
go on. Where the disk is slower than snapshots are due, those are left out that would hold too much memory. Snapshots of
versions that a rewind went back over, or from before the counters were reset, are dropped: they did not lead to the
run's.

Beside the ring stand the weights that the run began with: a constant decay gives them a share for long.

Knows states, rows and files. Does not know how weights are found (averaging), or who asks. Methods block, but for
moved().
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ema_client.errors import MalformedBody, Overloaded, SnapshotDamaged
from ema_client.protocol import LAYOUT_DTYPES, Posthoc, RingInfo, RunConfig, TensorSpec
from ema_client.wire import build_header, place
from ema_service.averaging import Ring
from ema_service.averaging.strides import Strides
from ema_service.bodies import WeightsStream
from ema_service.memory import Arena, Layout, Memory
from ema_service.persistence.stride_log import StrideLog
from ema_service.shadows.state import Average, Descent, State, Version
from ema_service.storage import RunRow, SnapshotRow, Store, TensorFile
from ema_service.threads import Threads

__all__ = ["RingSnapshot", "StoredRing"]

_log = logging.getLogger(__name__)

#: In place of an average's name: the file of the strides.
_STRIDES = "-strides"
#: Of versions that wait to be written, of one run: small ones come faster than a disk syncs.
_HELD_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class RingSnapshot:
    """A snapshot of the ring, of version epoch.n. time: the averages' counter. step: the trainer's, None if unknown.

    averages: those that are stored. begin: whether these are the weights that the run began with: one average, for all
    are the same then.
    """

    epoch: int
    n: int
    time: int
    step: int | None
    averages: tuple[str, ...]
    bytes: int
    begin: bool = False

    @property
    def version(self) -> str:
        """The version's name, which its row and its folder have too."""
        return f"{self.epoch}.{self.n}"


@dataclass(frozen=True, slots=True)
class _Found:
    """Of all snapshots those that led to the versions of one descent, and the ring of their times."""

    descent: Descent | None
    snapshots: tuple[RingSnapshot, ...]
    leading: tuple[RingSnapshot, ...]
    ring: Ring


class StoredRing:
    """The ring of one run. Thread-safe: one snapshot at a time is written.

    trouble: why the latest snapshot could not be written, or None.

    More than a dozen attributes: what a snapshot is made of and where it goes (config, posthoc, names, row, store,
    layout, memory, threads), the run's state, the snapshots there are, those that wait, what was last found of them,
    and the strides of updates.
    """

    def __init__(
        self,
        config: RunConfig,
        posthoc: Posthoc,
        row: RunRow,
        store: Store,
        layout: Layout,
        memory: Memory,
        threads: Threads,
        current: Callable[[], State | None],
    ) -> None:
        """threads: that snapshots are written on. current: gives the run's state."""
        self._config = config
        self._posthoc = posthoc
        self._row = row
        self._store = store
        self._layout = layout
        self._memory = memory
        self._threads = threads
        self._current = current
        self.trouble: str | None = None
        self._names = frozenset(average.name for average in posthoc.averages)
        self._closed = False
        #: Of each version that is being written, or waits for it: its descent and time; no time where only dropping is
        #: to be done.
        self._waiting: deque[tuple[Descent, int | None]] = deque()
        self._changing, self._writing = threading.Lock(), threading.Lock()
        self._snapshots = tuple(_read(store.snapshots(row, "ring")))
        self._found = _Found(None, (), (), self._ring(()))
        self._log = StrideLog(self._stored_strides)

    # --- the run moved ----------------------------------------------------------------------------------------------

    def moved(self) -> None:
        """The run has another state: begin to write a snapshot of it if one is due. Takes microseconds."""
        state = self._current()
        if state is None or self._closed:
            return
        time = self._time(state.version)
        self._log.follow(state.version, time)
        found = self._look(state.version)
        due = self._has_room and self._is_due(state.version, found)
        if due or (not self._waiting and len(found.leading) < len(self._snapshots)):
            averages = self._averages(state.version) if due else ()
            held = [(average, state.arenas[position]) for position, average in averages]
            strides = self._log.noted() if due else None
            self._waiting.append((state.version.descent, time if due else None))
            with contextlib.suppress(RuntimeError):  # the server stops
                self._threads.submit(self._follow, state.version, held, strides)

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be written or dropped."""
        return not self._waiting

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Within the block nothing is written; after it nothing ever, unless the block raised. Waits for a snapshot
        under way."""
        with self._writing:
            yield
            self._closed = True

    # --- reading ----------------------------------------------------------------------------------------------------

    def leading_to(self, version: Version) -> tuple[RingSnapshot, ...]:
        """The snapshots that led to a version, the oldest first."""
        return self._look(version).leading

    def open(self, snapshot: RingSnapshot, average: str) -> TensorFile:
        """The file of one average of a snapshot, open for the caller to close.

        Raises FileNotFoundError where the snapshot was dropped meanwhile; SnapshotDamaged.
        """
        try:
            return self._store.open_snapshot(self._row, snapshot.version, average, "ring")
        except FileNotFoundError:
            if snapshot not in self._snapshots:
                raise
            raise self._damaged(snapshot, "its file is gone") from None
        except (OSError, MalformedBody) as fault:
            raise self._damaged(snapshot, fault) from fault

    @property
    def most_bytes(self) -> int:
        """Of the data of all files, when the ring is full and one more snapshot is written."""
        width = LAYOUT_DTYPES[self._posthoc.dtype]
        return (1 + (self._posthoc.snapshots + 1) * len(self._names)) * self._layout.elements * width

    def strides(self) -> Strides:
        """By how much the averages' counter moved at each update, from the beginning of the run's descent on."""
        return self._log.noted()

    def told(self) -> RingInfo:
        """What is told of the ring."""
        state, snapshots = self._current(), self._snapshots
        leading = self.leading_to(state.version) if state else snapshots
        return RingInfo(
            snapshots=self._posthoc.snapshots,
            dtype=self._posthoc.dtype,
            sigma_rel=self._posthoc.sigma_rel,
            times=tuple(each.time for each in leading if not each.begin),
            begin=next((each.time for each in leading if each.begin), None),
            bytes=sum(each.bytes for each in snapshots),
            waiting=len(self._waiting),
            trouble=self.trouble,
        )

    # --- writing ----------------------------------------------------------------------------------------------------

    def _is_due(self, version: Version, found: _Found) -> bool:
        # Also what a run begins with that goes on from another run's snapshot.
        coming = [time for descent, time in self._waiting if descent is version.descent and time is not None]
        begins = version.n == 0 and not found.leading and not coming
        ring = found.ring.taken(max(coming)) if coming else found.ring
        return begins or (version.n > 0 and ring.due(self._time(version)))

    @property
    def _has_room(self) -> bool:
        """Whether one more version may be held until it is written. One always may."""
        each = self._layout.shadow_bytes * len(self._names)
        return (len(self._waiting) + 1) * each <= _HELD_BYTES or not self._waiting

    def _follow(self, version: Version, held: list[tuple[Average, Arena]], strides: Strides | None) -> None:
        """Write a snapshot, where there are strides for one, then drop what there is too much of.

        A failure is logged, and told as ``trouble``.
        """
        try:
            with self._writing:
                if self._closed:
                    return
                if strides and all(each.version != str(version) for each in self._snapshots):
                    self._write(version, held, strides)
                self._prune()
                self.trouble = None
        except (OSError, sqlite3.Error, Overloaded) as fault:
            self.trouble = f"the snapshot of version {version} could not be written: {fault}"
            _log.error("run %s: ring: %s", self._row.name, self.trouble)
        finally:
            held.clear()
            self._waiting.popleft()

    def _prune(self) -> None:
        """Drop the snapshots that did not lead to the run's state, and those that the ring has too many.

        Raises sqlite3.Error.
        """
        while state := self._current():
            found = self._look(state.version)
            surplus = found.ring.surplus()
            stray = [each for each in self._snapshots if each not in found.leading]
            stray += [each for each in found.leading if each.time == surplus and not each.begin]
            if not stray:
                return
            # First for readers: whoever finds the file gone finds the snapshot gone.
            with self._changing:
                self._snapshots = tuple(each for each in self._snapshots if each is not stray[0])
            self._store.remove_snapshot(self._row, stray[0].version, "ring")

    def _write(self, version: Version, held: list[tuple[Average, Arena]], strides: Strides) -> None:
        """Write a file for each average and one for the strides, then the row.

        Raises OSError, sqlite3.Error, Overloaded.
        """
        begin = version.n == 0 and bool(version.digest)  # initial weights: all averages have one arena
        chosen = held[:1] if begin else held
        streams = {average.name: self._stream(version, average) for average, _ in chosen}
        snapshot = RingSnapshot(
            version.epoch,
            version.n,
            self._time(version),
            version.step,
            tuple(streams),
            sum(stream.length for stream in streams.values()),
            begin,
        )
        self._store.check_room(snapshot.bytes)
        files: dict[str, Iterable[bytes | memoryview]] = {_STRIDES: _strides_file(strides)}
        files |= {average.name: self._chunks(streams[average.name], arena) for average, arena in chosen}
        self._store.save_snapshot(self._row, snapshot.version, lambda: json.dumps(asdict(snapshot)), files, "ring")
        with self._changing:
            self._snapshots = (*self._snapshots, snapshot)

    def _chunks(self, stream: WeightsStream, arena: Arena) -> Iterator[memoryview]:
        data = (self._memory.to_host(arena.tensor) if arena.twin is None else arena.twin).numpy().data
        yield from stream.chunks(lambda start, stop: data[start:stop])

    def _stream(self, version: Version, average: Average) -> WeightsStream:
        info = version.weights_info(self._config, average)
        return WeightsStream(self._layout.shadows, info, dtype=self._posthoc.dtype)

    # ----------------------------------------------------------------------------------------------------------------

    def _stored_strides(self, version: Version) -> Strides:
        """The strides that were stored with the newest snapshot that led to a version; none where none can be read."""
        for snapshot in reversed(self.leading_to(version)):
            with contextlib.suppress(OSError, MalformedBody), self._opened(snapshot, _STRIDES) as file:
                return Strides(np.frombuffer(file.read(0, file.header.data_bytes), np.int64).reshape(-1, 2))
        return Strides()

    def _opened(self, snapshot: RingSnapshot, name: str) -> contextlib.closing[TensorFile]:
        return contextlib.closing(self._store.open_snapshot(self._row, snapshot.version, name, "ring"))

    def _look(self, version: Version) -> _Found:
        """The snapshots that led to a version. Those of a later version of one descent are the same."""
        found, snapshots, descent = self._found, self._snapshots, version.descent
        if found.descent is descent and found.snapshots is snapshots:
            return found
        placed = [(descent.updates(version, each.epoch, each.n, each.time), each) for each in snapshots]
        led = sorted((each for passed, each in placed if passed is not None), key=lambda each: (each.time, each.n))
        self._found = _Found(descent, snapshots, tuple(led), self._ring(each.time for each in led if not each.begin))
        return self._found

    def _ring(self, times: Iterable[int]) -> Ring:
        return Ring(self._posthoc.sigma_rel, self._posthoc.snapshots, 1, tuple(times))

    def _averages(self, version: Version) -> list[tuple[int, Average]]:
        return [(i, average) for i, average in enumerate(version.averages) if average.name in self._names]

    def _time(self, version: Version) -> int:
        return self._averages(version)[0][1].num_updates

    def _damaged(self, snapshot: RingSnapshot, fault: object) -> SnapshotDamaged:
        return SnapshotDamaged(f"ring of run {self._row.name!r}: snapshot {snapshot.version} cannot be read: {fault}")


def _strides_file(strides: Strides) -> Iterator[bytes]:
    runs = strides.runs
    yield build_header(place([TensorSpec("runs", runs.shape, "I64")]))
    yield runs.tobytes()


def _read(rows: Iterable[SnapshotRow]) -> Iterator[RingSnapshot]:
    """The snapshots of rows; a damaged row is logged and left out."""
    for row in rows:
        try:
            said: dict[str, Any] = json.loads(row.info)
            yield RingSnapshot(**{**said, "averages": tuple(said["averages"])})
        except (ValueError, TypeError, KeyError) as fault:
            _log.error("ring of run %d: the catalog's row of %s is damaged: %s", row.run_id, row.name, fault)
