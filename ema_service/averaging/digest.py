"""Digests: XXH3 with 128 bits of each block, worked out by the library or by the averaging loop itself, and of those.

XXH3 takes in 1024 bytes at a time. The compiled loop has just that much of the parameters at hand whenever it goes on,
so it takes them in before it averages them: one reading of the memory for both (1 GiB on one core: 146 ms instead of
185, of which 141 are the averaging); so it does with the results, which then are in its registers. The result is the
library's, bit for bit; which of the two worked it out nobody can tell.

The algorithm and its constants: xxHash specification, version 0.2.0 (github.com/Cyan4973/xxHash, doc/xxhash_spec.md),
"XXH3 algorithm for inputs larger than 240 bytes", without a seed and with the default secret.

Knows bytes. Does not know parameters, dtypes, threads, or what a digest is for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ema_service.averaging.compiling import compiled

__all__ = [
    "BLOCK_BYTES",
    "GULP_BYTES",
    "STRIPE_BYTES",
    "Accumulators",
    "BlockDigest",
    "Digest",
    "mix_stripe",
    "scramble",
    "take_in",
]

#: The digest of a stream is the hash of the hashes of blocks of so many bytes: several threads can work it out.
BLOCK_BYTES = 8 << 20
#: What XXH3 takes in at once. The last of a block is taken in another way.
GULP_BYTES = 1024

Accumulators = npt.NDArray[np.uint64]

_PRIMES_32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIMES_64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_START = (_PRIMES_32[2], *_PRIMES_64[:4], _PRIMES_32[1], _PRIMES_64[4], _PRIMES_32[0])
_AVALANCHE = 0x165667919E3779F9
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
#: What is mixed in at a time.
STRIPE_BYTES = 64
_STRIPES = GULP_BYTES // STRIPE_BYTES
_LANES = 8
_MASK = (1 << 64) - 1
#: Where in the secret stands what is mixed in: for each stripe, for the scrambling, for the last stripe of all, and for
#: the two halves of the result.
_STRIPE_AT = 8
_SCRAMBLE_AT = len(_SECRET) - STRIPE_BYTES
_LAST_AT = _SCRAMBLE_AT - 7
_LOW_AT = 11
_HIGH_AT = _SCRAMBLE_AT - 11

_LANE = ir.IntType(64)
_VECTOR = ir.VectorType(_LANE, _LANES)


class Digest:
    """The digest of a stream of bytes: the hash of the hashes of its blocks, of ``block_bytes`` each."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._whole, self._block = xxhash.xxh3_128(), xxhash.xxh3_128()
        self._block_bytes = self._room = block_bytes

    def update(self, data: memoryview) -> None:
        """Take in bytes, as many as there are."""
        while data:
            part, data = data[: self._room], data[self._room :]
            self._block.update(part)
            self._room -= len(part)
            if not self._room:
                self.add(self._block.digest())

    def add(self, block: bytes) -> None:
        """Take in a whole block of which this is the digest, where one begins."""
        self._whole.update(block)
        self._block.reset()
        self._room = self._block_bytes

    def digest(self) -> bytes:
        """16 bytes, once all are taken in."""
        if self._room < self._block_bytes:
            self.add(self._block.digest())
        return self._whole.digest()


class BlockDigest:
    """The hash of one block, fed in order: by update(), or by compiled code.

    compiled: the averaging loop gives ``accumulators`` to take_in() gulp for gulp, and end() takes the last gulp. So
    only whole blocks of ``block_bytes`` are hashed. Else the accumulators are an empty array, and update() takes all.
    """

    def __init__(self, block_bytes: int = BLOCK_BYTES, *, compiled: bool) -> None:
        self.compiled = compiled
        self._block_bytes = block_bytes
        self.accumulators: Accumulators = np.array(_START if compiled else (), np.uint64)
        self._library = xxhash.xxh3_128()

    def update(self, data: memoryview) -> None:
        self._library.update(data)

    def end(self, gulp: memoryview) -> None:
        """Take in the last GULP_BYTES of a block, of which all others were taken in."""
        _take_in_last(self.accumulators, np.frombuffer(gulp, np.uint8))

    def digest(self) -> bytes:
        """16 bytes, the most significant first."""
        if not self.compiled:
            return self._library.digest()
        words = [int(word) for word in self.accumulators]
        low = _merge(words, _LOW_AT, self._block_bytes * _PRIMES_64[0])
        high = _merge(words, _HIGH_AT, ~(self._block_bytes * _PRIMES_64[1]))
        return high.to_bytes(8, "big") + low.to_bytes(8, "big")


