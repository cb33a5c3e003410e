"""The ring of one run on disk: snapshots of the averages from which an average of any length can be worked out.

The ring follows the run: after each update it is asked whether a snapshot is due (averaging.Ring). If so, a thread
writes the averages' files and then the row that makes them count, and drops what the ring has too many, while updates
go on. Where the disk is slower than snapshots are due, those are left out that would hold too much memory. Snapshots of
versions that a rewind went back over, or from before the counters were reset, are dropped: they did not lead to the
run's.

Beside the ring stand the weights that the run began with: a constant decay gives them a share for long.

Knows states, when a snapshot is due, and in which order snapshots are written and dropped. Does not know rows and files
(ring_shelf), or how weights are found (averaging).
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator

from ema_client.errors import Overloaded
from ema_client.protocol import LAYOUT_DTYPES, Posthoc, RingInfo, RunConfig, TensorSpec
from ema_client.wire import place
from ema_service.averaging import Ring
from ema_service.averaging.strides import Strides
from ema_service.bodies import WeightsStream
from ema_service.memory import Arena, Layout, Memory
from ema_service.persistence.ring_shelf import Leading, RingShelf, RingSnapshot
from ema_service.persistence.stride_log import StrideLog
from ema_service.shadows.state import Average, Descent, State, Version
from ema_service.storage import RunRow, Store
from ema_service.threads import Threads

__all__ = ["HELD_BYTES", "StoredRing"]

_log = logging.getLogger(__name__)

#: Of versions that wait to be written, of one run: small ones come faster than a disk syncs.
HELD_BYTES = 16 << 20


class StoredRing:
    """The ring of one run. Thread-safe: one snapshot at a time is written.

    shelf: the snapshots. trouble: why the latest snapshot could not be written, or None. begun: how often
    something was to be written or dropped.

    More than twenty methods: what a run asks of its ring, and the steps of a snapshot.
    More than a dozen attributes: what a snapshot is made of (config, posthoc, names, layout, memory), where it goes
    (shelf, threads), the run's state and strides, and what waits.
    """

    #: Whether a snapshot is of the ring only once others say so.
    _together = False

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
        tell: Callable[[], None] = lambda: None,
    ) -> None:
        """threads: that snapshots are written on. current: gives the run's state. tell: called, in any thread, after
        each change of the ring."""
        self._config = config
        self._posthoc = posthoc
        self._names = frozenset(average.name for average in posthoc.averages)
        self._layout = layout
        self._memory = memory
        stored = place((TensorSpec(e.name, e.shape, posthoc.dtype) for e in layout.shadows), sort=False)
        self.shelf = RingShelf(row, store, Ring(posthoc.sigma_rel, posthoc.snapshots, 1), stored)
        self._threads = threads
        self._current = current
        self._tell = tell
        self._log = StrideLog(self.shelf.strides)
        self.trouble: str | None = None
        #: Of each version that is being written, or waits for it: its descent and time; no time where only dropping is
        #: to be done.
        self._waiting: deque[tuple[Descent, int | None]] = deque()
        self._tried: Version | None = None
        self._writing = threading.Lock()
        self.begun = 0
        self._closed = False

    def moved(self) -> None:
        """The run has another state: begin to write a snapshot of it if one is due. Takes microseconds."""
        state = self._current()
        if state is None or self._closed:
            return
        version, time = state.version, self._time(state.version)
        self._log.follow(version, time)
        if version is self._tried:
            return  # told of the ring's own change: what failed is tried again with the next version
        leading = self.shelf.leading_to(version)
        if self._has_room and self._is_due(version, leading):
            held = [(average, state.arenas[position]) for position, average in self._averages(version)]
            self._submit(version, time, held, self._log.noted())
        elif not self._waiting and self._has_more(leading):
            self._submit(version, None, [], None)

    @property
    def ended(self) -> int:
        """How often something was written or dropped, or failed."""
        return self.begun - len(self._waiting)

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
        state = self._current()
        snapshots = self.shelf.leading_to(state.version).snapshots if state else ()
        return RingInfo(
            snapshots=self._posthoc.snapshots,
            dtype=self._posthoc.dtype,
            sigma_rel=self._posthoc.sigma_rel,
            times=tuple(each.time for each in snapshots if not each.begin),
            begin=next((each.time for each in snapshots if each.begin), None),
            bytes=self.shelf.bytes,
            waiting=self.begun - self.ended,
            trouble=self.trouble,
        )

    # ----------------------------------------------------------------------------------------------------------------

    def _has_more(self, leading: Leading) -> bool:
        """Whether there are snapshots to be dropped."""
        return leading.has_stray or leading.has_surplus

    def _more(self, leading: Leading) -> list[RingSnapshot]:
        """The snapshots to be dropped."""
        return [*leading.stray, *leading.surplus]

    def _coming(self, version: Version) -> list[int]:
        """The times of snapshots on the way to a version that are to be in the ring."""
        # Copied, which is one step: a thread that has written a version takes it off meanwhile.
        return [time for descent, time in tuple(self._waiting) if descent is version.descent and time is not None]

    def _is_due(self, version: Version, leading: Leading) -> bool:
        # Also what a run begins with that goes on from another run's snapshot.
        coming = self._coming(version)
        begins = version.n == 0 and not leading.snapshots and not coming
        ring = leading.ring.taken(max(coming)) if coming else leading.ring
        return begins or (version.n > 0 and ring.due(self._time(version)))

    @property
    def _has_room(self) -> bool:
        """Whether one more version may be held until it is written. One always may."""
        each = self._layout.shadow_bytes * len(self._names)
        return (len(self._waiting) + 1) * each <= HELD_BYTES or not self._waiting

    def _submit(
        self, version: Version, time: int | None, held: list[tuple[Average, Arena]], strides: Strides | None
    ) -> None:
        self._waiting.append((version.descent, time))
        self._tried = version  # not before: a version that was tried and does not wait counts as written
        self.begun += 1
        with contextlib.suppress(RuntimeError):  # the server stops
            self._threads.submit(self._follow, version, held, strides)

    def _follow(self, version: Version, held: list[tuple[Average, Arena]], strides: Strides | None) -> None:
        """Write a snapshot, where there are strides for one, then drop what there is too much of.

        A failure is told as ``trouble``, and logged once until a snapshot is written again.
        """
        try:
            with self._writing:
                if self._closed:
                    return
                if strides and not self.shelf.has(version):
                    self._write(version, held, strides)
                    self.trouble = None
                self._prune()
        except (OSError, sqlite3.Error, Overloaded) as fault:
            said = f"the snapshot of version {version} could not be written: {fault}"
            if self.trouble is None:
                _log.error("run %s: ring: %s", self._config.run, said)
            self.trouble = said
        finally:
            held.clear()
            self._waiting.popleft()
            self._tell()

    def _prune(self) -> None:
        """Drop the snapshots that did not lead to the run's state, and those that the ring has too many.

        Raises sqlite3.Error.
        """
        while (state := self._current()) and (more := self._more(self.shelf.leading_to(state.version))):
            self.shelf.drop(more[0])

    def _write(self, version: Version, held: list[tuple[Average, Arena]], strides: Strides) -> None:
        """Write a snapshot. Raises OSError, sqlite3.Error, Overloaded."""
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
            self._together,
        )
        files = {average.name: self._chunks(streams[average.name], arena) for average, arena in chosen}
        self.shelf.add(snapshot, files, strides)

    def _chunks(self, stream: WeightsStream, arena: Arena) -> Iterator[memoryview]:
        data = (self._memory.to_host(arena.data) if arena.twin is None else arena.twin).data
        yield from stream.chunks(lambda start, stop: data[start:stop])

    def _stream(self, version: Version, average: Average) -> WeightsStream:
        info = version.weights_info(self._config, average)
        return WeightsStream(self._layout.shadows, info, dtype=self._posthoc.dtype)

    def _averages(self, version: Version) -> list[tuple[int, Average]]:
        return [(i, average) for i, average in enumerate(version.averages) if average.name in self._names]

    def _time(self, version: Version) -> int:
        return self._averages(version)[0][1].num_updates
