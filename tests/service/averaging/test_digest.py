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

LINE_BYTES = 64


def block_of(kind: str) -> bytes:
    """A block of the bytes that digests go wrong on: every value, all zeros, all ones, signs alone."""
    random = np.random.default_rng(0).bytes(BLOCK_BYTES)
    half = BLOCK_BYTES // 2
    return {"random": random, "zeros": bytes(BLOCK_BYTES), "ones": b"\xff" * BLOCK_BYTES}.get(
        kind, b"\x00\x00\x00\x80" * (half // 4) + random[:half]
    )


def placed(data: bytes, dtype: type, off: int) -> np.ndarray:
    """These bytes, in memory that begins ``off`` elements behind a cache line's boundary."""
    values = np.frombuffer(data, dtype)
    room = np.empty(len(values) + LINE_BYTES, dtype)
    start = -room.ctypes.data % LINE_BYTES // room.itemsize + off
    room[start : start + len(values)] = values
    return room[start : start + len(values)]


def in_place(data: bytes, off: int) -> tuple[fused.Loop, np.ndarray]:
    out = placed(data, np.float32, off)
    return fused.loop_of(out, np.ones_like(out), out, 0.25), out


def from_f32(data: bytes, off: int) -> tuple[fused.Loop, np.ndarray]:
    param, out = placed(data, np.float32, 3), placed(data, np.float32, off)
    return fused.loop_of(out, np.ones_like(out), param, 0.25), out


def from_bf16(data: bytes, off: int) -> tuple[fused.Loop, np.ndarray]:
    param, out = placed(data, np.uint16, 3), placed(data * 2, np.float32, off)
    return fused.loop_of(out, np.ones_like(out), param, 0.25), out


@pytest.mark.parametrize("kind", ["random", "zeros", "ones", "signs"])
@pytest.mark.parametrize("off", [0, 3], ids=["past the cache", "through the cache"])
@pytest.mark.parametrize("make", [in_place, from_f32, from_bf16])
def test_is_the_librarys(make: Callable[[bytes, int], tuple[fused.Loop, np.ndarray]], off: int, kind: str) -> None:
    """A block averaged in calls of any number of gulps; the averages and what is said of them stay what they were."""
    data = block_of(kind)
    plain, expected = make(data, 1)
    loop, out = make(data, off)
    gulp = len(out) * GULP_BYTES // BLOCK_BYTES
    calls = [0, 1, 2, 255, 256, 5000, BLOCK_BYTES // GULP_BYTES - 1]
    digest = BlockDigest(compiled=True)
    assert digest.accumulators is not None

    whole = [plain(start, start + 1000) for start in range(0, len(out), 1000)]
    finite = [loop(start * gulp, stop * gulp, digest.accumulators) for start, stop in pairwise(calls)]
    digest.end(memoryview(data)[-GULP_BYTES:])
    finite.append(loop(calls[-1] * gulp, len(out)))

    assert digest.digest() == xxhash.xxh3_128_digest(data)
    assert out.tobytes() == expected.tobytes()
    assert all(finite) == all(whole)


def test_library_alone() -> None:
    """What no loop averages is given to the library, in pieces, whatever its length."""
    digest = BlockDigest(compiled=False)
    digest.update(memoryview(b"a"))
    digest.update(memoryview(b"bc"))

    assert digest.accumulators is None
    assert digest.digest() == xxhash.xxh3_128_digest(b"abc")
