"""Digests of byte streams: XXH3 (128 bits) of each block of 8 MiB, and XXH3 over the digests of the blocks.

The xxhash library hashes a block, or the compiled averaging loop does (fused.py) while the block's bytes are in its
registers. Both give the same 16 bytes. Hashing in the loop saves a second reading of the memory: averaging 1 GiB on one
core takes 141 ms, 185 with the library's hashing after it, 146 with both in one reading.

XXH3 in short (xxHash specification 0.2.0, github.com/Cyan4973/xxHash, doc/xxhash_spec.md, "XXH3 algorithm for inputs
larger than 240 bytes", without a seed and with the default secret). Its state is eight 64-bit accumulators. A *stripe*
of 64 bytes is mixed into them: each accumulator takes eight bytes, keyed by a piece of the secret. After 16 stripes the
accumulators are scrambled. The specification calls these 1024 bytes a block; here a block has 8 MiB, so they are called
a *gulp*. A block's last gulp is different: its last stripe has a key of its own, and nothing is scrambled after it. In
the end the accumulators are merged into two numbers of 64 bits.

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
    "take_in_numpy",
    "take_last_numpy",
]

#: Bytes of a block. Blocks are hashed apart from each other, so several threads can hash one stream.
BLOCK_BYTES = 8 << 20
#: Bytes of a gulp, 16 stripes.
GULP_BYTES = 1024

#: XXH3's state while it hashes one block: eight numbers. Empty where nothing is hashed.
Accumulators = npt.NDArray[np.uint64]

# Constants of the specification.
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
#: Bytes of a stripe, eight for each accumulator.
STRIPE_BYTES = 64
_STRIPES = GULP_BYTES // STRIPE_BYTES
_LANES = 8
_MASK = (1 << 64) - 1
#: Offsets into the secret of the keys: stripe i of a gulp has its key at 8 * i; then those of the scrambling, of the
#: last stripe of a block, and of the low and the high half of the result.
_STRIPE_AT = 8
_SCRAMBLE_AT = len(_SECRET) - STRIPE_BYTES
_LAST_AT = _SCRAMBLE_AT - 7
_LOW_AT = 11
_HIGH_AT = _SCRAMBLE_AT - 11

# LLVM's types of one accumulator, and of all eight as one vector.
_LANE = ir.IntType(64)
_VECTOR = ir.VectorType(_LANE, _LANES)


class Digest:
    """The digest of a stream of bytes: XXH3 over the hashes of the stream's blocks, ``block_bytes`` long each.

    Blocks come as bytes, by update(), or already hashed, by add(). blocks: the hashes of whole blocks so far, 16 bytes
    each. Not thread-safe.
    """

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self.blocks: list[bytes] = []
        self._block = xxhash.xxh3_128()
        self._block_bytes = self._room = block_bytes

    def update(self, data: memoryview) -> None:
        """Hash more bytes of the stream, any number of them."""
        while data:
            part, data = data[: self._room], data[self._room :]
            self._block.update(part)
            self._room -= len(part)
            if not self._room:
                self.add(self._block.digest())

    def add(self, block: bytes) -> None:
        """Append a whole block by its hash (16 bytes). Only where the stream stands at the beginning of a block."""
        self.blocks.append(block)
        self._block.reset()
        self._room = self._block_bytes

    def end(self) -> None:
        """The stream ends here: its last block, which may be shorter than the others, is whole."""
        if self._room < self._block_bytes:
            self.add(self._block.digest())

    def digest(self) -> bytes:
        """The digest, 16 bytes, after the stream's last byte."""
        self.end()
        return xxhash.xxh3_128(b"".join(self.blocks)).digest()


class BlockDigest:
    """The XXH3 hash of one block, fed in order: as bytes by update(), or gulp by gulp by compiled code.

    compiled: the averaging loop gives ``accumulators`` to take_in() for every gulp but the last, which end() takes. So
    the block must be whole, ``block_bytes`` long. Otherwise ``accumulators`` is empty, and update() takes all bytes of
    a block of any length.
    """

    def __init__(self, block_bytes: int = BLOCK_BYTES, *, compiled: bool) -> None:
        self.compiled = compiled
        self._block_bytes = block_bytes
        self.accumulators: Accumulators = np.array(_START if compiled else (), np.uint64)
        self._library = xxhash.xxh3_128()

    def update(self, data: memoryview) -> None:
        """Hash more bytes of a block that compiled code does not hash."""
        self._library.update(data)

    def end(self, gulp: memoryview) -> None:
        """Hash the last GULP_BYTES of a block whose other gulps the compiled loop has hashed."""
        _take_in_last(self.accumulators, np.frombuffer(gulp, np.uint8))

    def digest(self) -> bytes:
        """The hash, 16 bytes, most significant first, as the library gives it."""
        if not self.compiled:
            return self._library.digest()
        words = [int(word) for word in self.accumulators]
        low = _merge(words, _LOW_AT, self._block_bytes * _PRIMES_64[0])
        high = _merge(words, _HIGH_AT, ~(self._block_bytes * _PRIMES_64[1]))
        return high.to_bytes(8, "big") + low.to_bytes(8, "big")


