"""How loops are compiled. Knows numba. Does not know the loops."""

from __future__ import annotations

from typing import Any

from numba import njit

__all__ = ["compiled"]


def compiled(function: Any) -> Any:
    """The function as other loops may call it. No fast-math, and a division by zero gives what IEEE 754 says."""
    # Without numba's counts of references: the memory is the caller's.
    options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}
    return njit(error_model="numpy", **options)(function)
