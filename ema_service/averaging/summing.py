"""The loop of weighted sums: values, each times a weight, added to float64 sums.

Knows flat arrays. Does not know what is summed, or where the values come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ema_service.averaging.machine_code import AVERAGING
from ema_service.values import Array, address

__all__ = ["add_weighted"]


def add_weighted(sums: Array, values: Array, weights: Sequence[float]) -> None:
    """Add weight * values to each of the sums, in float64. A weight of 0 leaves its sum as it is, whatever the values.

    Args:
        sums: (sums, elements), float64.
        values: (elements,), float32 or float64.
        weights: one for each sum.
    """
    add = AVERAGING["add_f64" if values.dtype == np.float64 else "add_f32"]
    for total, weight in zip(sums, weights, strict=True):
        if weight:
            add(address(total), address(values), len(values), weight)