def _merge(words: list[int], at: int, start: int) -> int:
    """Half of a hash: the accumulators, keyed from offset ``at`` of the secret, multiplied in pairs and added up."""
    total = start
    for i, (one, other) in enumerate(zip(words[::2], words[1::2], strict=True)):
        product = (one ^ _secret(at + 16 * i)) * (other ^ _secret(at + 16 * i + 8))
        total += (product & _MASK) ^ (product >> 64)
    total &= _MASK
    total = (total ^ (total >> 37)) * _AVALANCHE & _MASK
    return total ^ (total >> 32)


def _secret(at: int) -> int:
    """The eight bytes of the secret at an offset, as a number."""
    return int.from_bytes(_SECRET[at : at + 8], "little")


# --- gulps in numpy: what the instructions below compute, and the oracle that the tests compare them with ------------


def take_in_numpy(accumulators: Accumulators, gulp: memoryview) -> None:
    """As take_in(): mix in the 16 stripes of a gulp, then scramble."""
    for i, stripe in enumerate(np.frombuffer(gulp, np.uint64).reshape(_STRIPES, _LANES)):
        _mix_numpy(accumulators, stripe, i * _STRIPE_AT)
    accumulators ^= accumulators >> np.uint64(47)
    accumulators ^= _key_numpy(_SCRAMBLE_AT)
    accumulators *= np.uint64(_PRIMES_32[0])


def take_last_numpy(accumulators: Accumulators, gulp: memoryview) -> None:
    """As BlockDigest.end(): mix in the 16 stripes of a block's last gulp, the last one with its own key."""
    *stripes, last = np.frombuffer(gulp, np.uint64).reshape(_STRIPES, _LANES)
    for i, stripe in enumerate(stripes):
        _mix_numpy(accumulators, stripe, i * _STRIPE_AT)
    _mix_numpy(accumulators, last, _LAST_AT)


def _mix_numpy(accumulators: Accumulators, stripe: Accumulators, at: int) -> None:
    """Mix one stripe, eight numbers, into the accumulators. Numbers of 64 bits wrap around."""
    keyed = stripe ^ _key_numpy(at)
    accumulators += (keyed & np.uint64(0xFFFFFFFF)) * (keyed >> np.uint64(32))
    # Each accumulator also takes its neighbour's bytes as they are: a zero product must not swallow them.
    accumulators += stripe.reshape(-1, 2)[:, ::-1].reshape(-1)


def _key_numpy(at: int) -> Accumulators:
    return np.frombuffer(_SECRET, np.uint64, _LANES, at)


# --- the same as instructions, see compiling.py ---------------------------------------------------------------------
#
# Written out for vectors of eight lanes, because the compiler splits such a loop into scalar operations: 28 GB/s in the
# core's cache, where the library has 60.


@intrinsic
def take_in(_typing, accumulators, values, index):  # type: ignore[no-untyped-def]
    """take_in(accumulators, values, index): hash the GULP_BYTES of ``values`` that begin at an index. In compiled code.

    Emits the 16 stripes unrolled, with the accumulators in registers between one load and one store.
    """

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        state, data, align = _pointers(context, builder, signature, arguments)
        lanes = _stripes(builder, state, data, align, [i * _STRIPE_AT for i in range(_STRIPES)])
        builder.store(scramble(builder, lanes), state, align=8)
        return context.get_dummy_value()

    return types.void(accumulators, values, index), code


@intrinsic
def _take_last(_typing, accumulators, values, index):  # type: ignore[no-untyped-def]
    """As take_in(), for the last gulp of a block."""

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
    return _mix(builder, lanes, builder.bitcast(stripe, _VECTOR), index * _STRIPE_AT)


def scramble(builder: Any, lanes: Any) -> Any:
    """Emits: scramble the accumulators, after a gulp. Returns them."""
    lanes = builder.xor(lanes, builder.lshr(lanes, _all(47)))
    return builder.mul(builder.xor(lanes, _key(_SCRAMBLE_AT)), _all(_PRIMES_32[0]))


def _mix(builder: Any, lanes: Any, stripe: Any, at: int) -> Any:
    """_mix_numpy(), emitted for the accumulators ``lanes`` as one vector."""
    swap = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [lane ^ 1 for lane in range(_LANES)])
    mixed = builder.xor(stripe, _key(at))
    product = builder.mul(builder.and_(mixed, _all(0xFFFFFFFF)), builder.lshr(mixed, _all(32)))
    swapped = builder.shuffle_vector(stripe, ir.Constant(_VECTOR, ir.Undefined), swap)
    return builder.add(lanes, builder.add(product, swapped))


def _key(at: int) -> Any:
    """The 64 bytes of the secret at an offset, as a constant."""
    return ir.Constant(_VECTOR, [_secret(at + 8 * lane) for lane in range(_LANES)])


def _all(value: int) -> Any:
    """The same number in all eight lanes, as a constant."""
    return ir.Constant(_VECTOR, [value] * _LANES)
