"""Profiles of averages: the weight that an average gives to each update.

An average at time t is the sum over the updates i <= t of p(i; t) theta_i, with theta_i the parameters of update i.
p is its profile, and sums to 1. Time counts updates (steps, where an update may stand for several), so it is the
average's ``num_updates``.

Two kinds are described. A *power* average (Karras et al. 2024, arXiv 2312.02696, section 3) has
p(tau; t) = (gamma + 1) tau^gamma / t^(gamma + 1) on 0 <= tau <= t; ``sigma_rel``, the standard deviation of tau over p,
divided by t, says how long it is. Any other average is a recursion, shadow <- decay * shadow + (1 - decay) * theta, and
its profile follows from the decays of its updates.

Knows arithmetic and arrays. Does not know tensors, the names of schedules, snapshots, runs or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = [
    "WIDEST_SIGMA_REL",
    "Counters",
    "Floats",
    "TargetRefused",
    "decays_of",
    "elementwise",
    "gamma_of",
    "power_decay",
    "power_masses",
    "power_product",
    "profile_of",
    "sigma_rel_of",
]

#: An array of float64.
Floats = npt.NDArray[np.float64]
#: Times after updates: an array of int64, each larger than the one before.
Counters = npt.NDArray[np.int64]

#: sigma_rel at gamma 0, the uniform average: sqrt(1 / 12). Above this value old parameters would weigh more than new
#: ones.
WIDEST_SIGMA_REL = math.sqrt(1.0 / 12.0)
#: The widest sigma_rel that is offered in place of a refused one: gamma is 0.0016 there.
_WIDEST_OFFERED = 0.2886


class TargetRefused(ValueError):
    """A wished average that cannot be had. The message has the numbers, and what can be had instead.

    reason: ``sigma_rel``, ``decay``, ``time``, ``window``, ``soup``, ``error`` or ``rounding``: what was refused.
    nearest: what can be had instead, of the type of what was refused (a number, a target, several times); None where
    nothing can.
    """

    def __init__(self, reason: str, message: str, nearest: object = None) -> None:
        self.reason = reason
        self.nearest = nearest
        super().__init__(message)


def sigma_rel_of(gamma: float) -> float:
    """The relative width of a power average: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Raises ValueError where gamma is not above -1: such a profile has no finite mass.
    """
    if not gamma > -1.0:
        raise ValueError(f"gamma must be above -1, and is {gamma:g}")
    return math.sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0)


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power average with this relative width, to float64's precision.

    Raises TargetRefused where gamma would not be above 0, that is for sigma_rel >= WIDEST_SIGMA_REL, and where
    sigma_rel is not a positive number.

    gamma is the largest root of f(x) = (x + 2)^2 (x + 3) - (x + 1) / sigma_rel^2. Newton's iteration comes down to the
    root from 1 / sigma_rel without passing it, since f is convex for x > 0 and positive at 1 / sigma_rel.
    """
    if sigma_rel >= WIDEST_SIGMA_REL:
        raise TargetRefused(
            "sigma_rel",
            f"sigma_rel must be below {WIDEST_SIGMA_REL:.6f}, and is {sigma_rel:g}: from there on old parameters would "
            f"weigh more than new ones; the widest that can be had is {_WIDEST_OFFERED:g}",
            _WIDEST_OFFERED,
        )
    if not sigma_rel > 0.0:
        raise TargetRefused("sigma_rel", f"sigma_rel must be above 0, and is {sigma_rel:g}")
    gamma = 1.0 / sigma_rel
    for _ in range(100):
        closer = gamma - _excess(gamma, sigma_rel)
        if not closer < gamma:
            break
        gamma = closer
    return gamma


def _excess(gamma: float, sigma_rel: float) -> float:
    """Newton's step f(gamma) / f'(gamma), with both times sigma_rel^2, so that neither overflows."""
    scaled = sigma_rel * (gamma + 2.0)
    value = scaled * scaled * (gamma + 3.0) - (gamma + 1.0)
    slope = scaled * sigma_rel * (3.0 * gamma + 8.0) - 1.0
    return value / slope


def power_product(a: float, s: float, b: float, t: float, over: tuple[float, float] | None = None) -> float:
    """The inner product of the power profile with gamma ``a`` at time ``s`` and that with gamma ``b`` at time ``t``.

    It is the integral of their product over all times, or over those in ``over`` alone. For s <= t the whole is
    (a + 1) (b + 1) / (a + b + 1) * s^b / t^(b + 1).
    """
    low, high = over if over is not None else (0.0, math.inf)
    low, high = max(low, 0.0), min(high, s, t)
    if high <= low:
        return 0.0
    inside = 1.0 - (low / high) ** (a + b + 1.0)
    height = (a + 1.0) * (high / s) ** a / s * (b + 1.0) * (high / t) ** b / t
    return float(height * high * inside / (a + b + 1.0))


def power_decay(gamma: float) -> Callable[[Counters, Counters], Floats]:
    """The retention of a power average from n over a gap of D: (n / (n + D))^(gamma + 1), for arrays of n and D."""

    def decay_over(n: Counters, gap: Counters) -> Floats:
        return np.asarray((n / (n + gap)) ** (gamma + 1.0), dtype=np.float64)

    return decay_over


def power_masses(gamma: float, low: Floats, high: Floats, at: float) -> Floats:
    """The share of each span (low, high] in the power average at time ``at``: the integral of its profile there.

    Exact to a few roundings for narrow spans also, where a difference of two powers would cancel. The discrete power
    average gives an update whose gap is this span exactly this weight (derived: its retentions from ``high`` to ``at``
    telescope to (high / at)^(gamma + 1)).
    """
    high = np.maximum(high, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        shrinking = np.log1p(-(high - np.clip(low, 0.0, high)) / high)
    inside = np.where(high > 0.0, -np.expm1((gamma + 1.0) * shrinking), 0.0)
    return np.asarray((high / at) ** (gamma + 1.0) * inside, dtype=np.float64)


def elementwise(decay_over: Callable[[int, int], float]) -> Callable[[Counters, Counters], Floats]:
    """A retention of two integers as one of two arrays: it is called for every pair, 0.2 to 1 us each."""

    def decays_over(n: Counters, gap: Counters) -> Floats:
        return np.fromiter(map(decay_over, n.tolist(), gap.tolist()), np.float64, len(n))

    return decays_over


def decays_of(decay_over: Callable[[Counters, Counters], Floats], counters: Counters, *, start: int = 0) -> Floats:
    """The retention of each update, from a schedule's retention over a gap.

    Args:
        decay_over: what the schedule retains from counter n over a gap of D; called once, with arrays of n and D.
            ``power_decay`` makes such a function, ``elementwise`` makes one of a function of two integers.
        counters: the counter after each update, ascending. Weights that were given before the first update count as the
            parameters of an update whose counter is 0.
        start: the counter of the update that the average began with as a copy of the parameters. The result is 0 up to
            and including this update, and the schedule counts from here.
    """
    begun = int(np.searchsorted(counters, start, side="right"))
    own = counters[begun:] - start
    gaps = np.diff(own, prepend=0)
    decays = np.zeros(len(counters))
    decays[begun:] = decay_over(own - gaps, gaps)
    return decays


def profile_of(decays: Floats) -> tuple[Floats, float]:
    """The profile of a recursion after the last of these updates, and what it retains of the shadow before the first.

    The weight of an update is 1 - its decay, times the decays of all later updates. Weights and retention sum to 1.
    """
    retained = np.cumprod(decays[::-1])[::-1]
    profile = 1.0 - decays
    profile[:-1] *= retained[1:]
    return profile, float(retained[0])
