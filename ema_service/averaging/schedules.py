"""Decay schedules: how much of the shadow an update retains.

A schedule is a pure function of the configured decay, the counter before the update, and the number of steps that the
update stands for.

``litema`` is LitEma of latent-diffusion to the bit: n = num_updates + 1, decay_n = min(decay, (1 + n) / (10 + n)), each
scalar a float32 (LitEma keeps ``decay`` in a float32 buffer and divides an int32 tensor, which gives float32).

Knows arithmetic. Does not know runs, tensors' memory, or who counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = ["SCHEDULES", "Retention", "Schedule", "constant", "litema"]


@dataclass(frozen=True, slots=True)
class Retention:
    """What one update does: shadow <- shadow - weight * (shadow - param).

    decay: the fraction of the shadow that is retained, 0..1. weight: 1 - decay, rounded as the schedule defines.
    """

    decay: float
    weight: float


class Schedule(Protocol):
    """Computes the retention of the update that follows ``num_updates`` earlier ones.

    Args:
        decay: the configured decay, 0..1.
        num_updates: the counter before this update; -1 where the counter is off.
        gap: steps this update stands for, >= 1; beyond 1 the result is the product of the decays of those steps.
    """

    def __call__(self, decay: float, num_updates: int, gap: int = 1) -> Retention: ...


def litema(decay: float, num_updates: int, gap: int = 1) -> Retention:
    """The retention of LitEma: warm-up, then ``decay``. With the counter off (-1) that of ``constant``."""
    if num_updates < 0:
        return constant(decay, num_updates, gap)
    if gap > 1:
        return _wide(_litema_product(decay, num_updates, gap))
    n = num_updates + 1
    # LitEma divides an int32 tensor: both sides are rounded to float32, then the quotient.
    # As numpy's scalars: torch's would take a tenth of a small push.
    return _narrow(min(np.float32(decay), np.float32(1 + n) / np.float32(10 + n)))


def constant(decay: float, num_updates: int, gap: int = 1) -> Retention:  # noqa: ARG001 - a Schedule takes it
    """The same decay at each step, whatever the counter says."""
    return _wide(decay**gap) if gap > 1 else _narrow(np.float32(decay))


#: The schedules, by their names in a RunConfig.
SCHEDULES: dict[str, Schedule] = {"litema": litema, "constant": constant}


def _litema_product(decay: float, num_updates: int, gap: int) -> float:
    """prod of min(decay, (1 + i) / (10 + i)) for i = num_updates + 1 .. num_updates + gap, in nine divisions.

    The warm-up factors telescope: prod_{i=n+1..n+D} (1 + i) / (10 + i) = prod_{j=2..10} (n + j) / (n + D + j).
    """
    warm = _warm_steps(decay, num_updates, gap)
    product = math.prod((num_updates + j) / (num_updates + warm + j) for j in range(2, 11))
    return product * decay ** (gap - warm)


def _warm_steps(decay: float, num_updates: int, gap: int) -> int:
    """How many of the next ``gap`` steps i have (1 + i) / (10 + i) < decay: i < (10 decay - 1) / (1 - decay)."""
    if decay >= 1.0:
        return gap
    last = math.ceil((10.0 * decay - 1.0) / (1.0 - decay)) - 1
    return min(max(last - num_updates, 0), gap)


def _narrow(decay: np.float32) -> Retention:
    """Float32 scalars, as LitEma computes them: 1.0 - decay rounds once."""
    return Retention(decay=float(decay), weight=float(np.float32(1.0) - decay))


def _wide(decay: float) -> Retention:
    """Float64 scalars, for the product of several decays: LitEma, which has no gaps, has no such product to be equal
    to."""
    return Retention(decay=decay, weight=1.0 - decay)
