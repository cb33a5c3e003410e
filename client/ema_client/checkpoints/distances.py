"""How far two sets of named tensors are from one another, tensor by tensor and as a whole.

Knows: norms. Does not know: files, the service, what the tensors are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Difference", "TensorDifference", "difference"]

#: Elements of a tensor that are compared at once: in float64, they and their difference take 24 MiB.
_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """distance: |a - b| / |b| in the L2 norm, computed in float64; NaN where either has a NaN, infinity where only b is
    all zeros. largest: the largest |a - b| of one element."""

    name: str
    shape: tuple[int, ...]
    distance: float
    largest: float


@dataclass(frozen=True, slots=True)
class Difference:
    """distance: |a - b| / |b| over all tensors that both have. tensors: the same of each, the farthest first.

    only_a, only_b: names that one side alone has. misshapen: names with other shapes on both sides, which are not
    compared.
    """

    distance: float
    tensors: tuple[TensorDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    misshapen: tuple[str, ...]


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Difference:
    """The difference of two sets of tensors, of whatever dtypes."""
    both = [name for name in a if name in b]
    alike = [name for name in both if a[name].shape == b[name].shape]
    sums = {name: _sums(a[name], b[name]) for name in alike}
    tensors = [
        TensorDifference(name, tuple(a[name].shape), _ratio(apart, own), largest)
        for name, (apart, own, largest) in sums.items()
    ]
    return Difference(
        distance=_ratio(sum(each[0] for each in sums.values()), sum(each[1] for each in sums.values())),
        tensors=tuple(sorted(tensors, key=lambda each: math.inf if math.isnan(each.distance) else each.distance)[::-1]),
        only_a=tuple(name for name in a if name not in b),
        only_b=tuple(name for name in b if name not in a),
        misshapen=tuple(name for name in both if name not in sums),
    )


def _sums(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """|a - b|^2, |b|^2, and the largest |a - b|."""
    apart = own = largest = 0.0
    flat, other = a.reshape(-1), b.reshape(-1)
    for start in range(0, len(flat), _ELEMENTS):
        theirs = other[start : start + _ELEMENTS].to(torch.float64)
        gap = flat[start : start + _ELEMENTS].to(torch.float64) - theirs
        apart += float(gap.dot(gap))
        own += float(theirs.dot(theirs))
        # Python's max() forgets a NaN.
        largest = math.nan if math.isnan(apart) else max(largest, float(gap.abs().max()))
    return apart, own, largest


def _ratio(apart: float, own: float) -> float:
    if own == 0.0:
        return 0.0 if apart == 0.0 else apart * math.inf
    return math.sqrt(apart / own) if apart == apart and apart >= 0.0 else math.nan
