"""How a loop is compiled here: without the interpreter lock, its machine code kept for the next process.

Knows numba. Does not know the loops.
"""

from __future__ import annotations

from typing import Any

from numba import njit

__all__ = ["compiled"]


def compiled(function: Any) -> Any:
    """A function of numbers and numpy arrays, compiled for their types on its first call.

    The machine code is kept beside the file of the function, or in the user's cache; where neither can be written to
    it is compiled anew in each process, in seconds.
    """
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:
        return njit(nogil=True, error_model="numpy")(function)