def _merge(words: list[int], at: int, start: int) -> int:
    total = start
    for i, (one, other) in enumerate(zip(words[::2], words[1::2], strict=True)):
        product = (one ^ _secret(at + 16 * i)) * (other ^ _secret(at + 16 * i + 8))
        total += (product & _MASK) ^ (product >> 64)
    total &= _MASK
    total = (total ^ (total >> 37)) * _AVALANCHE & _MASK
    return total ^ (total >> 32)


def _secret(at: int) -> int:
    return int.from_bytes(_SECRET[at : at + 8], "little")


# From here on instructions are written out, for vectors of eight lanes: the compiler breaks these loops up by itself,
# and is slower than the library (28 instead of 60 GB/s in the core's cache).


@intrinsic
def take_in(_typing, accumulators, values, index):  # type: ignore[no-untyped-def]
    """Take in the GULP_BYTES of a flat array from an index on. For compiled code."""

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        state, data, align = _pointers(context, builder, signature, arguments)
        lanes = _stripes(builder, state, data, align, [i * _STRIPE_AT for i in range(_STRIPES)])
        builder.store(scramble(builder, lanes), state, align=8)
        return context.get_dummy_value()

    return types.void(accumulators, values, index), code


@intrinsic
def _take_last(_typing, accumulators, values, index):  # type: ignore[no-untyped-def]
    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        state, data, align = _pointers(context, builder, signature, arguments)
        keys = [i * _STRIPE_AT for i in range(_STRIPES - 1)] + [_LAST_AT]
        builder.store(_stripes(builder, state, data, align, keys), state, align=8)
        return context.get_dummy_value()

    return types.void(accumulators, values, index), code


@compiled
def _take_in_last(accumulators, data):  # type: ignore[no-untyped-def]  # numba infers the types
    _take_last(accumulators, data, 0)  # type: ignore[call-arg]  # numba gives the first


def _pointers(context: Any, builder: Any, signature: Any, arguments: Any) -> tuple[Any, Any, int]:
    """To the accumulators and to the data at the index, as vectors, and what the data's address is a multiple of."""
    state, data = (
        context.make_array(kind)(context, builder, argument).data
        for kind, argument in zip(signature.args[:2], arguments[:2], strict=True)
    )
    vector = _VECTOR.as_pointer()
    start = builder.gep(data, [arguments[2]])
    return builder.bitcast(state, vector), builder.bitcast(start, vector), signature.args[1].dtype.bitwidth // 8


def _stripes(builder: Any, state: Any, data: Any, align: int, keys: list[int]) -> Any:
    """The accumulators after one stripe for each key."""
    lanes = builder.load(state, align=8)
    for i, at in enumerate(keys):
        stripe = builder.load(builder.gep(data, [ir.IntType(32)(i)]), align=align)
        lanes = _mix(builder, lanes, stripe, at)
    return lanes


def mix_stripe(builder: Any, lanes: Any, stripe: Any, index: int) -> Any:
    """The accumulators after one more stripe, both as vectors of eight lanes: the ``index``-th of its gulp."""
    return _mix(builder, lanes, builder.bitcast(stripe, _VECTOR), index * _STRIPE_AT)


def scramble(builder: Any, lanes: Any) -> Any:
    """The accumulators at the end of a gulp."""
    lanes = builder.xor(lanes, builder.lshr(lanes, _all(47)))
    return builder.mul(builder.xor(lanes, _key(_SCRAMBLE_AT)), _all(_PRIMES_32[0]))


def _mix(builder: Any, lanes: Any, stripe: Any, at: int) -> Any:
    swap = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [lane ^ 1 for lane in range(_LANES)])
    mixed = builder.xor(stripe, _key(at))
    product = builder.mul(builder.and_(mixed, _all(0xFFFFFFFF)), builder.lshr(mixed, _all(32)))
    swapped = builder.shuffle_vector(stripe, ir.Constant(_VECTOR, ir.Undefined), swap)
    return builder.add(lanes, builder.add(product, swapped))


def _key(at: int) -> Any:
    return ir.Constant(_VECTOR, [_secret(at + 8 * lane) for lane in range(_LANES)])


def _all(value: int) -> Any:
    return ir.Constant(_VECTOR, [value] * _LANES)
