"""The loop of weighted sums: values, each times a weight, added to float64 sums.

Knows flat arrays. Does not know what is summed, or where the values come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ema_service.averaging.compiling import compiled
from ema_service.values import Array

__all__ = ["add_weighted"]


def add_weighted(sums: Array, values: Array, weights: Sequence[float]) -> None:
    """Add weight * values to each of the sums, in float64. A weight of 0 leaves its sum as it is, whatever the values.

    Args:
        sums: (sums, elements), float64.
        values: (elements,), float32 or float64.
        weights: one for each sum.
    """
    for number, weight in enumerate(weights):
        if weight:
            _add(sums[number], values, weight)


@compiled
def _add(total: Any, values: Any, weight: Any) -> None:
    for i in range(total.size):
        total[i] += weight * values[i]
