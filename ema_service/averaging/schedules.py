"""Decay schedules: how much of the shadow an update retains.

A schedule is a pure function of its parameters, the counter before the update, and the number of steps that the update
stands for. Over a gap of several steps the retention is the product of the decays of those steps, in closed form.

``LitEma`` is LitEma of latent-diffusion to the bit: n = num_updates + 1, decay_n = min(decay, (1 + n) / (10 + n)), each
scalar a float32 (LitEma keeps ``decay`` in a float32 buffer and divides an int32 tensor, which gives float32). The
other schedules compute in float64, as their programs do.

Knows arithmetic. Does not know runs, tensors' memory, or who counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["COPY", "Constant", "HalfLife", "InverseGamma", "LitEma", "Power", "Retention", "Schedule", "Started"]


_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Retention:
    """What one update does: shadow <- shadow - weight * (shadow - param).

    decay: the fraction of the shadow that is retained, 0..1. weight: 1 - decay, rounded as the schedule defines.
    copies: the shadow becomes the parameters themselves, bit for bit, whatever the shadow was.
    """

    decay: float
    weight: float
    copies: bool = False


#: What an update does that copies the parameters.
COPY = Retention(0.0, 1.0, copies=True)


class Schedule(Protocol):
    """Computes the retention of the update that follows ``num_updates`` earlier ones."""

    def retention(self, num_updates: int, gap: int = 1) -> Retention:
        """The retention of an update.

        num_updates: the counter before the update, >= 0. gap: steps that the update stands for, >= 1; beyond 1 the
        result is the product of the decays of those steps.
        """


@dataclass(frozen=True, slots=True)
class LitEma:
    """LitEma's: warm-up, then ``decay``, 0..1: min(decay, (1 + n) / (10 + n)) at update n. Also torch_ema's.

    single: whether the scalars of a single step are float32, as LitEma's, or float64, as diffusers' and torch_ema's.
    """

    decay: float
    single: bool = True

    def retention(self, num_updates: int, gap: int = 1) -> Retention:
        """As Schedule.retention()."""
        if gap > 1:
            return _wide(self._product(num_updates, gap))
        n = num_updates + 1
        if not self.single:
            return _wide(min(self.decay, (1 + n) / (10 + n)))
        # LitEma divides an int32 tensor: both sides are rounded to float32, then the quotient.
        # As numpy's scalars: torch's would take a tenth of a small push.
        return _narrow(min(np.float32(self.decay), np.float32(1 + n) / np.float32(10 + n)))

    def _product(self, num_updates: int, gap: int) -> float:
        """prod of min(decay, (1 + i) / (10 + i)) for i = num_updates + 1 .. num_updates + gap, in nine divisions.

        The warm-up factors telescope: prod_{i=n+1..n+D} (1 + i) / (10 + i) = prod_{j=2..10} (n + j) / (n + D + j).
        """
        warm = self._warm_steps(num_updates, gap)
        product = math.prod((num_updates + j) / (num_updates + warm + j) for j in range(2, 11))
        return product * self.decay ** (gap - warm)

    def _warm_steps(self, num_updates: int, gap: int) -> int:
        """How many of the next ``gap`` steps i have (1 + i) / (10 + i) < decay: i < (10 decay - 1) / (1 - decay)."""
        if self.decay >= 1.0:
            return gap
        last = math.ceil((10.0 * self.decay - 1.0) / (1.0 - self.decay)) - 1
        return min(max(last - num_updates, 0), gap)


@dataclass(frozen=True, slots=True)
class Constant:
    """The same decay, 0..1, at each step, whatever the counter says. LitEma's without its counter. single: as there."""

    decay: float
    single: bool = True

    def retention(self, num_updates: int, gap: int = 1) -> Retention:  # noqa: ARG002 - a Schedule takes it
        """As Schedule.retention()."""
        return _wide(self.decay**gap) if gap > 1 or not self.single else _narrow(np.float32(self.decay))


@dataclass(frozen=True, slots=True)
class HalfLife:
    """A constant decay by which the weight of an update halves within ``updates`` updates: 2^(-1 / updates)."""

    updates: float

    def retention(self, num_updates: int, gap: int = 1) -> Retention:  # noqa: ARG002 - a Schedule takes it
        """As Schedule.retention()."""
        return _logarithmic(-gap * math.log(2.0) / self.updates)


@dataclass(frozen=True, slots=True)
class Power:
    """The power function average of Karras et al. 2024 (arXiv 2312.02696): (1 - 1 / n)^(gamma + 1) at update n.

    The first update copies. Over any gap the factors telescope: (n / (n + D))^(gamma + 1). gamma > -1; with gamma 0 all
    updates weigh the same (stochastic weight averaging).
    """

    gamma: float

    def retention(self, num_updates: int, gap: int = 1) -> Retention:
        """As Schedule.retention()."""
        if num_updates <= 0:
            return COPY
        return _logarithmic(-(self.gamma + 1.0) * math.log1p(gap / num_updates))


