"""The loop of weighted sums: values of any dtype, each times a weight, added to float64 sums.

Knows flat tensors of the host. Does not know what is summed, or where the values come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ema_service.averaging.compiling import compiled

__all__ = ["add_weighted"]


def add_weighted(sums: Tensor, values: Tensor, weights: Sequence[float]) -> None:
    """Add weight * values to each of the sums, in float64. A weight of 0 leaves its sum as it is, whatever the values.

    Args:
        sums: (sums, elements), float64.
        values: (elements,), of any dtype of floats.
        weights: one for each sum.
    """
    # numba has no bf16; every value of a half is a float32.
    exact = values if values.dtype in (torch.float32, torch.float64) else values.to(torch.float32)
    array, each = exact.numpy(), sums.numpy()
    for number, weight in enumerate(weights):
        if weight:
            _add(each[number], array, weight)


@compiled
def _add(total: Any, values: Any, weight: Any) -> None:
    for i in range(total.size):
        total[i] += weight * values[i]
