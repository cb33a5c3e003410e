"""The kernel's inner loop on the CPU, compiled: one reading of the memory for averaging and the finite check together.

Compiled by numba on first use, or at ``prepare()``; the machine code is kept beside this file, or in the user's cache.
No fast-math: the compiler may neither contract nor reorder, so sub, mul, sub are the three roundings they look like
(tests/service/averaging/test_kernel.py compares bits). The loops hold no interpreter lock.

Knows numpy arrays, flat and one-dimensional, of float32, and of bf16 as the uint16 that numpy has for it. Does not know
torch, devices, threads, or how the arrays share memory: elements are taken in order, each read before it is written.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["average_bf16", "average_f32", "average_f32_in_place", "prepare"]

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]

#: The bits of a float32 without its sign order as its magnitude does, with Inf and then NaN above all finite values. So
#: the largest of them says whether all are finite; a maximum of integers is vectorised, a sum of floats could not be.
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_BF16_SHIFT = np.uint32(16)


def _compiled(function: Any) -> Any:
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # no folder that can be written to: it is compiled anew in each process, in a second
        return njit(nogil=True, error_model="numpy")(function)


# A loop of its own: given one array twice, the compiler has to fear an overlap and gives up vectors (2.1 instead of 7.7
# GB/s on one core).
@_compiled
def _in_place(out, shadow, weight):  # type: ignore[no-untyped-def]  # numba infers the types
    bits, largest = out.view(np.int32), np.int32(0)
    for i in range(out.size):
        old = shadow[i]
        out[i] = old - weight * (old - out[i])
        largest = max(largest, np.int32(bits[i] & _MAGNITUDE))
    return largest < _INFINITY


@_compiled
def _from_f32(out, shadow, param, weight):  # type: ignore[no-untyped-def]
    bits, largest = out.view(np.int32), np.int32(0)
    for i in range(out.size):
        old = shadow[i]
        out[i] = old - weight * (old - param[i])
        largest = max(largest, np.int32(bits[i] & _MAGNITUDE))
    return largest < _INFINITY


@_compiled
def _from_bf16(out, shadow, param, weight):  # type: ignore[no-untyped-def]
    bits, largest = out.view(np.int32), np.int32(0)
    for i in range(out.size):
        old = shadow[i]
        new = np.uint32(np.uint32(param[i]) << _BF16_SHIFT).view(np.float32)
        out[i] = old - weight * (old - new)
        largest = max(largest, np.int32(bits[i] & _MAGNITUDE))
    return largest < _INFINITY


def average_f32_in_place(out: F32, shadow: F32, weight: float) -> bool:
    """out <- shadow - weight * (shadow - out). Says whether every result is finite."""
    return cast(bool, _in_place(out, shadow, np.float32(weight)))


def average_f32(out: F32, shadow: F32, param: F32, weight: float) -> bool:
    """out <- shadow - weight * (shadow - param). Says whether every result is finite."""
    return cast(bool, _from_f32(out, shadow, param, np.float32(weight)))


def average_bf16(out: F32, shadow: F32, param: U16, weight: float) -> bool:
    """As average_f32, for the bits of bf16 parameters."""
    return cast(bool, _from_bf16(out, shadow, param, np.float32(weight)))


def prepare() -> None:
    """Compile now, so that no update waits for it."""
    nothing, narrow = np.zeros(1, np.float32), np.zeros(1, np.uint16)
    average_f32_in_place(nothing, nothing, 0.0)
    average_f32(nothing, nothing, nothing, 0.0)
    average_bf16(nothing, nothing, narrow, 0.0)
