"""The averaging loop, as it is compiled; fused.py calls it.

The instructions that average a gulp are written out (__init__.py says how to read them) for three reasons. Given one
array as parameters and as output, the compiler must assume that the two overlap, and falls back to one element at a
time. It has no way of storing past the cache. And the digest of the results can take them from registers.

Knows arrays of float32, and of bf16 as uint16. Does not know addresses, or which loop is called when.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from ema_service.averaging.loops.compiled import compiled
from ema_service.averaging.loops.squares import LANES, add_squares, add_stretch, enter, find_tensor, flush, widen
from ema_service.averaging.loops.xxh3 import mix_stripe, scramble, take_in
from ema_service.averaging.xxh3 import GULP_BYTES, STRIPE_BYTES, STRIPES

__all__ = ["average", "average_measured"]

#: The bits of a float32 without its sign, read as an integer, grow with its magnitude; Inf and NaN lie above all finite
#: values. So the largest says whether all are finite. A maximum of integers is vectorised; a sum of floats could not
#: be.
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)

#: So many elements ahead of those being averaged, cache lines are prefetched. Of the shadow: 1 GiB on one core takes
#: 110 ms without, 95 with 2 KiB ahead, 88 with 4 KiB, 91 with 16 KiB. Of the parameters, which are not all in the
#: cache: a push of 1 GiB takes 0.35 s instead of 0.36.
_AHEAD = 1024
#: Float32 elements of a cache line. A vector has as many, and is one stripe of the results' digest.
_LINE = 16
#: Elements whose squares are added up in float32: sums are right to 1e-6 then.
_WIDENED = 4096
#: numba's ``intrinsic``, untyped: by numba's annotations an intrinsic takes one argument more, and never returns.
_instructions: Any = intrinsic

# LLVM's vector types: of float32, of their bits as one integer each or as half as many of 64 bits, and of bf16.
_FLOATS = ir.VectorType(ir.FloatType(), _LINE)
_LANE = ir.IntType(64)
_INTS = ir.VectorType(ir.IntType(32), _LINE)
_LANES = ir.VectorType(ir.IntType(64), _LINE // 2)
_HALVES = ir.VectorType(ir.IntType(16), _LINE)


@_instructions
def _touch(_typing, values, index):  # type: ignore[no-untyped-def]
    """_touch(values, index): have the processor prefetch the cache line of one element.

    Emits llvm.prefetch, which never faults: the index may lie behind the array's end.
    """

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        address = builder.bitcast(_pointer(context, builder, signature, arguments, 0, 1), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        to_read, into_l2, data_cache = number(0), number(2), number(1)
        builder.call(fetch, [address, to_read, into_l2, data_cache])
        return context.get_dummy_value()

    return types.void(values, index), code


def _gulp(*, past_cache: bool, digested: bool, measured: bool = False) -> Any:
    """The intrinsic average(out, shadow, param, weight, index, accumulators, squares, lane): average one gulp.

    The gulp begins at ``index``. It returns the largest magnitude of the results, as bits; 0 where they are measured.
    Emits, for every 16 elements: two loads (bf16 parameters are widened), fsub, fmul, fsub, a store, and a maximum of
    integers; after the last, the maximum across the vector.

    past_cache: store past the cache; ``out`` at the index must begin a cache line. digested: mix the results into the
    accumulators of their digest, each vector as one stripe. measured: add squares to ``squares``, from ``lane`` on.
    """

    @_instructions
    def average(_typing, out, shadow, param, weight, index, accumulators, squares, lane):  # type: ignore[no-untyped-def]
        width = param.dtype.bitwidth // 8

        def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            results, olds, news = (_pointer(context, builder, signature, arguments, i, 4) for i in range(3))
            weights = _spread(builder, arguments[3])
            largest = ir.Constant(_INTS, [0] * _LINE)
            state = builder.bitcast(_pointer(context, builder, signature, arguments, 5), _LANES.as_pointer())
            lanes = builder.load(state, align=8) if digested else None
            place = _pointer(context, builder, signature, arguments, 6, 7)
            squared = [builder.bitcast(builder.gep(place, [_LANE(_LINE * i)]), _FLOATS.as_pointer()) for i in range(3)]
            sums = [builder.load(each, align=4) for each in squared] if measured else []
            # This Python loop runs while compiling, 16 times for float32 and 32 times for bf16; the machine code has no
            # loop.
            for first in range(0, GULP_BYTES // width, _LINE):
                old = _load(builder, olds, first, _FLOATS, 4)
                new = _load_widened(builder, news, first, width)
                result = builder.fsub(old, builder.fmul(weights, builder.fsub(old, new)))
                place = builder.bitcast(builder.gep(results, [ir.IntType(32)(first)]), _FLOATS.as_pointer())
                store = builder.store(result, place, align=4 * _LINE if past_cache else 4)
                if past_cache:
                    store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
                if digested:
                    index = first * 4 // STRIPE_BYTES % STRIPES
                    lanes = mix_stripe(builder, lanes, result, index)
                    lanes = scramble(builder, lanes) if index == STRIPES - 1 else lanes
                if measured:
                    sums = add_squares(builder, sums, result, new)
                    continue
                bits = builder.and_(builder.bitcast(result, _INTS), ir.Constant(_INTS, [int(_MAGNITUDE)] * _LINE))
                largest = builder.select(builder.icmp_signed(">", bits, largest), bits, largest)
            if digested:
                builder.store(lanes, state, align=8)
            for total, each in zip(sums, squared, strict=False):
                builder.store(total, each, align=4)
            if measured:
                return ir.IntType(32)(0)
            kind = ir.FunctionType(ir.IntType(32), [_INTS])
            # By name: declare_intrinsic() knows no vector types.
            name = f"llvm.vector.reduce.smax.v{_LINE}i32"
            reduce = get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
            return builder.call(reduce, [largest])

        return types.int32(out, shadow, param, weight, index, accumulators, squares, lane), code

    return average


@_instructions
def _widened(_typing, values, index):  # type: ignore[no-untyped-def]
    """_widened(values, index): one element as float32. Emits a load, and for bf16 a shift."""

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        value = builder.load(_pointer(context, builder, signature, arguments, 0, 1))
        if signature.args[0].dtype == types.float32:
            return value
        return _widen(builder, value, ir.FloatType(), ir.IntType(32))

    return types.float32(values, index), code


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any, array: int, index: int | None = None) -> Any:
    """The address of an array, given by its position among the arguments; or of one of its elements, likewise."""
    data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
    return data if index is None else builder.gep(data, [arguments[index]])


def _load(builder: Any, pointer: Any, first: int, kind: Any, align: int) -> Any:
    """Emits: load a vector of type ``kind`` that begins ``first`` elements behind a pointer."""
    vector = builder.bitcast(builder.gep(pointer, [ir.IntType(32)(first)]), kind.as_pointer())
    return builder.load(vector, align=align)


def _load_widened(builder: Any, pointer: Any, first: int, width: int) -> Any:
    """Emits: load a vector of parameters, ``width`` bytes each, as float32."""
    if width == 4:
        return _load(builder, pointer, first, _FLOATS, width)
    return _widen(builder, _load(builder, pointer, first, _HALVES, width), _FLOATS, _INTS)


def _widen(builder: Any, bits: Any, floats: Any, ints: Any) -> Any:
    """Emits: bf16 to float32. The bits of a bf16 are the upper half of the same float32's."""
    shift = ir.Constant(ints, [16] * _LINE if ints is _INTS else 16)
    return builder.bitcast(builder.shl(builder.zext(bits, ints), shift), floats)


