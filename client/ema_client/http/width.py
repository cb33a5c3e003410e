"""How many lanes pay: found from the rates that are seen, for one service and one direction.

A single flow may have a share of the link only (clouds give one 5 Gbit/s of 100), and more flows then bring more; or
the link, or the processors of either end, are the limit, and more flows bring nothing. Which of the two it is shows
when twice as many lanes are tried beside as many as before: in turns, since the rates of a shared link wander.

Knows: rates, and the processors that lanes want. Does not know: clocks, threads, connections. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

__all__ = ["MOST_LANES", "Seen", "Width"]

#: Lanes at the most, where nobody said otherwise.
MOST_LANES = 8
#: More lanes stay from this gain on; fewer lanes stay up to this loss.
_WORTH, _BEARABLE = 1.10, 0.95
#: A gain like this is no noise: the trial is over with one measurement.
_PLAIN = 1.5
#: Pairs of measurements of a trial, of which the middle one counts.
_PAIRS = 3
#: Bodies until more lanes are tried again after they brought nothing, at first and at most; it doubles in between.
_FIRST_REST, _LONGEST_REST = 200, 3200
#: The body from which on nothing is used for the first time: a run has two versions, and each body meets one.
_WARM = 3
#: Bytes a second of one lane: a slower lane does not wait for memory that is used for the first time, of which the
#: slowest machine that was seen gives 0.7 GB a second.
_UNUSED_RATE = 200e6
#: Bodies between two trials of fewer lanes.
_CHECK = 200


@dataclass(frozen=True, slots=True)
class Seen:
    """A measurement, with ``lanes`` lanes at work all the while.

    rate: bytes a second, of all lanes together.
    wanted: processors that the lanes ran on or waited for here, on the average; None where the system does not tell.
    """

    lanes: int
    rate: float
    wanted: float | None


@dataclass(slots=True)
class _Trial:
    """``other`` lanes beside ``usual``, in turns. first: the rate of the latest measurement with the usual number."""

    usual: int
    other: int
    first: float
    ratios: list[float] = field(default_factory=list)


class Width:
    """The number of lanes, of one service and one direction. Not thread-safe.

    More than a dozen attributes: what may be (start, most, cores, ends), what was found (usual, why, crowded, alike),
    and what is tried and when (trial, rest, next rest, check, bodies).

    Args:
        start: lanes to begin with.
            Fewer are tried where the processors are the limit, as soon as memory is no longer used for the first time.
        most: lanes at the most.
        cores: processors of this machine that lanes may use.
        ends: how often the processors that the lanes want here are wanted on this machine: once for a service on
            another host, and about two or three times for one on this host.
    """

    def __init__(self, start: int, most: int, *, cores: float, ends: int = 1) -> None:
        self._start = start
        self._most = max(start, most)
        self._cores = cores
        self._ends = ends
        self._usual = start
        self._trial: _Trial | None = None
        #: Bodies until the next trial of more lanes, and until that of fewer.
        self._rest, self._next_rest = 0, _FIRST_REST
        self._check = _WARM
        self._bodies = 0
        #: Whether lanes wanted all processors when they were last measured: such lanes are alike.
        self.crowded = False
        #: Whether the lanes of the latest body brought about as much a second each.
        self.alike = False
        #: Why there are not more lanes, in words.
        self.why = "not tried yet"

    @property
    def lanes(self) -> int:
        """How many lanes the body that is on its way, or the next one, should have now."""
        trial = self._trial
        if trial is None:
            return self._usual
        # A pair is a measurement with the usual number, then one with the other.
        return trial.other if trial.first else trial.usual

    @property
    def found(self) -> int:
        """The number of lanes that paid so far."""
        return self._usual

    @property
    def settled(self) -> bool:
        """Whether no other number of lanes is being tried, or would be with the next measurement."""
        return self._trial is None and (self._rest > 0 or self._usual >= self._most or self.crowded)

    def begins(self) -> None:
        """A body that may have lanes begins."""
        self._bodies += 1
        trial = self._trial
        if self._bodies <= _WARM and trial is not None and trial.first / trial.usual > _UNUSED_RATE:
            # The first bodies meet memory that was never used, at either end: whatever comes after them is faster.
            trial.first = 0.0
        self._rest = max(0, self._rest - 1)
        self._check = max(0, self._check - 1)

    def bound(self, most: int) -> None:
        """Have ``most`` lanes at the most, as the service takes no more."""
        self._most = max(1, most)
        if self._usual > self._most or (self._trial and self._trial.other > self._most):
            self._usual, self._trial = min(self._usual, self._most), None

    def saw(self, seen: Seen) -> None:
        """Take a measurement into account; one with another number of lanes than ``lanes`` says nothing."""
        if seen.lanes != self.lanes or seen.rate <= 0:
            return
        # Twice the lanes want twice the processors, here and, where the service is on this host, there.
        self.crowded = seen.wanted is not None and seen.wanted * self._ends * 2 > self._cores
        if self._trial is None:
            self._consider(seen)
        elif not self._trial.first:
            self._trial.first = seen.rate
        else:
            self._compare(self._trial, seen)

    def _consider(self, seen: Seen) -> None:
        """Begin a trial where one is due, with ``seen`` as its first measurement."""
        usual = self._usual
        if self._check == 0 and usual > self._fewest:
            self._check = _CHECK
            self._trial = _Trial(usual, max(self._fewest, usual // 2), seen.rate)
        elif self._rest == 0 and self._may_grow(seen):
            self._trial = _Trial(usual, min(2 * usual, self._most), seen.rate)

    @property
    def _fewest(self) -> int:
        """Lanes at the least: fewer than there are at the beginning save processors alone."""
        return 1 if self.crowded else self._start

    def _may_grow(self, seen: Seen) -> bool:
        if self._usual >= self._most:
            self.why = "the most there may be"
        elif seen.wanted is None:
            self.why = "this system does not tell what more would cost"
        elif self.crowded and self._usual >= self._start:
            self.why = "the processors have no room for more"
        else:
            return True
        return False

    def _compare(self, trial: _Trial, seen: Seen) -> None:
        trial.ratios.append(seen.rate / trial.first)
        trial.first = 0.0
        more = trial.other > trial.usual
        plain = more and trial.ratios[-1] >= _PLAIN
        if len(trial.ratios) < _PAIRS and not plain:
            return
        self._trial = None
        gain = trial.ratios[-1] if plain else median(trial.ratios)
        if gain < (_WORTH if more else _BEARABLE):
            if more:
                self.why = f"{trial.other} brought {gain:.1f} times what {trial.usual} did"
                self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)
            return
        self.why = f"{trial.other} brought {gain:.1f} times what {trial.usual} did"
        self._usual, self._check, self._next_rest = trial.other, _CHECK, _FIRST_REST
        self._rest = 0 if more else _FIRST_REST
        if plain:
            # The next doubling is tried at once, beside what was just seen.
            self._consider(seen)