@dataclass(frozen=True, slots=True)
class InverseGamma:
    """The warm-up of diffusers' EMAModel, timm's ModelEmaV3 and ema-pytorch's EMA.

    1 - (1 + s / inv_gamma)^-power at update n = s + 1, no less than ``least`` and no more than ``decay``; the first
    update retains nothing. Their ``update_after_step`` is Started. inv_gamma, power > 0; 0 <= least <= decay <= 1.
    """

    decay: float
    inv_gamma: float = 1.0
    power: float = 2 / 3
    least: float = 0.0

    def retention(self, num_updates: int, gap: int = 1) -> Retention:
        """As Schedule.retention(). The first update averages with weight 1, as diffusers does, and is no exact copy."""
        if num_updates <= 0:
            return _wide(0.0)
        # As those programs write it, so that a float32 shadow is theirs to the bit.
        if gap == 1:
            return _wide(self._clipped(1 - (1 + num_updates / self.inv_gamma) ** -self.power))
        return _logarithmic(self._log_product(num_updates, num_updates + gap))

    def _clipped(self, decay: float) -> float:
        return max(min(decay, self.decay), self.least)

    def _log_product(self, first: int, behind: int) -> float:
        """The logarithm of the product of the decays of s = first .. behind - 1: below ``least`` the decay is constant,
        then it follows the curve, then it is constant again."""
        most = max(self.decay, self.least)
        rising = min(max(self._reaches(self.least), first), behind)
        capped = min(max(self._reaches(most), rising), behind)
        flat = _times(rising - first, self.least) + _times(behind - capped, most)
        return flat + self._log_curve(rising, capped)

    def _reaches(self, decay: float) -> int:
        """The first s >= 1 at which the curve is at or above ``decay``; beyond all counters where none is."""
        if decay <= 0.0:
            return 1
        if decay >= 1.0:
            return _NEVER
        s = self.inv_gamma * math.expm1(min(-math.log1p(-decay) / self.power, _LARGEST_EXPONENT))
        return max(math.ceil(min(s, _NEVER)), 1)

    def _log_curve(self, first: int, behind: int) -> float:
        """The sum of log(1 - (1 + s / inv_gamma)^-power) over s = first .. behind - 1: one by one where s is small,
        beyond by the Euler-Maclaurin formula on midpoints, which is as exact and takes no longer for a million steps.
        """
        near = min(max(first, _ONE_BY_ONE), behind)
        total = math.fsum(self._log(np.arange(first, near, dtype=np.float64))) if first < near else 0.0
        if near == behind:
            return total
        low, high = near - 0.5, behind - 0.5
        slope = self._slope(high) - self._slope(low)
        bend = self._bend(high) - self._bend(low)
        return total + self._integral(low, high) - slope / 24.0 + 7.0 * bend / 5760.0

    def _log(self, s: _Floats) -> _Floats:
        """The logarithm of the curve, to the last digits both where the curve is near 0 and near 1."""
        rest = self.power * np.log1p(s / self.inv_gamma)
        return np.where(rest < 0.7, np.log(-np.expm1(-rest)), np.log1p(-np.exp(-rest)))

    def _slope(self, s: float) -> float:
        """The first derivative of the logarithm of the curve at s."""
        rest = self.power * math.log1p(s / self.inv_gamma)
        return self.power / ((self.inv_gamma + s) * math.expm1(rest))

    def _bend(self, s: float) -> float:
        """The third derivative, by differences of the first: three digits of it are enough."""
        width = s / 64.0
        return (self._slope(s + width) - 2.0 * self._slope(s) + self._slope(s - width)) / width**2

    def _integral(self, low: float, high: float) -> float:
        """The integral of the logarithm of the curve, by Gauss-Legendre over stretches of log s: there it is smooth."""
        edges = np.linspace(0.0, math.log(high / low), 2 + int(math.log2(high / low)))
        half = np.diff(edges)[:, None] / 2.0
        s = low * np.exp(edges[:-1, None] + half * (1.0 + _NODES))
        return math.fsum((self._log(s) * s * _WEIGHTS * half).ravel())


@dataclass(frozen=True, slots=True)
class Started:
    """A schedule that begins after update ``start``, as ``update_after_step`` of other programs has it.

    Up to and including update ``start`` + 1 the shadow is the parameters; from there the schedule counts, as if those
    parameters had been the initial ones. To a schedule whose first update copies, that update is its first.
    """

    schedule: LitEma | Constant | HalfLife | Power | InverseGamma
    start: int

    def retention(self, num_updates: int, gap: int = 1) -> Retention:
        """As Schedule.retention()."""
        if isinstance(self.schedule, Power | InverseGamma):
            return self.schedule.retention(num_updates - self.start, gap)
        if num_updates <= self.start:
            # diffusers' EMAModel, which has LitEma's warm-up without inv_gamma, averages with weight 1.
            return _wide(0.0) if isinstance(self.schedule, LitEma) else COPY
        return self.schedule.retention(num_updates - self.start - 1, gap)


#: A counter that no run reaches.
_NEVER = 2**63
#: Of which the exponential is a float.
_LARGEST_EXPONENT = 700.0
#: Up to this s the logarithms of decays are added up one by one: beyond, the third correction of Euler-Maclaurin is
#: below 1e-11 of a decay's logarithm, and the one left out below 1e-17.
_ONE_BY_ONE = 1024
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)


def _times(count: int, decay: float) -> float:
    """The logarithm of ``count`` times ``decay``."""
    if not count:
        return 0.0
    return count * math.log(decay) if decay > 0.0 else -math.inf


def _narrow(decay: np.float32) -> Retention:
    """Float32 scalars, as LitEma computes them: 1.0 - decay rounds once."""
    return Retention(decay=float(decay), weight=float(np.float32(1.0) - decay))


def _wide(decay: float) -> Retention:
    """Float64 scalars. LitEma, which has no gaps, has no product of decays to be equal to."""
    return Retention(decay=decay, weight=1.0 - decay)


def _logarithmic(log: float) -> Retention:
    """Float64 scalars by the logarithm of the decay: a weight far below 1 keeps its digits."""
    return Retention(decay=math.exp(log), weight=-math.expm1(log))
