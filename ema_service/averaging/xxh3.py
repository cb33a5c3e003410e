"""XXH3 as far as the compiled loops compute it: its constants, and what they do with 1024 bytes, in numpy.

XXH3 in short (xxHash specification 0.2.0, github.com/Cyan4973/xxHash, doc/xxhash_spec.md, "XXH3 algorithm for inputs
larger than 240 bytes", without a seed and with the default secret). Its state is eight 64-bit accumulators. A *stripe*
of 64 bytes is mixed into them: each accumulator takes eight bytes, keyed by a piece of the secret. After 16 stripes the
accumulators are scrambled. The specification calls these 1024 bytes a block; here a block has 8 MiB, so they are called
a *gulp*. A block's last gulp is different: its last stripe has a key of its own, and nothing is scrambled after it. In
the end the accumulators are merged into two numbers of 64 bits.

Knows the specification. Does not know the library, blocks, or who hashes what.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ema_service.values import address

__all__ = [
    "GULP_BYTES",
    "LANES",
    "LAST_AT",
    "NO_DIGEST",
    "PRIMES_32",
    "SCRAMBLE_AT",
    "START",
    "STRIPES",
    "STRIPE_AT",
    "STRIPE_BYTES",
    "Accumulators",
    "Lanes",
    "merged",
    "secret",
    "take_in_numpy",
    "take_last_numpy",
]

#: Bytes of a gulp, 16 stripes.
GULP_BYTES = 1024

# Constants of the specification.
PRIMES_32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIMES_64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
START = (PRIMES_32[2], *_PRIMES_64[:4], PRIMES_32[1], _PRIMES_64[4], PRIMES_32[0])
_AVALANCHE = 0x165667919E3779F9
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
#: Bytes of a stripe, eight for each accumulator.
STRIPE_BYTES = 64
STRIPES = GULP_BYTES // STRIPE_BYTES
LANES = 8
_MASK = (1 << 64) - 1
#: Offsets into the secret of the keys: stripe i of a gulp has its key at 8 * i; then those of the scrambling, of the
#: last stripe of a block, and of the low and the high half of the result.
STRIPE_AT = 8
SCRAMBLE_AT = len(_SECRET) - STRIPE_BYTES
LAST_AT = SCRAMBLE_AT - 7
_LOW_AT = 11
_HIGH_AT = SCRAMBLE_AT - 11

#: Eight numbers.
Lanes = npt.NDArray[np.uint64]


class Accumulators:
    """XXH3's state while it hashes one block: eight numbers, or none where nothing is hashed.

    address, count: where compiled code finds the numbers, and how many there are. Found once: numpy takes longer to
    tell an address than a small piece to hash.
    """

    __slots__ = ("address", "count", "values")

    def __init__(self, values: tuple[int, ...] = START) -> None:
        self.values: Lanes = np.array(values, np.uint64)
        self.address, self.count = address(self.values), len(values)


#: In the place of accumulators, where no digest is wanted.
NO_DIGEST = Accumulators(())


def merged(accumulators: Lanes, nbytes: int) -> bytes:
    """The hash of so many bytes, most significant first, as the library gives it.

    accumulators: after the last stripe.
    """
    words = accumulators.tolist()
    low = _merge(words, _LOW_AT, nbytes * _PRIMES_64[0])
    high = _merge(words, _HIGH_AT, ~(nbytes * _PRIMES_64[1]))
    return high.to_bytes(8, "big") + low.to_bytes(8, "big")


def _merge(words: list[int], at: int, start: int) -> int:
    """Half of a hash: the accumulators, keyed from offset ``at`` of the secret, multiplied in pairs and added up."""
    total = start
    for i, (one, other) in enumerate(zip(words[::2], words[1::2], strict=True)):
        product = (one ^ secret(at + 16 * i)) * (other ^ secret(at + 16 * i + 8))
        total += (product & _MASK) ^ (product >> 64)
    total &= _MASK
    total = (total ^ (total >> 37)) * _AVALANCHE & _MASK
    return total ^ (total >> 32)


def secret(at: int) -> int:
    """The eight bytes of the secret at an offset, as a number."""
    return int.from_bytes(_SECRET[at : at + 8], "little")


# --- gulps in numpy: what loops/xxh3.py emits instructions for, and the oracle that the tests compare them with -------


def take_in_numpy(accumulators: Lanes, gulp: memoryview) -> None:
    """As take_in(): mix in the 16 stripes of a gulp, then scramble."""
    for i, stripe in enumerate(np.frombuffer(gulp, np.uint64).reshape(STRIPES, LANES)):
        _mix_numpy(accumulators, stripe, i * STRIPE_AT)
    accumulators ^= accumulators >> np.uint64(47)
    accumulators ^= _key_numpy(SCRAMBLE_AT)
    accumulators *= np.uint64(PRIMES_32[0])


def take_last_numpy(accumulators: Lanes, gulp: memoryview) -> None:
    """As BlockDigest.end(): mix in the 16 stripes of a block's last gulp, the last one with its own key."""
    *stripes, last = np.frombuffer(gulp, np.uint64).reshape(STRIPES, LANES)
    for i, stripe in enumerate(stripes):
        _mix_numpy(accumulators, stripe, i * STRIPE_AT)
    _mix_numpy(accumulators, last, LAST_AT)


def _mix_numpy(accumulators: Lanes, stripe: Lanes, at: int) -> None:
    """Mix one stripe, eight numbers, into the accumulators. Numbers of 64 bits wrap around."""
    keyed = stripe ^ _key_numpy(at)
    accumulators += (keyed & np.uint64(0xFFFFFFFF)) * (keyed >> np.uint64(32))
    # Each accumulator also takes its neighbour's bytes as they are: a zero product must not swallow them.
    accumulators += stripe.reshape(-1, 2)[:, ::-1].reshape(-1)


def _key_numpy(at: int) -> Lanes:
    return np.frombuffer(_SECRET, np.uint64, LANES, at)
