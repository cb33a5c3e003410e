"""The stretches of a body that is carried by several lanes: a queue from which each lane takes the next one when free.

A lane is one of several connections that carry one body. Equal parts, one for each lane, would end with the slowest
lane: of flows of 100 + 100 + 60 + 20 MB/s a quarter each reaches 80 MB/s of 280. From a queue a fast lane takes more.
The sizes fall towards the end, and a lane leaves a stretch in the queue that another lane would bring sooner.

Knows: sizes, rates and times. Does not know: connections, threads, what the bytes are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ema_client.forks import Lock

__all__ = ["SMALLEST_BYTES", "Stretch", "Stretches"]

#: Stretches get no smaller than this, but for the last: a request for each costs a round trip, and so does its answer.
SMALLEST_BYTES = 8 << 20
#: A lane of unknown rate takes this share of what an even division among the lanes would give a lane: of lanes that
#: nothing is known of, and of lanes that were alike. The end is left to be divided by the rates that are seen.
_FIRST_SHARE, _FIRST_SHARE_ALIKE = 1 / 4, 3 / 4
#: Lanes are alike where the slowest brings at least this share of what the fastest brings.
_ALIKE = 3 / 4
#: A lane of known rate takes this share of what the lane would bring until the end.
_SHARE = 1 / 2


@dataclass(frozen=True, slots=True, order=True)
class Stretch:
    """Bytes [start, stop) of a body."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(slots=True)
class _Lane:
    """What is known of one lane. rate: bytes a second over its stretches so far, 0 before the first has come.

    reached: bytes of the stretch that the lane has that are not carried again should the stretch break off.
    """

    has: Stretch | None = None
    reached: int = 0
    since: float = 0.0
    seconds: float = 0.0
    bytes: int = 0

    @property
    def rate(self) -> float:
        return self.bytes / self.seconds if self.seconds else 0.0

    def free_in(self, now: float) -> float:
        """Seconds until the lane has brought what the lane has."""
        return 0.0 if self.has is None else max(0.0, self.has.size / self.rate - (now - self.since))


