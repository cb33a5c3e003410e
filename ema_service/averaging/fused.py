"""The kernel's inner loop on the CPU, compiled: one reading of the memory for averaging, finite check and digest.

Compiled by numba on first use, or at ``prepare()``. No fast-math: the compiler may neither contract nor reorder, so
sub, mul, sub are the three roundings they look like (tests/service/averaging/test_kernel.py compares bits). The loops
hold no interpreter lock.

Knows numpy arrays, flat and one-dimensional, of float32, and of bf16 as the uint16 that numpy has for it. Does not know
torch, devices, threads, or how the arrays share memory: elements are taken in order, each read before it is written.
"""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ema_service.averaging.compiling import compiled
from ema_service.averaging.digest import GULP_BYTES, Accumulators, BlockDigest, take_in

__all__ = ["NO_DIGEST", "Loop", "from_bf16", "from_f32", "in_place", "prepare"]

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]

#: Instead of accumulators, where the parameters are not to be digested.
NO_DIGEST: Accumulators = np.empty(0, np.uint64)


class Loop(Protocol):
    def __call__(self, start: int, stop: int, digest: Accumulators = NO_DIGEST) -> bool:
        """Average the elements from one index up to another and say whether every result is finite.

        The accumulators, if given, take in all whole gulps of the parameters, counted from ``start`` on.
        """


#: The bits of a float32 without its sign order as its magnitude does, with Inf and then NaN above all finite values. So
#: the largest of them says whether all are finite; a maximum of integers is vectorised, a sum of floats could not be.
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_BF16_SHIFT = np.uint32(16)

#: The shadow comes from memory while its parameters, just received, are in the core's cache: it is asked for this many
#: elements ahead, a block at a time. Of 1 GiB on one core: 110 ms without, 95 from 2 KiB ahead, 88 from 4, 91 from 16.
_AHEAD = 1024
#: Elements to a block: a gulp of the digest's.
_BLOCK = GULP_BYTES // 4
_NARROW_BLOCK = GULP_BYTES // 2
#: Elements to a cache line.
_LINE = 16


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


@compiled
def _fetch(shadow, begin):  # type: ignore[no-untyped-def]
    for i in range(begin, begin + _BLOCK, _LINE):
        _touch(shadow, i)  # type: ignore[call-arg]  # numba gives the first


# Whole blocks, then the rest: a loop over blocks of which the last is shorter is not vectorised (280 ms, not 88).
#
# Three loops that look alike: given one array twice, the compiler has to fear an overlap and gives up vectors (2.1
# instead of 7.7 GB/s on one core), and it takes no part of a loop as an argument.
@compiled
def _in_place(out, shadow, weight, digest):  # type: ignore[no-untyped-def]  # numba infers the types
    bits, largest, whole = out.view(np.int32), np.int32(0), out.size - out.size % _BLOCK
    for begin in range(0, whole, _BLOCK):
        _fetch(shadow, begin + _AHEAD)
        _fetch(out, begin + _AHEAD)  # what was received is not all in the cache (a push: 0.36 s, with it 0.35)
        if digest.size:
            take_in(digest, out, begin)  # type: ignore[call-arg]
        for i in range(begin, begin + _BLOCK):
            old = shadow[i]
            out[i] = old - weight * (old - out[i])
            largest = max(largest, np.int32(bits[i] & _MAGNITUDE))
    for i in range(whole, out.size):
        old = shadow[i]
        out[i] = old - weight * (old - out[i])
        largest = max(largest, np.int32(bits[i] & _MAGNITUDE))
    return largest < _INFINITY


@compiled
def _from_f32(out, shadow, param, weight, digest):  # type: ignore[no-untyped-def]
    bits, largest, whole = out.view(np.int32), np.int32(0), out.size - out.size % _BLOCK
    for begin in range(0, whole, _BLOCK):
        _fetch(shadow, begin + _AHEAD)
        if digest.size:
            take_in(digest, param, begin)  # type: ignore[call-arg]
        for i in range(begin, begin + _BLOCK):
            old = shadow[i]
            out[i] = old - weight * (old - param[i])
            largest = max(largest, np.int32(bits[i] & _MAGNITUDE))
    for i in range(whole, out.size):
        old = shadow[i]
        out[i] = old - weight * (old - param[i])
        largest = max(largest, np.int32(bits[i] & _MAGNITUDE))
    return largest < _INFINITY


@compiled
def _from_bf16(out, shadow, param, weight, digest):  # type: ignore[no-untyped-def]
    bits, largest, whole = out.view(np.int32), np.int32(0), out.size - out.size % _NARROW_BLOCK
    for begin in range(0, whole, _NARROW_BLOCK):
        _fetch(shadow, begin + _AHEAD)
        _fetch(shadow, begin + _AHEAD + _BLOCK)
        if digest.size:
            take_in(digest, param, begin)  # type: ignore[call-arg]
        for i in range(begin, begin + _NARROW_BLOCK):
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

    def loop(start: int, stop: int, digest: Accumulators = NO_DIGEST) -> bool:
        return cast(bool, _in_place(out[start:stop], shadow[start:stop], w, digest))

    return loop


def from_f32(out: F32, shadow: F32, param: F32, weight: float) -> Loop:
    """out <- shadow - weight * (shadow - param)."""
    w = np.float32(weight)

    def loop(start: int, stop: int, digest: Accumulators = NO_DIGEST) -> bool:
        return cast(bool, _from_f32(out[start:stop], shadow[start:stop], param[start:stop], w, digest))

    return loop


def from_bf16(out: F32, shadow: F32, param: U16, weight: float) -> Loop:
    """As from_f32, for the bits of bf16 parameters."""
    w = np.float32(weight)

    def loop(start: int, stop: int, digest: Accumulators = NO_DIGEST) -> bool:
        return cast(bool, _from_bf16(out[start:stop], shadow[start:stop], param[start:stop], w, digest))

    return loop


def prepare() -> None:
    """Compile now, so that no update waits for it."""
    nothing, narrow = np.zeros(1, np.float32), np.zeros(1, np.uint16)
    for loop in (
        in_place(nothing, nothing, 0.0),
        from_f32(nothing, nothing, nothing, 0.0),
        from_bf16(nothing, nothing, narrow, 0.0),
    ):
        loop(0, 1)
    BlockDigest(compiled=True).end(memoryview(bytes(GULP_BYTES)))