def _spread(builder: Any, value: Any) -> Any:
    """Emits: a vector whose elements all are ``value``."""
    nothing = ir.Constant(_FLOATS, ir.Undefined)
    one = builder.insert_element(nothing, value, ir.IntType(32)(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(_INTS, [0] * _LINE))


# One intrinsic for each combination: what is emitted is decided while compiling.
_through_cache = _gulp(past_cache=False, digested=False)
_through_cache_digested = _gulp(past_cache=False, digested=True)
_past_cache = _gulp(past_cache=True, digested=False)
_past_cache_digested = _gulp(past_cache=True, digested=True)
_through_cache_measured = _gulp(past_cache=False, digested=False, measured=True)
_through_cache_digested_measured = _gulp(past_cache=False, digested=True, measured=True)
_past_cache_measured = _gulp(past_cache=True, digested=False, measured=True)
_past_cache_digested_measured = _gulp(past_cache=True, digested=True, measured=True)


# --- the loop -------------------------------------------------------------------------------------------------------


@compiled
def _fetch(values, begin, stop):  # type: ignore[no-untyped-def]  # numba infers the types
    # Prefetch the cache lines of the elements from ``begin`` to ``stop``.
    for i in range(begin, stop, _LINE):
        _touch(values, i)


@compiled
def average(out, shadow, param, weight, params, results, past_cache):  # type: ignore[no-untyped-def]
    # params, results: accumulators, empty where no digest is wanted.
    largest, gulp = np.int32(0), GULP_BYTES // param.itemsize
    whole = out.size - out.size % gulp
    for begin in range(0, whole, gulp):
        _fetch(shadow, begin + _AHEAD, begin + _AHEAD + gulp)
        _fetch(param, begin + _AHEAD, begin + _AHEAD + gulp)
        if params.size:
            take_in(params, param, begin)
        if past_cache and results.size:
            found = _past_cache_digested(out, shadow, param, weight, begin, results, shadow, 0)
        elif past_cache:
            found = _past_cache(out, shadow, param, weight, begin, results, shadow, 0)
        elif results.size:
            found = _through_cache_digested(out, shadow, param, weight, begin, results, shadow, 0)
        else:
            found = _through_cache(out, shadow, param, weight, begin, results, shadow, 0)
        largest = max(largest, found)
    for i in range(whole, out.size):
        old = shadow[i]
        new = _widened(param, i)
        value = old - weight * (old - new)
        out[i] = value
        largest = max(largest, np.float32(value).view(np.int32) & _MAGNITUDE)
    return largest < _INFINITY


@compiled
def average_measured(  # type: ignore[no-untyped-def]  # noqa: C901 - a part of the loop would cost a call each time
    out, shadow, param, weight, params, results, past_cache, first, ends, sums, memory
):
    # As average(), and adds squares to the sums of each tensor. first: the position of the arrays among the elements
    # that ``ends`` counts. Of a gulp with several tensors, squares go to spare lanes and nowhere: the gulp's parameters
    # are copied before the results take their place, and both are added by tensor. Returns whether the squares of
    # results are finite: so are the results then, and the look at each is saved, which takes as long as measuring.
    # memory: of the loop's own, twice the lanes of float32, those of float64, parameters.
    gulp = GULP_BYTES // param.itemsize
    whole = out.size - out.size % gulp
    memory[:] = 0.0
    lanes, wide, copied = (
        memory[:LANES].view(np.float32),
        memory[LANES : 2 * LANES],
        memory[2 * LANES :].view(np.float32),
    )
    begun = tensor = find_tensor(ends, first)
    for begin in range(0, whole, gulp):
        _fetch(shadow, begin + _AHEAD, begin + _AHEAD + gulp)
        _fetch(param, begin + _AHEAD, begin + _AHEAD + gulp)
        if params.size:
            take_in(params, param, begin)
        if first + begin >= ends[tensor]:
            tensor = enter(lanes, wide, sums, first + begin, ends, tensor)
        several = first + begin + gulp > ends[tensor]
        lane = LANES if several else 0
        if several:
            for i in range(gulp):
                copied[i] = _widened(param, begin + i)
        if past_cache and results.size:
            _past_cache_digested_measured(out, shadow, param, weight, begin, results, lanes, lane)
        elif past_cache:
            _past_cache_measured(out, shadow, param, weight, begin, results, lanes, lane)
        elif results.size:
            _through_cache_digested_measured(out, shadow, param, weight, begin, results, lanes, lane)
        else:
            _through_cache_measured(out, shadow, param, weight, begin, results, lanes, lane)
        if several:
            tensor = add_stretch(out, begin, copied, gulp, first, ends, tensor, lanes, wide, sums)
        elif begin % _WIDENED == 0:
            widen(lanes, wide)
    for i in range(whole, out.size):
        old = shadow[i]
        new = _widened(param, i)
        copied[i - whole] = new
        out[i] = old - weight * (old - new)
    tensor = add_stretch(out, whole, copied, out.size - whole, first, ends, tensor, lanes, wide, sums)
    flush(lanes, wide, sums, tensor)
    squared = 0.0
    for each in range(begun, tensor + 1):
        squared += sums[each, 2]
    return np.isfinite(squared)
