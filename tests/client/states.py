"""A small state, ways to a service that lose answers, and comparisons: what the tests of EmaClient share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ema_client import RetryPolicy

QUICK = RetryPolicy(attempts=4, base=0.01, cap=0.05)
ONCE = RetryPolicy(attempts=1)
STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.0, 2.0]), "scale": torch.tensor(3.0)}


def plus(amount: float) -> dict[str, Tensor]:
    return {name: tensor + amount for name, tensor in STATE.items()}


def assert_equal(weights: Any, expected: dict[str, Tensor]) -> None:
    assert set(weights) == set(expected)
    assert {name: torch.equal(weights[name], tensor) for name, tensor in expected.items()} == dict.fromkeys(
        expected, True
    )


def first_only(*methods: str) -> Callable[[Any], bool]:
    """Lose the answer to the first request of each of these methods."""
    left = list(methods)

    def loses(request: Any) -> bool:
        if request.method in left:
            left.remove(request.method)
            return True
        return False

    return loses
