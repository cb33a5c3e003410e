"""The digest that the averaging loop works out on its way is the library's XXH3, bit for bit.

Knows blocks and loops. Does not know runs, or what a digest is for.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import xxhash

from ema_service.averaging import BLOCK_BYTES, GULP_BYTES, BlockDigest, fused

#: Elements by which the arrays are off the vectors' and the cache lines' boundaries.
OFF = 3


def block_of(kind: str) -> bytes:
    """A block of the bytes that digests go wrong on: every value, all zeros, all ones, signs alone."""
    random = np.random.default_rng(0).bytes(BLOCK_BYTES)
    half = BLOCK_BYTES // 2
    return {"random": random, "zeros": bytes(BLOCK_BYTES), "ones": b"\xff" * BLOCK_BYTES}.get(
        kind, b"\x00\x00\x00\x80" * (half // 4) + random[:half]
    )


def off(data: bytes, dtype: type) -> np.ndarray:
    """These bytes, in memory that begins a few elements behind a boundary."""
    values = np.frombuffer(data, dtype)
    room = np.empty(len(values) + OFF, dtype)
    room[OFF:] = values
    return room[OFF:]


def in_place(data: bytes) -> tuple[fused.Loop, np.ndarray]:
    out = off(data, np.float32)
    return fused.in_place(out, np.zeros_like(out), 0.25), out


def from_f32(data: bytes) -> tuple[fused.Loop, np.ndarray]:
    param = off(data, np.float32)
    out = np.empty_like(param)
    return fused.from_f32(out, np.zeros_like(out), param, 0.25), out


def from_bf16(data: bytes) -> tuple[fused.Loop, np.ndarray]:
    param = off(data, np.uint16)
    out = np.empty(param.shape, np.float32)
    return fused.from_bf16(out, np.zeros_like(out), param, 0.25), out


@pytest.mark.parametrize("kind", ["random", "zeros", "ones", "signs"])
@pytest.mark.parametrize("make", [in_place, from_f32, from_bf16])
def test_is_the_librarys(make: Callable[[bytes], tuple[fused.Loop, np.ndarray]], kind: str) -> None:
    """A block averaged in calls of any number of gulps; the averages and what is said of them stay what they were."""
    data = block_of(kind)
    plain, expected = make(data)
    loop, out = make(data)
    gulp = len(out) * GULP_BYTES // BLOCK_BYTES
    calls = [0, 1, 2, 255, 256, 5000, BLOCK_BYTES // GULP_BYTES - 1]
    digest = BlockDigest(compiled=True)
    assert digest.accumulators is not None

    whole = plain(0, len(out))
    finite = [loop(start * gulp, stop * gulp, digest.accumulators) for start, stop in pairwise(calls)]
    digest.end(memoryview(data)[-GULP_BYTES:])
    finite.append(loop(calls[-1] * gulp, len(out)))

    assert digest.digest() == xxhash.xxh3_128_digest(data)
    assert out.tobytes() == expected.tobytes()
    assert all(finite) == whole


def test_library_alone() -> None:
    """What no loop averages is given to the library, in pieces, whatever its length."""
    digest = BlockDigest(compiled=False)
    digest.update(memoryview(b"a"))
    digest.update(memoryview(b"bc"))

    assert digest.accumulators is None
    assert digest.digest() == xxhash.xxh3_128_digest(b"abc")
