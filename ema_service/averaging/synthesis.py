"""Synthesis of an average after the training: the weight of each snapshot in the wished average.

Given are the snapshots of a few averages at some times, and a target: an average of another length, or that of a
window. The weights make the profile of the weighted sum of the snapshots as near as can be to the target's profile, in
least squares over all updates.

The least squares fall apart into one small problem for each interval between two times. Let S(t_k) be an average's
snapshot at t_k, and R_k what the average retains from t_(k-1) to t_k. Then S(t_k) - R_k S(t_(k-1)) holds no update up
to t_(k-1), so these differences of two intervals have no update in common. With c_k the coefficient of the difference,
the weight of S(t_k) is c_k - R_(k+1) c_(k+1). The coefficients of an interval are held to the target's mass in it, and
damped, so that they don't magnify the rounding of the snapshots. DESIGN.md has the derivation and the figures.

Knows profiles and least squares. Does not know tensors, the names of schedules, files, runs or HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ema_service.averaging.profiles import Counters, Floats, TargetRefused, profile_of
from ema_service.averaging.targets import Target

__all__ = [
    "MAX_ERROR",
    "MAX_ROUNDING",
    "ROUNDING",
    "SnapshotBasis",
    "Synthesis",
    "TrackedAverage",
    "accepted",
    "approximate",
    "check",
    "soup",
]

#: Relative rounding of one stored value, root mean square, by the dtype of the snapshots.
ROUNDING = {"F64": 4.8e-17, "F32": 2.6e-8, "F16": 2.1e-4, "BF16": 1.7e-3}
#: The largest relative error of a profile that is accepted unless told otherwise.
MAX_ERROR = 0.05
#: The largest product of rounding and amplification that is accepted.
MAX_ROUNDING = 0.01

#: What a coefficient costs beside the error of the profile, relative to the norm of the target.
_DAMPING = {"F64": 1e-5, "F32": 1e-5, "F16": 1e-3, "BF16": 1e-2}
#: Updates of an interval that are looked at one by one; of more, neighbours are taken together. 0.3 s for 16 intervals.
_SINGLE = 1 << 16
#: The same in the search for a target that can be had instead of a refused one, which looks at some forty.
_SINGLE_IN_SEARCH = 1 << 11
#: Averages that differ by a smaller share than this do so by rounding.
_SAME = 1e-14
#: A snapshot whose profile is nearer than this to the target's is the target.
_EXACT = 1e-10


@dataclass(frozen=True, slots=True)
class TrackedAverage:
    """A tracked average.

    decays: what each update of the run retained, with the rounding of its schedule; 0 where an update copied the
    parameters, so also for all updates before a late average (``profiles.decays_of``).
    times: the counters at which its state can be read; the present state is one of these.
    """

    decays: Floats
    times: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Synthesis:
    """How snapshots are to be summed.

    weights: a weight for each snapshot, float64; they sum to 1.
    error: |found profile - target profile| / |target profile|, with norms over all updates.
    amplification: the norm of the weights, by which the rounding of stored values grows.
    """

    weights: Floats
    error: float
    amplification: float

    def rounding(self, dtype: str) -> float:
        """The expected error from storing the snapshots in this dtype, relative to the size of their values."""
        return ROUNDING[dtype] * self.amplification


@dataclass(frozen=True, slots=True)
class _Interval:
    """The updates between two times, and what the averages' differences over them span.

    low, high: the counters before and after each update, or group of neighbours.
    scale: 1 / sqrt(updates in the group): a profile's sum over a group times this has the norm of the profile there,
    as far as it is even in the group.
    usable: the averages whose difference can be had, u in number.
    basis, corner: basis @ corner are the scaled profiles of the differences; basis, (groups, r), is orthonormal.
    mass: the sums of these profiles, (u,).
    retained: what each average retains from one time to the other, (averages,).
    """

    low: Floats
    high: Floats
    scale: Floats
    usable: npt.NDArray[np.intp]
    basis: Floats
    corner: Floats
    mass: Floats
    retained: Floats

    def coefficients(self, seen: Floats, mass: float, damping: float) -> Floats:
        """The c that minimise |corner c - seen|^2 + damping^2 |c|^2 among those of the given mass."""
        held = self.mass * (mass / (self.mass @ self.mass))
        free = np.linalg.svd(self.mass[None, :])[2][1:].T
        left, values, right = np.linalg.svd(self.corner @ free, full_matrices=False)
        real = values > _SAME * np.linalg.norm(self.corner)
        filtered = np.divide(values, values**2 + damping**2, out=np.zeros_like(values), where=real)
        return np.asarray(held + free @ (right.T @ (filtered * (left.T @ (seen - self.corner @ held)))))


class SnapshotBasis:
    """The snapshots of some averages of a run, prepared for finding weights.

    Preparing them costs a QR factorisation over all updates, and keeps a number for each update and average. A target
    then costs two readings of these numbers. All of it is bounded: of the updates in a long interval, neighbours are
    taken together.
    """

    def __init__(self, counters: Counters, averages: Sequence[TrackedAverage], single: int = _SINGLE) -> None:
        """
        Args:
            counters: the time after each update of the run, ascending. The first is 0 where weights were given before
                any update: these count as an update's.
            averages: those that were tracked; an average that began late, or ended early, has no times outside.
            single: the most updates of an interval that are looked at one by one.

        Raises ValueError where these contradict each other, or an average does not begin with a copy of parameters.
        """
        self.times = tuple(sorted({time for average in averages for time in average.times}))
        self._has = np.array([[time in average.times for time in self.times] for average in averages], dtype=bool)
        self._given = (counters, averages)
        ends = np.searchsorted(counters, self.times)
        if not self.times or ends[-1] == len(counters) or np.any(counters[ends] != self.times):
            raise ValueError("there must be a snapshot, and each must have been taken after one of the updates")
        if any(len(average.decays) != len(counters) for average in averages):
            raise ValueError("each average must have a decay for each update")
        bounds = pairwise((0, *(ends + 1).tolist()))
        self._intervals = [self._interval(k, first, last, single) for k, (first, last) in enumerate(bounds)]

    def coarse(self) -> SnapshotBasis:
        """The same snapshots, with far fewer updates looked at one by one: errors to a few digits, at once."""
        return SnapshotBasis(*self._given, single=_SINGLE_IN_SEARCH)

    def _interval(self, k: int, first: int, last: int, single: int) -> _Interval:
        counters, averages = self._given
        profiles, lasting = zip(*(profile_of(average.decays[first:last]) for average in averages), strict=True)
        retained = np.array(lasting)
        if k == 0 and np.any(self._has[:, 0] & (retained > 0.0)):
            raise ValueError("an average must begin with a copy of the parameters: a decay of 0")
        before = self._has[:, k - 1] if k else np.zeros(len(averages), dtype=bool)
        usable = np.flatnonzero(self._has[:, k] & (before | (retained == 0.0)) & (retained < 1.0))
        starts = _groups([average.decays[first:last] for average in averages], single)
        scale = np.diff(starts, append=last - first) ** -0.5
        columns = [np.add.reduceat(profiles[j], starts) * scale for j in usable]
        basis, corner = np.linalg.qr(np.array(columns).reshape(-1, len(starts)).T)
        edges = np.concatenate(([counters[first - 1] if first else -math.inf], counters[first + starts[1:] - 1]))
        high = np.concatenate((edges[1:], [counters[last - 1]]))
        return _Interval(edges, high, scale, usable, basis, corner, 1.0 - retained[usable], retained)

    def solve(self, target: Target, at: int, damping: float) -> Synthesis:
        """The nearest weights, shaped (averages, times), for the target at time ``at``, one of ``times``.

        ``damping`` is the cost of a coefficient, relative to the target's norm. Where one snapshot is as near by
        itself, it is the result: a tracked average gives itself back.

        Raises TargetRefused where the target cannot be had at this time.
        """
        intervals = self._intervals[: self.times.index(at) + 1]
        views = [_View.of(target, one, at) for one in intervals]
        if unspanned := [time for one, time in zip(intervals, self.times, strict=False) if not len(one.usable)]:
            said = f"no average has snapshots at both ends of the interval up to {unspanned[0]}"
            raise TargetRefused("time", said)
        norm = math.sqrt(sum(view.squared for view in views))
        best = np.zeros((len(self._has), len(intervals)))
        for k, view in enumerate(views):
            best[view.interval.usable, k] = view.interval.coefficients(view.seen, view.mass, damping * norm)
        enough = max(_error(best, views), _EXACT * norm)
        for alone in self._each_alone(intervals):
            if _error(alone, views) <= enough:
                best = alone
        return self._synthesis(best, intervals, _error(best, views) / norm)

    def _each_alone(self, intervals: Sequence[_Interval]) -> Iterator[Floats]:
        """The coefficients, (averages, intervals), of each snapshot at the end of the last interval."""
        for j in intervals[-1].usable:
            tail = np.array([one.retained[j] for one in intervals[1:]] + [1.0])
            alone = np.zeros((len(self._has), len(intervals)))
            alone[j] = np.cumprod(tail[::-1])[::-1]
            if all(j in one.usable for one, share in zip(intervals, alone[j], strict=True) if share > 0.0):
                yield alone

    def _synthesis(self, coefficients: Floats, intervals: Sequence[_Interval], error: float) -> Synthesis:
        weights = np.zeros(self._has.shape)
        weights[:, : len(intervals)] = coefficients
        for k, one in enumerate(intervals[1:], 1):
            weights[:, k - 1] -= one.retained * coefficients[:, k]
        return Synthesis(weights, error, float(np.linalg.norm(weights)))


@dataclass(frozen=True, slots=True)
class _View:
    """A target's profile in an interval: its products with the basis, what the basis lacks of it, its mass and norm."""

    interval: _Interval
    seen: Floats
    unseen: float
    mass: float
    squared: float

    @classmethod
    def of(cls, target: Target, interval: _Interval, at: int) -> _View:
        masses = target.masses(interval.low, interval.high, at)
        scaled = masses * interval.scale
        seen = interval.basis.T @ scaled
        rest = scaled - interval.basis @ seen
        return cls(interval, seen, float(rest @ rest), float(masses.sum()), float(scaled @ scaled))


