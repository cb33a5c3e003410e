"""Hashing 1024 bytes, as instructions: what xxh3.py beside this folder has in numpy.

Written out for vectors of eight lanes, because the compiler splits such a loop into scalar operations: 28 GB/s in the
core's cache, where the library has 60.

Knows XXH3's accumulators, as xxh3.py beside this folder explains them. Does not know blocks.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ema_service.averaging.xxh3 import LANES, LAST_AT, PRIMES_32, SCRAMBLE_AT, STRIPE_AT, STRIPES, secret

__all__ = ["mix_stripe", "scramble", "take_in", "take_last"]

# LLVM's types of one accumulator, and of all eight as one vector.
_LANE = ir.IntType(64)
_VECTOR = ir.VectorType(_LANE, LANES)
#: numba's ``intrinsic``, untyped, as in average.py.
_instructions: Any = intrinsic


@_instructions
def take_in(_typing, accumulators, values, index):  # type: ignore[no-untyped-def]
    """take_in(accumulators, values, index): hash the GULP_BYTES of ``values`` that begin at an index. In compiled code.

    Emits the 16 stripes unrolled, with the accumulators in registers between one load and one store.
    """

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        state, data, align = _pointers(context, builder, signature, arguments)
        lanes = _stripes(builder, state, data, align, [i * STRIPE_AT for i in range(STRIPES)])
        builder.store(scramble(builder, lanes), state, align=8)
        return context.get_dummy_value()

    return types.void(accumulators, values, index), code


@_instructions
def take_last(_typing, accumulators, values, index):  # type: ignore[no-untyped-def]
    """As take_in(), for the last gulp of a block."""

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        state, data, align = _pointers(context, builder, signature, arguments)
        keys = [i * STRIPE_AT for i in range(STRIPES - 1)] + [LAST_AT]
        builder.store(_stripes(builder, state, data, align, keys), state, align=8)
        return context.get_dummy_value()

    return types.void(accumulators, values, index), code


def _pointers(context: Any, builder: Any, signature: Any, arguments: Any) -> tuple[Any, Any, int]:
    """Pointers to the accumulators and to the data at the index, as vectors, and the alignment of the data in bytes."""
    state, data = (
        context.make_array(kind)(context, builder, argument).data
        for kind, argument in zip(signature.args[:2], arguments[:2], strict=True)
    )
    vector = _VECTOR.as_pointer()
    start = builder.gep(data, [arguments[2]])
    return builder.bitcast(state, vector), builder.bitcast(start, vector), signature.args[1].dtype.bitwidth // 8


def _stripes(builder: Any, state: Any, data: Any, align: int, keys: list[int]) -> Any:
    """Emits: load the accumulators, mix in one stripe of the data for each key. Returns the accumulators."""
    lanes = builder.load(state, align=8)
    for i, at in enumerate(keys):
        stripe = builder.load(builder.gep(data, [ir.IntType(32)(i)]), align=align)
        lanes = _mix(builder, lanes, stripe, at)
    return lanes


def mix_stripe(builder: Any, lanes: Any, stripe: Any, index: int) -> Any:
    """Emits: mix in the ``index``-th stripe of a gulp, a vector of 64 bytes. Returns the accumulators."""
    return _mix(builder, lanes, builder.bitcast(stripe, _VECTOR), index * STRIPE_AT)


def scramble(builder: Any, lanes: Any) -> Any:
    """Emits: scramble the accumulators, after a gulp. Returns them."""
    lanes = builder.xor(lanes, builder.lshr(lanes, _all(47)))
    return builder.mul(builder.xor(lanes, _key(SCRAMBLE_AT)), _all(PRIMES_32[0]))


def _mix(builder: Any, lanes: Any, stripe: Any, at: int) -> Any:
    """_mix_numpy(), emitted for the accumulators ``lanes`` as one vector."""
    swap = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [lane ^ 1 for lane in range(LANES)])
    mixed = builder.xor(stripe, _key(at))
    product = builder.mul(builder.and_(mixed, _all(0xFFFFFFFF)), builder.lshr(mixed, _all(32)))
    swapped = builder.shuffle_vector(stripe, ir.Constant(_VECTOR, ir.Undefined), swap)
    return builder.add(lanes, builder.add(product, swapped))


def _key(at: int) -> Any:
    """The 64 bytes of the secret at an offset, as a constant."""
    return ir.Constant(_VECTOR, [secret(at + 8 * lane) for lane in range(LANES)])


def _all(value: int) -> Any:
    """The same number in all eight lanes, as a constant."""
    return ir.Constant(_VECTOR, [value] * LANES)
