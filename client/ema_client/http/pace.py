"""The number of lanes in the course of one body, measured while the body is on its way; remembered for the next body.

Knows: clocks, and what the lanes of this process want of its processors. Does not know: what follows from a measurement
(width), how lanes carry bytes (lanes).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
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
        self._began = self._since = clock()
        self._whole = self._bytes = 0
        self._at_work: frozenset[int] = frozenset()
        self._wanted: Mapping[int, float] | None = None
        self._measured = self._steady = False

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
        if self._width is not None:
            with self._guard:
                self._steady = not self._at_work or (self._steady and self._whole == 0)
                self._at_work = threads
                self._restart(_SETTLING if self._whole else 0.0)

    def moved(self, count: int) -> None:
        """The lanes carried so many more bytes."""
        if self._width is None:
            return
        with self._guard:
            self._whole += count
            now = self._clock()
            if now < self._since:
                return
            self._bytes += count
            if now - self._since >= _WINDOW:
                self._measure(now)

    def ends(self, *, alike: bool = False) -> None:
        """The last byte of the body has come: a body that was shorter than a measurement is one.

        alike: whether the lanes brought about as much a second each.
        """
        if self._width is not None:
            with self._guard:
                self._width.alike = alike
                if not self._measured and self._steady:
                    self._since, self._bytes = self._began, self._whole
                    self._measure(self._clock())

    def _measure(self, now: float) -> None:
        seconds = now - self._since
        if self._width is None or seconds < _SHORTEST:
            return
        self._measured = True
        self._width.saw(Seen(len(self._at_work), self._bytes / seconds, self._cores_wanted(seconds)))
        self._restart(0.0)

    def _cores_wanted(self, seconds: float) -> float | None:
        before, now = self._wanted, seconds_wanted(self._at_work)
        if before is None or now is None:
            return None
        return sum(wanted - before.get(thread, wanted) for thread, wanted in now.items()) / seconds

    def _restart(self, settling: float) -> None:
        self._since = self._clock() + settling
        self._bytes = 0
        self._wanted = seconds_wanted(self._at_work)


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
        """Of the directions in which more lanes pay than there are at the beginning, how many, and why not more."""
        with self._lock:
            return {
                direction: f"{width.found} ({width.why})"
                for direction, width in self._widths.items()
                if width.found > _START[direction]
            }
