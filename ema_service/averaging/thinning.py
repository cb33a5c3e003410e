"""Thinning: which times a ring keeps, so that any average can be synthesised, whenever the training ends.

A ring holds the snapshots of some power averages at a bounded number of times. Nobody knows how many updates will come:
candidates are taken at regular intervals, and of a full ring the time is dropped that the synthesis misses least.

The error of a target, the power average with exponent g, at time n from the times t_1 < ... < t_K = n is
eps^2 = (2 g + 1) * sum over k of (t_k / n)^(2 g + 1) * rho_g(t_(k-1) / t_k), with t_0 = 0. rho_g(r) is the squared
distance on [r, 1] of x^g from the span of the averages' x^gamma, among functions of the same mass (DESIGN.md: the
intervals are independent, and a power profile keeps its shape when time is scaled).

Knows power profiles and counters. Does not know snapshots, files, runs, or who writes and deletes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ema_service.averaging.profiles import Floats, gamma_of

__all__ = ["TARGETS", "Forecast", "Ring", "errors_of", "forecast"]

#: The widths whose errors the rule weighs against each other.
TARGETS = (0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)
#: Nodes of the quadrature: errors are right to 1e-9 of their value, for averages from sigma_rel 0.003 to 0.28.
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(96)


@dataclass(frozen=True, slots=True)
class Ring:
    """The times of a ring's snapshots, and what is to become of the next one.

    Its decisions follow from these four values alone, so a ring can be built again from what is stored.

    sigma_rels: widths of the averages, each different.
    capacity: times that are kept; there is one more between the writing of a snapshot and the dropping of another.
    every: updates between candidates at the beginning; the interval doubles as the training goes on.
    times: ascending.

    Raises ValueError for values that make no ring, TargetRefused for a width that no power average has.
    """

    sigma_rels: tuple[float, ...]
    capacity: int
    every: int
    times: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min(self.capacity, self.every) < 1 or not 0 < len(set(self.sigma_rels)) == len(self.sigma_rels):
            raise ValueError("a ring needs averages of different widths, and a capacity and an interval of at least 1")
        _gammas(self.sigma_rels)

    def interval(self, n: int) -> int:
        """Updates between candidates at time ``n``: ``every``, doubled until n has at most 2 * capacity intervals."""
        intervals = -(-n // (2 * self.capacity * self.every))
        return self.every * (1 << max(intervals - 1, 0).bit_length())

    def due(self, n: int) -> bool:
        """Whether to take a snapshot after the update whose counter is ``n``: the first at or past each multiple of the
        interval. Takes microseconds.
        """
        interval, newest = self.interval(n), self.times[-1] if self.times else 0
        return n // interval > newest // interval

    def taken(self, n: int) -> Ring:
        """The ring with a snapshot at ``n``, after all others."""
        return replace(self, times=(*self.times, n))

    def surplus(self) -> int | None:
        """The time to drop, if there are more than ``capacity``: that without which the targets' errors at the newest
        time have the smallest sum of eighth powers, so nearly the smallest maximum.

        A sum of squares lets the widest targets fall behind: their largest error is 0.0101 then, not 0.0082.
        """
        if len(self.times) <= self.capacity:
            return None
        gammas, wished = _gammas(self.sigma_rels), _gammas(TARGETS)
        times = np.array((0, *self.times), dtype=np.float64)
        kept = _shares(gammas, wished, times[:-1], times[1:], times[-1])
        merged = _shares(gammas, wished, times[:-2], times[2:], times[-1])
        squared = kept.sum(axis=0) + merged - kept[:-1] - kept[1:]
        return self.times[int(np.argmin((squared**4).sum(axis=1)))]

    def dropped(self, time: int) -> Ring:
        """The ring without the snapshot at this time."""
        return replace(self, times=tuple(one for one in self.times if one != time))


@dataclass(frozen=True, slots=True)
class Forecast:
    """The largest error of a planned ring over the targets.

    at_end: at the planned number of updates.
    at_worst: there, or at any smaller number of capacity * every or more, should the training end early.
    """

    at_end: float
    at_worst: float


def errors_of(sigma_rels: Sequence[float], times: Sequence[int], at: int, targets: Sequence[float] = TARGETS) -> Floats:
    """The relative errors of these targets at time ``at``, from the averages' snapshots up to it and their state at it.

    For many updates in each interval; with few updates the true error is smaller (``synthesis`` has the true one).
    """
    upto = np.array((0, *(time for time in times if 0 < time < at), at), dtype=np.float64)
    shares = _shares(_gammas(tuple(sigma_rels)), _gammas(tuple(targets)), upto[:-1], upto[1:], at)
    return np.asarray(np.sqrt(shares.sum(axis=0)))


def forecast(
    sigma_rels: Sequence[float],
    capacity: int,
    updates: int,
    every: int,
    targets: Sequence[float] = tuple(np.geomspace(0.015, 0.25, 25)),
) -> Forecast:
    """The errors of a plan, from going through all its candidates.

    Raises TargetRefused where a width is out of bounds.
    """
    ring, worst = Ring(tuple(sigma_rels), capacity, every), 0.0
    for begin, end in _stretches(ring, updates):
        if begin:
            ring = ring.taken(begin)
        if (drop := ring.surplus()) is not None:
            ring = ring.dropped(drop)
        for length in {begin, begin + 1, (begin + end) // 2, end} - {0}:
            if length >= capacity * every:
                worst = max(worst, float(errors_of(sigma_rels, ring.times, length, targets).max()))
    at_end = float(errors_of(sigma_rels, ring.times, updates, targets).max())
    return Forecast(at_end, max(worst, at_end))


def _stretches(ring: Ring, updates: int) -> Iterator[tuple[int, int]]:
    """For 0 and each candidate: its time, and the last before the next candidate or the end."""
    begin = 0
    while begin < updates:
        following = _following(ring, begin)
        yield begin, min(following - 1, updates)
        begin = following


def _following(ring: Ring, candidate: int) -> int:
    """The time of the next candidate, the next multiple of the interval that holds there."""
    following, interval = candidate + 1, 0
    while interval != ring.interval(following):
        interval = ring.interval(following)
        following = (candidate // interval + 1) * interval
    return following


@lru_cache
def _gammas(sigma_rels: tuple[float, ...]) -> Floats:
    return np.array([gamma_of(sigma_rel) for sigma_rel in sigma_rels])


def _shares(gammas: Floats, wished: Floats, low: Floats, high: Floats, at: float) -> Floats:
    """The share of each interval (low, high] in eps^2 of each wished exponent at time ``at``: (intervals, wished)."""
    degrees = 2.0 * wished + 1.0
    return np.asarray(degrees * (high[:, None] / at) ** degrees * _distances(gammas, wished, low / high))


def _distances(gammas: Floats, wished: Floats, ratios: Floats) -> Floats:
    """rho_g(r) of the wished exponents g, for these r: (ratios, wished).

    The columns of a QR factorisation are the averages' powers, 1, and the wished powers, at the nodes of a quadrature.
    What is left of a wished power below the rows of the averages is its distance from their span. Holding the mass adds
    <rest of 1, rest of the wished>^2 / |projection of 1|^2.
    """
    nodes, roots = _quadrature(ratios)
    exponents = np.concatenate((gammas, (0.0,), wished))
    corner: Floats = np.asarray(np.linalg.qr(nodes[:, :, None] ** exponents * roots[:, :, None], mode="r"))
    m = len(gammas)
    rest, ones = corner[:, m:, m + 1 :], corner[:, : m + 1, m]
    missed = (ones[:, m, None] * rest[:, 0]) ** 2 / (ones[:, :m] ** 2).sum(axis=1)[:, None]
    return np.asarray((rest**2).sum(axis=1) + missed)


def _quadrature(ratios: Floats) -> tuple[Floats, Floats]:
    """Nodes on [r, 1] and square roots of their weights, for each r: two arrays (ratios, nodes).

    With x = y^2 on all of [0, 1], where a power below 1 is not smooth at 0.
    """
    unit, weights = (_NODES + 1.0) / 2.0, _NODE_WEIGHTS / 2.0
    whole = (ratios == 0.0)[:, None]
    length = 1.0 - ratios[:, None]
    nodes = np.where(whole, unit**2, ratios[:, None] + length * unit)
    return nodes, np.sqrt(np.where(whole, 2.0 * unit * weights, length * weights))
