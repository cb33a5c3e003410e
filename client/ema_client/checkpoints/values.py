"""Numbers and texts that a file holds beside its tensors, checked when they are taken: a file may say anything.

Knows: how a file of torch.save or JSON may hold a number. Does not know: which entries a program has, files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ema_client.errors import UsageError

__all__ = ["real", "strings", "whole"]

#: Counters are of 64 bits in every program, and in a run.
_LARGEST = 2**63


def real(state: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The number at ``key``, ``default`` where there is none. Raises UsageError for anything else, NaN and infinity."""
    return float(_number(state, key, default))


def whole(state: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 0) -> int:
    """The whole number at ``key``, ``default`` where there is none. Raises UsageError for anything else."""
    number = _number(state, key, default)
    if number != int(number) or number < least:
        raise UsageError(f"the file has {number} as `{key}`, which is a whole number from {least} on")
    return int(number)


def strings(values: Any) -> list[str]:
    """A list of names. Raises UsageError for anything else."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UsageError("the file's list of names (`ema_names`) holds more than names")
    return values


def _number(state: Mapping[str, Any], key: str, default: float | None) -> int | float:
    value = state.get(key, default)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if not isinstance(value, int | float):
        kind = type(value).__name__
        raise UsageError(
            f"the file's `{key}` is of type {kind}, where a number is expected", hint="give the right file"
        )
    # Compared first: a whole number of thousands of digits is no float.
    if abs(value) >= _LARGEST or math.isnan(value):
        raise UsageError(f"the file's `{key}` is no number below 2^63", hint="give the right file")
    return value