class Stretches:
    """The bytes [start, stop) of a body, to be taken in stretches. Thread-safe.

    grain: stretches begin and end at ``start`` plus a multiple of so many bytes; the last one ends at ``stop``.
    smallest, largest: bytes of the smallest stretch and of the largest, multiples of ``grain``; None: any.
    expect_alike: whether the lanes will probably be alike, as those of the body before were: they begin with large
    stretches then, for each stretch costs a request.
    clock: gives seconds.
    """

    def __init__(
        self,
        start: int,
        stop: int,
        *,
        grain: int,
        smallest: int = SMALLEST_BYTES,
        largest: int | None = None,
        expect_alike: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grain = grain
        self._smallest = max(grain, smallest)
        self._largest = largest
        self._first_share = _FIRST_SHARE_ALIKE if expect_alike else _FIRST_SHARE
        self._clock = clock
        #: Stretches that broke off, to be carried again as they are.
        self._again: list[Stretch] = []
        #: What no lane has had, in order.
        self._queue = [Stretch(start, stop)] if stop > start else []
        self._lanes: dict[int, _Lane] = {}
        #: The rates of lanes that have left.
        self._rates: list[float] = []
        self._come = 0
        self._lock = Lock()

    @property
    def come(self) -> int:
        """Bytes that have come and are not carried again, also those of stretches on their way (reached())."""
        with self._lock:
            return self._come + sum(lane.reached for lane in self._lanes.values())

    @property
    def whole(self) -> bool:
        """Whether every byte has come."""
        with self._lock:
            return not self._queue and not self._again and all(lane.has is None for lane in self._lanes.values())

    @property
    def alike(self) -> bool:
        """Whether several lanes have left, and all brought about as much in the same time."""
        with self._lock:
            return len(self._rates) > 1 and min(self._rates) >= _ALIKE * max(self._rates)

    @property
    def queued(self) -> int:
        """Bytes that no lane has."""
        with self._lock:
            return self._pending

    def take(self, lane: int, lanes: int, *, size: int | None = None) -> Stretch | None:
        """The next stretch for lane number ``lane`` of ``lanes``; size: of so many bytes, where that is decided.

        None where nothing is left, or where another lane would bring what is left sooner.
        """
        with self._lock:
            mine = self._lanes.setdefault(lane, _Lane())
            if self._again:
                mine.has, mine.since = self._again.pop(0), self._clock()
                return mine.has
            if not self._queue:
                return None
            size = self._size(mine, lanes) if size is None else size
            if size is None:
                return None
            taken, rest = self._cut(self._queue[0], size if self._largest is None else min(size, self._largest))
            self._queue[:1] = [rest] if rest.size else []
            mine.has, mine.since = taken, self._clock()
            return taken

    def came(self, lane: int) -> None:
        """The lane's stretch has come."""
        with self._lock:
            mine = self._lanes[lane]
            if mine.has is not None:
                self._come += mine.has.size
                mine.bytes += mine.has.size
                mine.seconds += max(self._clock() - mine.since, 1e-6)
            mine.has, mine.reached = None, 0

    def reached(self, stretch: Stretch, stop: int) -> None:
        """Of a stretch that a lane has, the bytes before ``stop`` have come to stay, whatever becomes of the rest."""
        with self._lock:
            for lane in self._lanes.values():
                if lane.has is stretch:
                    lane.reached = stop - stretch.start

    def broke(self, lane: int) -> int:
        """The lane's stretch did not come: another lane, or this one, takes the very stretch again, without the bytes
        that stay. Returns their number."""
        with self._lock:
            mine = self._lanes[lane]
            stays = mine.reached
            if mine.has is not None and stays < mine.has.size:
                self._again.append(Stretch(mine.has.start + stays, mine.has.stop))
            self._come += stays
            mine.has, mine.reached = None, 0
            return stays

    def leaves(self, lane: int) -> None:
        """The lane takes no more."""
        with self._lock:
            left = self._lanes.pop(lane, None)
            if left is not None and left.rate:
                self._rates.append(left.rate)

    @property
    def _pending(self) -> int:
        return sum(stretch.size for stretch in (*self._queue, *self._again))

    def _size(self, mine: _Lane, lanes: int) -> int | None:
        """Bytes of the next stretch for a lane; None where another lane would bring it sooner."""
        if not mine.rate:
            missing = self._pending + sum(lane.has.size for lane in self._lanes.values() if lane.has is not None)
            return max(self._smallest, int(missing * self._first_share / max(1, lanes)))
        others = [lane for lane in self._lanes.values() if lane is not mine and lane.rate]
        # A lane of unknown rate is taken to be as fast as this one.
        unknown = max(0, lanes - 1 - len(others))
        together = mine.rate * (1 + unknown) + sum(lane.rate for lane in others)
        size = int(_SHARE * self._pending * mine.rate / together)
        if size >= self._smallest:
            return size
        least = min(self._smallest, self._queue[0].size)
        return None if others and self._without(others, least) < least / mine.rate else self._smallest

    def _without(self, others: list[_Lane], least: int) -> float:
        """Seconds until the other lanes have brought all that has not come, the next one ``least`` bytes."""
        now = self._clock()
        missing = self._pending + sum(lane.free_in(now) * lane.rate for lane in others)
        even = missing / sum(lane.rate for lane in others)
        return max(even, min(lane.free_in(now) + least / lane.rate for lane in others))

    def _cut(self, stretch: Stretch, size: int) -> tuple[Stretch, Stretch]:
        grains = max(1, -(-size // self._grain))
        middle = min(stretch.stop, stretch.start + grains * self._grain)
        return Stretch(stretch.start, middle), Stretch(middle, stretch.stop)
