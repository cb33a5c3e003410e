"""The kernel's inner loop on the CPU, compiled: one reading of the memory for averaging, finite check and digest.

Compiled by numba on first use, or at ``prepare()``. The instructions for a gulp are written out: given one array twice,
the compiler fears an overlap and gives up vectors, and it knows no way past the cache. No fast-math: it may neither
contract nor reorder, so sub, mul, sub are the three roundings they look like (tests/service/averaging/test_kernel.py
compares bits). The loop holds no interpreter lock.

Knows numpy arrays, flat and one-dimensional, of float32, and of bf16 as the uint16 that numpy has for it. Does not know
torch, devices, threads, or how the arrays share memory: elements are taken in order, each read before it is written.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from ema_service.averaging.compiling import compiled
from ema_service.averaging.digest import (
    GULP_BYTES,
    STRIPE_BYTES,
    Accumulators,
    BlockDigest,
    mix_stripe,
    scramble,
    take_in,
)

__all__ = ["NO_DIGEST", "Loop", "loop_of", "prepare"]

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]

#: Instead of accumulators, where there is nothing to be digested.
NO_DIGEST: Accumulators = np.empty(0, np.uint64)


class Loop(Protocol):
    def __call__(
        self, start: int, stop: int, params: Accumulators = NO_DIGEST, results: Accumulators = NO_DIGEST
    ) -> bool:
        """Average the elements from one index up to another and say whether every result is finite.

        The accumulators, if given, take in all whole gulps of the parameters, counted from ``start`` on, and the
        results of these.
        """


#: The bits of a float32 without its sign order as its magnitude does, with Inf and then NaN above all finite values. So
#: the largest of them says whether all are finite; a maximum of integers is vectorised, a sum of floats could not be.
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)

#: What comes from memory is asked for this many elements ahead: the shadow (1 GiB on one core: 110 ms without, 95 from
#: 2 KiB ahead, 88 from 4, 91 from 16), and what was received, which is not all in the cache (a push 0.36 s, now 0.35).
_AHEAD = 1024
#: Elements to a cache line, and to a vector, which is a stripe of the results' digest.
_LINE = 16
_STRIPES = GULP_BYTES // STRIPE_BYTES
#: A call for so many elements fills a core's cache: its results are written past it. Otherwise each line is read before
#: it is overwritten. 1 GiB in blocks of 8 MiB on two cores: 126 ms, past the cache 96.
_PAST_CACHE = (1 << 20) // 4

#: For mypy: by its own types, what it makes takes one argument more and never returns.
_instructions: Any = intrinsic

_FLOATS = ir.VectorType(ir.FloatType(), _LINE)
_INTS = ir.VectorType(ir.IntType(32), _LINE)
_LANES = ir.VectorType(ir.IntType(64), _LINE // 2)
_HALVES = ir.VectorType(ir.IntType(16), _LINE)


@_instructions
def _touch(_typing, values, index):  # type: ignore[no-untyped-def]
    """Have the processor fetch the cache line of an element, be it behind the array's end: it never faults."""

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        address = builder.bitcast(_pointer(context, builder, signature, arguments, 0, 1), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        to_read, into_l2, data_cache = number(0), number(2), number(1)
        builder.call(fetch, [address, to_read, into_l2, data_cache])
        return context.get_dummy_value()

    return types.void(values, index), code


def _gulp(*, past_cache: bool, digested: bool) -> Any:
    """out <- shadow - weight * (shadow - param) for a gulp of parameters from an index on.

    Returns the largest magnitude of the results, as bits. past_cache: their place begins with a cache line. digested:
    the accumulators take in the results.
    """

    @_instructions
    def average(_typing, out, shadow, param, weight, index, accumulators):  # type: ignore[no-untyped-def]
        width = param.dtype.bitwidth // 8

        def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            results, olds, news = (_pointer(context, builder, signature, arguments, i, 4) for i in range(3))
            weights = _spread(builder, arguments[3])
            largest = ir.Constant(_INTS, [0] * _LINE)
            state = builder.bitcast(_pointer(context, builder, signature, arguments, 5), _LANES.as_pointer())
            lanes = builder.load(state, align=8) if digested else None
            for first in range(0, GULP_BYTES // width, _LINE):
                old = _load(builder, olds, first, _FLOATS, 4)
                new = _load_widened(builder, news, first, width)
                result = builder.fsub(old, builder.fmul(weights, builder.fsub(old, new)))
                place = builder.bitcast(builder.gep(results, [ir.IntType(32)(first)]), _FLOATS.as_pointer())
                store = builder.store(result, place, align=4 * _LINE if past_cache else 4)
                if past_cache:
                    store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
                if digested:
                    index = first * 4 // STRIPE_BYTES % _STRIPES
                    lanes = mix_stripe(builder, lanes, result, index)
                    lanes = scramble(builder, lanes) if index == _STRIPES - 1 else lanes
                bits = builder.and_(builder.bitcast(result, _INTS), ir.Constant(_INTS, [int(_MAGNITUDE)] * _LINE))
                largest = builder.select(builder.icmp_signed(">", bits, largest), bits, largest)
            if digested:
                builder.store(lanes, state, align=8)
            kind = ir.FunctionType(ir.IntType(32), [_INTS])
            # Not declare_intrinsic(), which knows no vectors.
            name = f"llvm.vector.reduce.smax.v{_LINE}i32"
            reduce = get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
            return builder.call(reduce, [largest])

        return types.int32(out, shadow, param, weight, index, accumulators), code

    return average


@_instructions
def _widened(_typing, values, index):  # type: ignore[no-untyped-def]
    """An element as float32."""

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        value = builder.load(_pointer(context, builder, signature, arguments, 0, 1))
        if signature.args[0].dtype == types.float32:
            return value
        return _widen(builder, value, ir.FloatType(), ir.IntType(32))

    return types.float32(values, index), code


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any, array: int, index: int | None = None) -> Any:
    data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
    return data if index is None else builder.gep(data, [arguments[index]])


def _load(builder: Any, pointer: Any, first: int, kind: Any, align: int) -> Any:
    vector = builder.bitcast(builder.gep(pointer, [ir.IntType(32)(first)]), kind.as_pointer())
    return builder.load(vector, align=align)


def _load_widened(builder: Any, pointer: Any, first: int, width: int) -> Any:
    if width == 4:
        return _load(builder, pointer, first, _FLOATS, width)
    return _widen(builder, _load(builder, pointer, first, _HALVES, width), _FLOATS, _INTS)


def _widen(builder: Any, bits: Any, floats: Any, ints: Any) -> Any:
    """bf16 are the upper halves of float32."""
    shift = ir.Constant(ints, [16] * _LINE if ints is _INTS else 16)
    return builder.bitcast(builder.shl(builder.zext(bits, ints), shift), floats)


def _spread(builder: Any, value: Any) -> Any:
    nothing = ir.Constant(_FLOATS, ir.Undefined)
    one = builder.insert_element(nothing, value, ir.IntType(32)(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(_INTS, [0] * _LINE))


_through_cache = _gulp(past_cache=False, digested=False)
_through_cache_digested = _gulp(past_cache=False, digested=True)
_past_cache = _gulp(past_cache=True, digested=False)
_past_cache_digested = _gulp(past_cache=True, digested=True)


@compiled
def _fetch(values, begin, stop):  # type: ignore[no-untyped-def]  # numba infers the types
    for i in range(begin, stop, _LINE):
        _touch(values, i)


@compiled
def _average(out, shadow, param, weight, params, results, past_cache):  # type: ignore[no-untyped-def]
    largest, gulp = np.int32(0), GULP_BYTES // param.itemsize
    whole = out.size - out.size % gulp
    for begin in range(0, whole, gulp):
        _fetch(shadow, begin + _AHEAD, begin + _AHEAD + gulp)
        _fetch(param, begin + _AHEAD, begin + _AHEAD + gulp)
        if params.size:
            take_in(params, param, begin)  # type: ignore[call-arg]
        if past_cache and results.size:
            found = _past_cache_digested(out, shadow, param, weight, begin, results)
        elif past_cache:
            found = _past_cache(out, shadow, param, weight, begin, results)
        elif results.size:
            found = _through_cache_digested(out, shadow, param, weight, begin, results)
        else:
            found = _through_cache(out, shadow, param, weight, begin, results)
        largest = max(largest, found)
    for i in range(whole, out.size):
        old = shadow[i]
        new = _widened(param, i)
        value = old - weight * (old - new)
        out[i] = value
        largest = max(largest, np.float32(value).view(np.int32) & _MAGNITUDE)
    return largest < _INFINITY


def loop_of(out: F32, shadow: F32, param: F32 | U16, weight: float) -> Loop:
    """out <- shadow - weight * (shadow - param). ``param``: float32, perhaps ``out`` itself, or the bits of bf16."""
    w, address = np.float32(weight), out.ctypes.data

    def loop(start: int, stop: int, params: Accumulators = NO_DIGEST, results: Accumulators = NO_DIGEST) -> bool:
        arrays = out[start:stop], shadow[start:stop], param[start:stop]
        aligned = stop - start >= _PAST_CACHE and (address // 4 + start) % _LINE == 0
        # What is overwritten as it is read is in the cache in any case.
        past_cache = aligned and not np.may_share_memory(arrays[0], arrays[2])
        return cast(bool, _average(*arrays, w, params, results, past_cache))

    return loop


def prepare() -> None:
    """Compile now, so that no update waits for it."""
    nothing, narrow = np.zeros(1, np.float32), np.zeros(1, np.uint16)
    for param in (nothing, narrow):
        loop_of(nothing, nothing, param, 0.0)(0, 1)
    BlockDigest(compiled=True).end(memoryview(bytes(GULP_BYTES)))
