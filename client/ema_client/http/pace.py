"""The number of lanes in the course of one body, measured while the body is on its way; remembered for the next body.

Knows: clocks, and what the lanes of this process want of its processors. Does not know: what follows from a measurement
(width), how lanes carry bytes (lanes).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from ema_client.forks import Lock
from ema_client.http.processors import cores, seconds_wanted
from ema_client.http.width import MOST_LANES, Seen, Width

__all__ = ["MOST_FORCED", "PULLS", "PUSHES", "Pace", "Paces"]

#: Lanes at the most where a caller says how many.
MOST_FORCED = 64
#: The directions.
PULLS, PUSHES = "pull", "push"
#: Lanes to begin with. Two for a pull: of one connection one end sleeps while the other works.
_START = {PULLS: 2, PUSHES: 1}
#: What both ends on this host want of its processors, in shares of what the client's lanes want. The service averages a
#: push while it receives it: with the averaging its lanes take twice what the client's do.
_ENDS = {PULLS: 2, PUSHES: 3}
#: Seconds of one measurement, and seconds from a change of the number of lanes to the beginning of one.
_WINDOW, _SETTLING = 0.25, 0.05
#: A body in a shorter time says nothing of its lanes.
_SHORTEST = 0.02
#: A body is one measurement if its lanes had all joined by this share of the body, and none left before that share.
_EARLY, _LATE = 1 / 8, 3 / 4


@dataclass(slots=True)
class _Window:
    """What lanes did from the time ``since`` on. threads: of the lanes at work, by their native numbers.

    wanted: processors that the lanes ran on or waited for, on the average; None before see(), and where the system does
    not tell. before: seconds that each lane had wanted at the time ``since``.
    """

    since: float
    bytes: int = 0
    threads: frozenset[int] = frozenset()
    before: Mapping[int, float] | None = None
    wanted: float | None = None

    def lanes_are(self, threads: frozenset[int]) -> None:
        self.threads, self.before = threads, seconds_wanted(threads)

    def see(self, now: float) -> None:
        """Take what the lanes have wanted until ``now``, while the lanes' threads are alive."""
        before, latest = self.before, seconds_wanted(self.threads)
        if before is not None and latest is not None and now > self.since:
            each = (wanted - before.get(thread, wanted) for thread, wanted in latest.items())
            self.wanted = sum(each) / (now - self.since)


class Pace:
    """How many lanes one body has at the moment. Thread-safe.

    width: what decides, kept from two threads at once by ``guard``; None: there are ``lanes``.
    """

    def __init__(
        self, width: Width | None, lanes: int, guard: Lock, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._width = width
        self._fixed = lanes
        self._guard = guard
        self._clock = clock
        #: All of the body so far, and what has come of the measurement that goes on.
        self._whole, self._latest = _Window(clock()), _Window(clock())
        #: What of the body had come when the latest lane joined, and when the first one left.
        self._joined = 0
        self._left: int | None = None
        self._at_work: frozenset[int] = frozenset()
        self._measured = False

    @classmethod
    def fixed(cls, lanes: int) -> Pace:
        """So many lanes, whatever pays."""
        return cls(None, lanes, Lock())

    @property
    def lanes(self) -> int:
        """How many lanes there should be now."""
        if self._width is None:
            return self._fixed
        with self._guard:
            return self._width.lanes

    @property
    def alike(self) -> bool:
        """Whether the lanes will probably be alike: as many as those of the body before, and those were."""
        if self._width is None:
            return False
        with self._guard:
            return self._width.alike and self._width.settled

    def at_work(self, threads: frozenset[int]) -> None:
        """The lanes, by the native numbers of their threads, are these from now on."""
        if self._width is None:
            return
        with self._guard:
            if threads > self._at_work:
                self._joined, self._left = self._whole.bytes, None
                self._whole.lanes_are(threads)
            elif self._left is None:
                self._left = self._whole.bytes
                self._whole.see(self._clock())
            self._at_work = threads
            self._restart(_SETTLING if self._whole.bytes else 0.0)

    def moved(self, count: int) -> None:
        """The lanes carried so many more bytes."""
        if self._width is None:
            return
        with self._guard:
            self._whole.bytes += count
            now = self._clock()
            if now < self._latest.since:
                return
            self._latest.bytes += count
            if now - self._latest.since >= _WINDOW:
                self._latest.see(now)
                self._measure(self._latest, now)
                self._restart(0.0)

    def ends(self, *, alike: bool = False) -> None:
        """The last byte of the body has come: a body that was shorter than a measurement is one.

        alike: whether the lanes brought about as much a second each.
        """
        if self._width is None:
            return
        with self._guard:
            self._width.alike = alike
            if not self._measured and self._together:
                now = self._clock()
                if self._left is None:
                    self._whole.see(now)
                self._measure(self._whole, now)

    @property
    def _together(self) -> bool:
        """Whether the lanes were the same ones for about all of the body."""
        whole = self._whole.bytes
        left = whole if self._left is None else self._left
        return self._joined <= whole * _EARLY and left >= whole * _LATE

    def _measure(self, window: _Window, now: float) -> None:
        seconds = now - window.since
        if self._width is None or seconds < _SHORTEST:
            return
        self._measured = True
        self._width.saw(Seen(len(window.threads), window.bytes / seconds, window.wanted))

    def _restart(self, settling: float) -> None:
        self._latest = _Window(self._clock() + settling)
        self._latest.lanes_are(self._at_work)


class Paces:
    """What is known of the lanes to one service, for each direction. Thread-safe.

    One for each service in a process, however many clients the process makes: see of().
    """

    _known: ClassVar[dict[str, Paces]] = {}
    _guard: ClassVar[Lock] = Lock()

    def __init__(self, *, same_host: bool) -> None:
        self._lock = Lock()
        self._same_host = same_host
        most, ends = min(MOST_LANES, 4 * cores()), _ENDS if same_host else dict.fromkeys(_ENDS, 1)
        self._widths = {each: Width(start, most, cores=cores(), ends=ends[each]) for each, start in _START.items()}

    @classmethod
    def of(cls, url: str, *, same_host: bool) -> Paces:
        """What this process knows of the lanes to the service at ``url``."""
        with cls._guard:
            return cls._known.setdefault(url, Paces(same_host=same_host))

    def begin(self, direction: str, fixed: int | None) -> Pace:
        """The pace of a body that begins. fixed: so many lanes, whatever pays."""
        if fixed is not None:
            return Pace.fixed(fixed)
        with self._lock:
            self._widths[direction].begins()
        return Pace(self._widths[direction], 0, self._lock)

    def alike(self, direction: str) -> int | None:
        """How many lanes a body would have that began now, where they are alike; None where that is not known.

        Lanes are alike that want all processors of the one machine that both their ends run on.
        """
        with self._lock:
            width = self._widths[direction]
            return width.lanes if width.crowded and self._same_host else None

    def bound(self, direction: str, most: int) -> None:
        """Have ``most`` lanes at the most."""
        with self._lock:
            self._widths[direction].bound(most)

    @property
    def told(self) -> dict[str, str]:
        """Of the directions in which another number of lanes pays than there are at first, how many, and why."""
        with self._lock:
            return {
                direction: f"{width.found} ({width.why})"
                for direction, width in self._widths.items()
                if width.found != _START[direction]
            }
