"""The kernel's inner loop on the CPU, compiled: one reading of the memory for averaging and the finite check together.

Compiled by numba on first use, or at ``prepare()``; the machine code is kept beside this file, or in the user's cache.
No fast-math: the compiler may neither contract nor reorder, so sub, mul, sub are the three roundings they look like
(tests/service/averaging/test_kernel.py compares bits). The loops hold no interpreter lock.

Knows numpy arrays, flat and one-dimensional, of float32, and of bf16 as the uint16 that numpy has for it. Does not know
torch, devices, threads, or how the arrays share memory: elements are taken in order, each read before it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["Loop", "from_bf16", "from_f32", "in_place", "prepare"]

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]

#: Averages the elements from one index up to another and says whether every result is finite.
Loop = Callable[[int, int], bool]

#: The bits of a float32 without its sign order as its magnitude does, with Inf and then NaN above all finite values. So
#: the largest of them says whether all are finite; a maximum of integers is vectorised, a sum of floats could not be.
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_BF16_SHIFT = np.uint32(16)

#: The shadow comes from memory while its parameters, just received, are in the core's cache: it is asked for this many
#: elements ahead, a block at a time. Of 1 GiB on one core: 110 ms without, 95 from 2 KiB ahead, 88 from 4, 91 from 16.
_AHEAD = 1024
_BLOCK = 256
#: Elements to a cache line.
_LINE = 16


def _compiled(function: Any) -> Any:
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # no folder that can be written to: it is compiled anew in each process, in a second
        return njit(nogil=True, error_model="numpy")(function)


@intrinsic
def _touch(_typing, values, index):  # type: ignore[no-untyped-def]
    """Have the processor fetch the cache line of an element, be it behind the array's end: it never faults."""

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        to_read, into_l2, data_cache = number(0), number(2), number(1)
        builder.call(fetch, [address, to_read, into_l2, data_cache])
        return context.get_dummy_value()

    return types.void(values, index), code


@_compiled
def _fetch(shadow, begin):  # type: ignore[no-untyped-def]
    for i in range(begin, begin + _BLOCK, _LINE):
        _touch(shadow, i)  # type: ignore[call-arg]  # numba gives the first


# Whole blocks, then the rest: a loop over blocks of which the last is shorter is not vectorised (280 ms, not 88).
#
# Three loops that look alike: given one array twice, the compiler has to fear an overlap and gives up vectors (2.1
# instead of 7.7 GB/s on one core), and it takes no part of a loop as an argument.
@_compiled
def _in_place(out, shadow, weight):  # type: ignore[no-untyped-def]  # numba infers the types
    bits, largest, whole = out.view(np.int32), np.int32(0), out.size - out.size % _BLOCK
    for begin in range(0, whole, _BLOCK):
        _fetch(shadow, begin + _AHEAD)
        for i in range(begin, begin + _BLOCK):
            old = shadow[i]
            out[i] = old - weight * (old - out[i])
            largest = max(largest, np.int32(bits[i] & _MAGNITUDE))
    for i in range(whole, out.size):
        old = shadow[i]
        out[i] = old - weight * (old - out[i])
        largest = max(largest, np.int32(bits[i] & _MAGNITUDE))
    return largest < _INFINITY


@_compiled
def _from_f32(out, shadow, param, weight):  # type: ignore[no-untyped-def]
    bits, largest, whole = out.view(np.int32), np.int32(0), out.size - out.size % _BLOCK
    for begin in range(0, whole, _BLOCK):
        _fetch(shadow, begin + _AHEAD)
        for i in range(begin, begin + _BLOCK):
            old = shadow[i]
            out[i] = old - weight * (old - param[i])
            largest = max(largest, np.int32(bits[i] & _MAGNITUDE))
    for i in range(whole, out.size):
        old = shadow[i]
        out[i] = old - weight * (old - param[i])
        largest = max(largest, np.int32(bits[i] & _MAGNITUDE))
    return largest < _INFINITY


@_compiled
def _from_bf16(out, shadow, param, weight):  # type: ignore[no-untyped-def]
    bits, largest, whole = out.view(np.int32), np.int32(0), out.size - out.size % _BLOCK
    for begin in range(0, whole, _BLOCK):
        _fetch(shadow, begin + _AHEAD)
        for i in range(begin, begin + _BLOCK):
            old = shadow[i]
            new = np.uint32(np.uint32(param[i]) << _BF16_SHIFT).view(np.float32)
            out[i] = old - weight * (old - new)
            largest = max(largest, np.int32(bits[i] & _MAGNITUDE))
    for i in range(whole, out.size):
        old = shadow[i]
        new = np.uint32(np.uint32(param[i]) << _BF16_SHIFT).view(np.float32)
        out[i] = old - weight * (old - new)
        largest = max(largest, np.int32(bits[i] & _MAGNITUDE))
    return largest < _INFINITY


def in_place(out: F32, shadow: F32, weight: float) -> Loop:
    """out <- shadow - weight * (shadow - out)."""
    w = np.float32(weight)
    return lambda start, stop: cast(bool, _in_place(out[start:stop], shadow[start:stop], w))


def from_f32(out: F32, shadow: F32, param: F32, weight: float) -> Loop:
    """out <- shadow - weight * (shadow - param)."""
    w = np.float32(weight)
    return lambda start, stop: cast(bool, _from_f32(out[start:stop], shadow[start:stop], param[start:stop], w))


def from_bf16(out: F32, shadow: F32, param: U16, weight: float) -> Loop:
    """As from_f32, for the bits of bf16 parameters."""
    w = np.float32(weight)
    return lambda start, stop: cast(bool, _from_bf16(out[start:stop], shadow[start:stop], param[start:stop], w))


def prepare() -> None:
    """Compile now, so that no update waits for it."""
    nothing, narrow = np.zeros(1, np.float32), np.zeros(1, np.uint16)
    for loop in (
        in_place(nothing, nothing, 0.0),
        from_f32(nothing, nothing, nothing, 0.0),
        from_bf16(nothing, nothing, narrow, 0.0),
    ):
        loop(0, 1)
