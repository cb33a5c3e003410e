"""How far an average is from its parameters: sums of squares by tensor, taken while both are in registers.

Of each element three squares are summed: of (result - parameter), of the parameter, and of the result. A vector of 16
elements is added to 48 lanes of float32; every few gulps these are added to 48 lanes of float64, and those, where a
tensor ends, to the tensor's sums. So a sum is right to 1e-6 of its value, at three operations a vector. The averaging
loop (average.py) hands over whole gulps; where a gulp has elements of several tensors, they are added here, from a copy
of the parameters, which the results may have overwritten.

Knows flat float32 arrays and where tensors end. Does not know how the results come about, names, or what is told.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from ema_service.averaging.loops.compiled import compiled

__all__ = ["LANES", "add_squares", "add_stretch", "enter", "find_tensor", "flush", "widen"]

#: Elements of a vector, and lanes of all three sums.
_LINE = 16
LANES = 3 * _LINE

_FLOATS = ir.VectorType(ir.FloatType(), _LINE)
#: numba's ``intrinsic``, untyped, as in average.py.
_instructions: Any = intrinsic


def add_squares(builder: Any, sums: list[Any], result: Any, param: Any) -> list[Any]:
    """Emits: the three sums with the squares of one vector of results and of its parameters."""
    values = builder.fsub(result, param), param, result
    return [_multiply_add(builder, value, total) for value, total in zip(values, sums, strict=True)]


def _multiply_add(builder: Any, value: Any, total: Any) -> Any:
    # fmuladd: one instruction where the processor has one, else two. Nothing depends on the last bit of these sums.
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    function = get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{_LINE}f32")  # type: ignore[no-untyped-call]
    return builder.call(function, [value, value, total])


@_instructions
def _add_vector(_typing, results, at, params, index, lanes):  # type: ignore[no-untyped-def]
    """_add_vector(results, at, params, index, lanes): add the squares of 16 elements, from two indices on.

    Emits five loads, the sums, and three stores.
    """

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        def vector(array: int, index: Any) -> Any:
            data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
            return builder.bitcast(builder.gep(data, [index]), _FLOATS.as_pointer())

        places = [vector(4, ir.IntType(64)(_LINE * each)) for each in range(3)]
        sums = [builder.load(place, align=4) for place in places]
        values = [builder.load(vector(array, arguments[array + 1]), align=4) for array in (0, 2)]
        for place, total in zip(places, add_squares(builder, sums, *values), strict=True):
            builder.store(total, place, align=4)
        return context.get_dummy_value()

    return types.void(results, at, params, index, lanes), code


@compiled
def widen(lanes, wide):  # type: ignore[no-untyped-def]
    # Before float32 loses what is added: to the lanes of float64.
    for i in range(LANES):
        wide[i] += lanes[i]
        lanes[i] = 0.0


@compiled
def flush(lanes, wide, sums, tensor):  # type: ignore[no-untyped-def]
    # All lanes to the sums of one tensor.
    widen(lanes, wide)
    for each in range(3):
        for i in range(_LINE):
            sums[tensor, each] += wide[_LINE * each + i]
            wide[_LINE * each + i] = 0.0


@compiled
def find_tensor(ends, position):  # type: ignore[no-untyped-def]
    # The tensor of an element. ends: behind the last element of each tensor, ascending. The last tensor, of none.
    low, high = 0, ends.size - 1
    while low < high:
        middle = (low + high) // 2
        if ends[middle] <= position:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def enter(lanes, wide, sums, position, ends, tensor):  # type: ignore[no-untyped-def]
    # The tensor of an element, at or behind ``tensor``, whose lanes are flushed where it is another.
    if position >= ends[tensor]:
        flush(lanes, wide, sums, tensor)
        while position >= ends[tensor]:
            tensor += 1
    return tensor


@compiled
def add_stretch(results, at, params, count, first, ends, tensor, lanes, wide, sums):  # type: ignore[no-untyped-def]
    # Add ``count`` results, from ``at`` on, and a copy of their parameters, from 0 on. first: the position of
    # results[0] among the elements that ``ends`` counts. Returns the tensor of the last element, which is not flushed.
    begin = 0
    while begin < count:
        tensor = enter(lanes, wide, sums, first + at + begin, ends, tensor)
        stop = min(count, ends[tensor] - first - at)
        whole = stop - (stop - begin) % _LINE
        for i in range(begin, whole, _LINE):
            _add_vector(results, at + i, params, i, lanes)
        for i in range(whole, stop):
            old, new = np.float64(results[at + i]), np.float64(params[i])
            wide[0] += (old - new) * (old - new)
            wide[_LINE] += new * new
            wide[2 * _LINE] += old * old
        begin = stop
    widen(lanes, wide)
    return tensor
