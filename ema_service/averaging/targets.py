"""Targets: averages that can be wished for after the training, each by its profile.

Knows profiles. Does not know snapshots, how a target is reached, tensors, runs or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ema_service.averaging.profiles import WIDEST_SIGMA_REL, Floats, TargetRefused, gamma_of, power_masses

__all__ = ["ConstantDecay", "ConstantHalfLife", "SigmaRel", "Target", "Window"]

#: How far the first neighbours in a search for the nearest target lie from the wished one, as a share of it.
_NEAREST = 0.05
#: The next ones lie farther by this factor, up to the last.
_FARTHER, _FARTHEST = 1.25, math.log(4096.0)


class Target(Protocol):
    """A wished average, by its profile."""

    def masses(self, low: Floats, high: Floats, at: int) -> Floats:
        """The weight of each update up to time ``at`` in the wished average at this time; they sum to 1.

        ``high`` is the counter after each update and ``low`` the one before it, -inf before the first.

        Raises TargetRefused where the target needs updates after ``at``.
        """
        ...

    def others(self, times: Sequence[int]) -> Iterable[Target]:
        """Other targets of this kind, the nearest first; ``times`` are those of the snapshots."""
        ...


@dataclass(frozen=True, slots=True)
class SigmaRel:
    """The power average of this relative width, 0 < sigma_rel < 0.28867.

    Raises TargetRefused for another width.
    """

    sigma_rel: float

    def __post_init__(self) -> None:
        gamma_of(self.sigma_rel)

    def __str__(self) -> str:
        return f"sigma_rel {self.sigma_rel:.4g}"

    def masses(self, low: Floats, high: Floats, at: int) -> Floats:
        """The integrals of the power profile over the updates' gaps: what tracking gives, at any gaps."""
        return power_masses(gamma_of(self.sigma_rel), low, high, at)

    def others(self, times: Sequence[int]) -> Iterator[SigmaRel]:  # noqa: ARG002 - a Target takes them
        """Wider and narrower ones, inside the bounds."""
        return (SigmaRel(width) for width in _around(self.sigma_rel) if width < WIDEST_SIGMA_REL)


@dataclass(frozen=True, slots=True)
class ConstantDecay:
    """What one decay at every update would have given, from a copy of the first parameters on; 0 < decay < 1.

    Raises TargetRefused for another decay.
    """

    decay: float

    def __post_init__(self) -> None:
        if not 0.0 < self.decay < 1.0:
            raise TargetRefused("decay", f"decay must be above 0 and below 1, and is {self.decay:g}")

    def __str__(self) -> str:
        return f"decay {self.decay:.9g}"

    def masses(self, low: Floats, high: Floats, at: int) -> Floats:
        """decay^(at - high) - decay^(at - low); an update over a gap retains decay^gap."""
        return _exponential(-math.log(self.decay), low, high, at)

    def others(self, times: Sequence[int]) -> Iterator[ConstantDecay]:  # noqa: ARG002 - a Target takes them
        """Decays of longer and shorter averages."""
        return (ConstantDecay(round(1.0 - weight, 12)) for weight in _around(1.0 - self.decay) if weight < 1.0)


@dataclass(frozen=True, slots=True)
class ConstantHalfLife:
    """What a constant decay of 2^(-1 / updates) would have given.

    Raises TargetRefused unless ``updates`` is a number above 0.
    """

    updates: float

    def __post_init__(self) -> None:
        if not 0.0 < self.updates < math.inf:
            raise TargetRefused("decay", f"a half-life must be a number of updates above 0, and is {self.updates:g}")

    def __str__(self) -> str:
        return f"half-life {self.updates:.4g}"

    def masses(self, low: Floats, high: Floats, at: int) -> Floats:
        """Those of the constant decay."""
        return _exponential(math.log(2.0) / self.updates, low, high, at)

    def others(self, times: Sequence[int]) -> Iterator[ConstantHalfLife]:  # noqa: ARG002 - a Target takes them
        """Longer and shorter ones."""
        return (ConstantHalfLife(updates) for updates in _around(self.updates))


@dataclass(frozen=True, slots=True)
class Window:
    """The uniform average of the updates in (first, last].

    An update that stands for several steps counts by those of its steps that lie in the window.

    Raises TargetRefused unless 0 <= first < last.
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last:
            raise TargetRefused("window", f"a window must begin at 0 or later and end after that, and is {self}")

    def __str__(self) -> str:
        return f"window {self.first}:{self.last}"

    def masses(self, low: Floats, high: Floats, at: int) -> Floats:
        """1 / (last - first) for each step inside."""
        if self.last > at:
            raise TargetRefused("window", f"{self} ends after the newest snapshot, {at}")
        inside = np.minimum(high, self.last) - np.maximum(low, self.first)
        return np.asarray(np.maximum(inside, 0.0) / (self.last - self.first), dtype=np.float64)

    def others(self, times: Sequence[int]) -> Iterator[Window]:
        """Windows whose edges are snapshots, or 0."""
        edges = sorted({0, *times})
        windows = [Window(first, last) for first in edges for last in edges if first < last]
        return iter(sorted(windows, key=self._distance))

    def _distance(self, other: Window) -> int:
        return abs(other.first - self.first) + abs(other.last - self.last)


def _exponential(rate: float, low: Floats, high: Floats, at: int) -> Floats:
    return np.asarray(np.exp((high - at) * rate) * -np.expm1((low - high) * rate), dtype=np.float64)


def _around(value: float) -> Iterator[float]:
    """Values on both sides of this one, of three digits, the nearer first."""
    distance = _NEAREST
    while distance <= _FARTHEST:
        yield float(f"{value * math.exp(distance):.3g}")
        yield float(f"{value * math.exp(-distance):.3g}")
        distance *= _FARTHER