def _groups(decays: Sequence[Floats], single: int) -> npt.NDArray[np.intp]:
    """Where groups of neighbouring updates begin in an interval: few more than ``single`` groups of one size.

    The first update, and one that an average copied, are alone: they weigh far more than their neighbours may.
    """
    updates = len(decays[0])
    copied = [0, *(int(zeros[-1]) for each in decays if len(zeros := np.flatnonzero(each == 0.0)))]
    even = np.arange(0, updates, -(-updates // single))
    starts = np.unique(np.concatenate((even, copied, np.add(copied, 1))))
    return starts[starts < updates]


def _error(coefficients: Floats, views: Sequence[_View]) -> float:
    """|found profile - target profile|, of coefficients (averages, intervals)."""
    squared = 0.0
    for k, view in enumerate(views):
        off = view.interval.corner @ coefficients[view.interval.usable, k] - view.seen
        squared += view.unseen + float(off @ off)
    return math.sqrt(squared)


def approximate(snapshots: SnapshotBasis, target: Target, *, at: int | None = None, dtype: str = "F32") -> Synthesis:
    """The weights of the snapshots, (averages, times), whose sum is nearest to the target, however far from it.

    Args:
        at: one of the snapshots' times; the newest if None.
        dtype: of the stored snapshots, as safetensors writes it: its rounding damps the weights.

    Raises TargetRefused where ``at`` is no snapshot's time, or the target cannot be had at this time; its ``nearest``
    is the times beside ``at``.
    """
    time = snapshots.times[-1] if at is None else at
    if time not in snapshots.times:
        raise _no_snapshot(time, snapshots.times)
    return snapshots.solve(target, time, _DAMPING[dtype])


def check(
    found: Synthesis,
    snapshots: SnapshotBasis,
    target: Target,
    *,
    at: int | None = None,
    dtype: str = "F32",
    max_error: float = MAX_ERROR,
) -> None:
    """Raises TargetRefused where what approximate() found for the same arguments is too far from the target.

    That is where the error is above ``max_error``, or the expected rounding above MAX_ROUNDING; ``nearest`` is the
    nearest target that can be had.
    """
    if not accepted(found, dtype, max_error):
        time = snapshots.times[-1] if at is None else at
        raise _too_far(target, found, _nearest(snapshots, target, time, dtype, max_error), dtype, max_error)


def _nearest(snapshots: SnapshotBasis, target: Target, at: int, dtype: str, max_error: float) -> Target | None:
    """The nearest target of this kind that is accepted; None if none is in reach."""
    coarse = snapshots.coarse()
    for other in target.others([time for time in snapshots.times if time <= at]):
        if all(accepted(each.solve(other, at, _DAMPING[dtype]), dtype, max_error) for each in (coarse, snapshots)):
            return other
    return None


def soup(weights: Sequence[float]) -> Synthesis:
    """A soup of snapshots with given weights; its error is 0 by its definition.

    Raises TargetRefused where the weights are not finite numbers that sum to 1 within 1e-6 (smaller deviations are
    shared out, so the result sums to 1); its ``nearest`` is the weights divided by their sum.
    """
    given = np.asarray(weights, dtype=np.float64)
    whole = math.fsum(weights) if np.isfinite(given).all() else math.nan
    if not abs(whole - 1.0) <= 1e-6:
        shares = tuple((given / whole).tolist()) if math.isfinite(whole) and whole > 0.0 else None
        said = f": divided by their sum they are {', '.join(f'{share:.6g}' for share in shares)}" if shares else ""
        raise TargetRefused("soup", f"the weights of a soup must sum to 1, and sum to {whole:g}{said}", shares)
    return Synthesis(given / whole, 0.0, float(np.linalg.norm(given / whole)))


def accepted(found: Synthesis, dtype: str, max_error: float) -> bool:
    """Whether check() would not refuse what approximate() found."""
    return found.error <= max_error and found.rounding(dtype) <= MAX_ROUNDING


def _no_snapshot(at: int, times: Sequence[int]) -> TargetRefused:
    before = [time for time in times if time < at][-1:]
    after = [time for time in times if time > at][:1]
    beside = (*before, *after)
    said = " and ".join(str(time) for time in beside)
    return TargetRefused("time", f"there is no snapshot at {at}: the nearest are at {said}", beside)


def _too_far(target: Target, found: Synthesis, nearest: Target | None, dtype: str, max_error: float) -> TargetRefused:
    instead = f"; the nearest that can be had is {nearest}" if nearest is not None else ", and so would others near it"
    if found.error > max_error:
        said = f"{target} would have an error of {found.error:.2g}, above {max_error:g}"
        return TargetRefused("error", said + instead, nearest)
    said = f"{target} would have weights of norm {found.amplification:.3g}, and so a rounding error of "
    said += f"{found.rounding(dtype):.2g} with snapshots in {dtype}, above {MAX_ROUNDING:g}"
    return TargetRefused("rounding", said + instead, nearest)
