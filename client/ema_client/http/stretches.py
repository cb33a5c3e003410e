"""The stretches of a body that is carried by several lanes: a queue from which each lane takes the next one when free.

A lane is one of several connections that carry one body. Equal parts, one for each lane, would end with the slowest
lane: of flows of 100 + 100 + 60 + 20 MB/s a quarter each reaches 80 MB/s of 280. From a queue a fast lane takes more.
The sizes fall towards the end, and a lane leaves a stretch in the queue that another lane would bring sooner.

A lane may stand still for good, while its connection is alive. So a lane for which nothing is left looks at the others
(late()): what one of them has, and would bring later than the free lane could from the beginning, is carried again.

Knows: sizes, rates and times. Does not know: connections, threads, what the bytes are.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ema_client.forks import Lock

__all__ = ["SMALLEST_BYTES", "STILL_SECONDS", "Stretch", "Stretches"]

#: Stretches get no smaller than this, but for the last: a request for each costs a round trip, and so does its answer.
SMALLEST_BYTES = 8 << 20
#: A lane of unknown rate takes this share of what an even division among the lanes would give a lane: of lanes that
#: nothing is known of, and of lanes that were alike. The end is left to be divided by the rates that are seen.
_FIRST_SHARE, _FIRST_SHARE_ALIKE = 1 / 4, 3 / 4
#: Lanes are alike where the slowest brings at least this share of what the fastest brings.
_ALIKE = 3 / 4
#: A lane of known rate takes this share of what the lane would bring until the end.
_SHARE = 1 / 2
#: A lane that brings nothing for so long stands still: a lost packet costs a flow a fifth of that (TCP's timeout).
STILL_SECONDS = 1.0
#: A service answers once it has averaged a stretch, so many bytes per second at the least.
_ANSWERED_RATE = 200e6
#: A lane that moves is late where the rest takes so many times longer than all of it would by another lane.
_LATE = 2.0
#: So often a stretch is taken from a lane that is late: after that the timeouts of the connection count.
_MOST_HELP = 3


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

    reached: bytes of the stretch that the lane has that are not carried again should the stretch break off. carried:
    bytes of the stretch that went over the lane, between the times ``first`` and ``last``, which are ``since`` before.
    abandoned: whether the stretch is to be carried again, as the lane is late with it.
    """

    has: Stretch | None = None
    reached: int = 0
    carried: int = 0
    since: float = 0.0
    first: float = 0.0
    last: float = 0.0
    abandoned: bool = False
    seconds: float = 0.0
    bytes: int = 0

    @property
    def rate(self) -> float:
        return self.bytes / self.seconds if self.seconds else 0.0

    def free_in(self, now: float) -> float:
        """Seconds until the lane has brought what the lane has."""
        return 0.0 if self.has is None else max(0.0, self.has.size / self.rate - (now - self.since))

    def begin(self, stretch: Stretch, now: float) -> Stretch:
        self.has, self.reached, self.carried, self.abandoned = stretch, 0, 0, False
        self.since = self.first = self.last = now
        return stretch

    def lets_go(self) -> None:
        self.has, self.reached = None, 0

    def is_late(self, now: float, rate: float) -> bool:
        """Whether a lane that brings ``rate`` bytes a second would bring the stretch sooner, from its beginning."""
        if self.has is None:
            return False
        left, quiet, moving = self.has.size - self.carried, now - self.last, now - self.first
        if left <= 0:
            return quiet >= STILL_SECONDS + self.has.size / _ANSWERED_RATE
        if quiet >= STILL_SECONDS:
            return True
        rest = left * moving / max(self.carried, 1)
        return moving >= STILL_SECONDS and rest > _LATE * self.has.size / rate + STILL_SECONDS


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
        #: Lanes that have left; some come back, where another lane is late.
        self._left: dict[int, _Lane] = {}
        #: How often the stretch that ends at a byte was taken from a lane that was late.
        self._helped: Counter[int] = Counter()
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
            rates = [lane.rate for lane in self._left.values() if lane.rate]
            return len(rates) > 1 and min(rates) >= _ALIKE * max(rates)

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
            mine = self._joined(lane)
            if self._again:
                return mine.begin(self._again.pop(0), self._clock())
            if not self._queue:
                return None
            size = self._size(mine, lanes) if size is None else size
            if size is None:
                return None
            taken, rest = self._cut(self._queue[0], size if self._largest is None else min(size, self._largest))
            self._queue[:1] = [rest] if rest.size else []
            return mine.begin(taken, self._clock())

    def moved(self, lane: int, count: int) -> None:
        """So many more bytes of the lane's stretch went over the lane; negative where they go again."""
        if not count:
            return
        with self._lock:
            mine, now = self._lanes[lane], self._clock()
            if not mine.carried:
                mine.first = now
            mine.carried += count
            mine.last = now

    def late(self, lane: int) -> int | None:
        """The number of a lane whose stretch lane number ``lane``, for which nothing is left, would bring sooner from
        the beginning; None where there is none, or where no stretch has come yet. A stretch has one such lane at a
        time, and a few in all."""
        with self._lock:
            mine, now = self._left.get(lane) or self._lanes.get(lane), self._clock()
            # A lane of unknown rate is taken to be as fast as the fastest.
            known = [each.rate for each in (*self._lanes.values(), *self._left.values()) if each.rate]
            rate = (mine.rate if mine else 0.0) or max(known, default=0.0)
            for number, other in self._lanes.items():
                if other.has is None or other is mine or other.abandoned or not rate:
                    continue
                if self._helped[other.has.stop] < _MOST_HELP and other.is_late(now, rate):
                    return number
            return None

    def abandon(self, late: int, helper: int) -> Stretch | None:
        """The stretch of a lane that is late() is to be carried again.

        Returned where the lane has carried all of it and waits for the answer, which may still come: lane number
        ``helper`` then has the stretch as well, and whichever brings it first has brought it. None where the late lane
        must end first.
        """
        with self._lock:
            other = self._lanes[late]
            if other.has is None:
                return None
            other.abandoned = True
            self._helped[other.has.stop] += 1
            return self._joined(helper).begin(other.has, self._clock()) if other.carried >= other.has.size else None

    def came(self, lane: int) -> tuple[list[int], int]:
        """The lane's stretch has come. Returns the lanes that have the stretch as well, for nothing; and how many bytes
        of this lane were for nothing, as another one had brought them."""
        with self._lock:
            mine = self._lanes[lane]
            if mine.has is None:
                return [], mine.carried
            stretch = mine.has
            self._come += stretch.size
            mine.bytes += stretch.size
            mine.seconds += max(self._clock() - mine.since, 1e-6)
            others = [number for number, other in self._sharers(lane)]
            for each in (lane, *others):
                self._lanes[each].lets_go()
            return others, 0

    def has(self, lane: int) -> bool:
        """Whether the lane has a stretch, which no other lane has brought."""
        with self._lock:
            return self._lanes[lane].has is not None

    def reached(self, stretch: Stretch, stop: int) -> None:
        """Of a stretch that a lane has, the bytes before ``stop`` have come to stay, whatever becomes of the rest."""
        with self._lock:
            for lane in self._lanes.values():
                if lane.has is stretch:
                    lane.reached = stop - stretch.start

    def broke(self, lane: int) -> tuple[bool, int]:
        """The lane's stretch did not come: another lane, or this one, takes the very stretch again, without the bytes
        that stay; no lane does where another one has, or has brought, the stretch. Returns whether one has; and how
        many bytes of this lane were for nothing."""
        with self._lock:
            mine = self._lanes[lane]
            stays, sharers = mine.reached, self._sharers(lane)
            spare = mine.has is None or bool(sharers)
            for _, other in sharers:
                other.abandoned = False
            if mine.has is not None and stays < mine.has.size and not spare:
                self._again.append(Stretch(mine.has.start + stays, mine.has.stop))
            self._come += stays
            mine.lets_go()
            return spare, mine.carried - stays

    def leaves(self, lane: int) -> None:
        """The lane takes no more, or none until another one is late."""
        with self._lock:
            if left := self._lanes.pop(lane, None):
                self._left[lane] = left

    def _joined(self, lane: int) -> _Lane:
        """What is known of a lane, which takes a stretch."""
        if lane not in self._lanes:
            self._lanes[lane] = self._left.pop(lane, _Lane())
        return self._lanes[lane]

    def _sharers(self, lane: int) -> list[tuple[int, _Lane]]:
        """The other lanes that have the very stretch that the lane has."""
        mine = self._lanes[lane].has
        if mine is None:
            return []
        return [(number, other) for number, other in self._lanes.items() if number != lane and other.has is mine]

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
