"""The digest that the averaging loop works out on its way is the library's XXH3, bit for bit.

Knows blocks and loops. Does not know runs, or what a digest is for.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import xxhash

from ema_service.averaging import BLOCK_BYTES, GULP_BYTES, BlockDigest, Digest, fused
from ema_service.averaging.xxh3 import take_in_numpy, take_last_numpy

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
    """A block averaged in calls of any number of gulps, and its results, taken in as if they were parameters; the
    averages and what is said of them stay what they were."""
    data = block_of(kind)
    plain, expected = make(data, 1)
    loop, out = make(data, off)
    gulp = len(out) * GULP_BYTES // BLOCK_BYTES
    calls = [0, 1, 2, 255, 256, 5000, BLOCK_BYTES // GULP_BYTES - 1]
    digest, results = BlockDigest(compiled=True), BlockDigest(compiled=True)

    whole = [plain(start, start + 1000) for start in range(0, len(out), 1000)]
    accumulators = digest.accumulators, results.accumulators
    finite = [loop(start * gulp, stop * gulp, *accumulators) for start, stop in pairwise(calls)]
    digest.end(memoryview(data)[-GULP_BYTES:])
    finite.append(loop(calls[-1] * gulp, len(out)))
    as_params = BlockDigest(compiled=True)
    fused.loop_of(np.empty_like(out), np.ones_like(out), expected, 0.25)(0, calls[-1] * gulp, as_params.accumulators)

    assert digest.digest() == xxhash.xxh3_128_digest(data)
    assert results.accumulators.values.tolist() == as_params.accumulators.values.tolist()
    assert out.tobytes() == expected.tobytes()
    assert all(finite) == all(whole)


@pytest.mark.parametrize("kind", ["random", "zeros", "ones", "signs"])
def test_readable_gulps_make_the_librarys_hash(kind: str) -> None:
    """XXH3 as it is written down in numpy, the oracle of the compiled gulps, is the library's."""
    data = block_of(kind)[: 5 * GULP_BYTES]
    digest = BlockDigest(len(data), compiled=True)
    *gulps, last = (memoryview(data)[start : start + GULP_BYTES] for start in range(0, len(data), GULP_BYTES))
    for gulp in gulps:
        take_in_numpy(digest.accumulators.values, gulp)
    take_last_numpy(digest.accumulators.values, last)

    assert digest.digest() == xxhash.xxh3_128_digest(data)


@pytest.mark.parametrize("kind", ["random", "zeros", "ones", "signs"])
def test_compiled_gulps_are_the_readable_ones(kind: str) -> None:
    """After each gulp of parameters, and after the results of it, the accumulators are those of the numpy oracle."""
    data = block_of(kind)[-4 * GULP_BYTES :]
    loop, out = from_bf16(data, 0)
    params, results, of_params, of_results = (BlockDigest(compiled=True).accumulators for _ in range(4))
    for gulp in range(4):
        elements = slice(gulp * GULP_BYTES // 2, (gulp + 1) * GULP_BYTES // 2)
        loop(elements.start, elements.stop, params, results)
        take_in_numpy(of_params.values, memoryview(data)[gulp * GULP_BYTES : (gulp + 1) * GULP_BYTES])
        averaged = memoryview(out[elements].tobytes())
        for start in range(0, len(averaged), GULP_BYTES):
            take_in_numpy(of_results.values, averaged[start : start + GULP_BYTES])

        assert params.values.tolist() == of_params.values.tolist()
        assert results.values.tolist() == of_results.values.tolist()


@pytest.mark.parametrize("kind", ["random", "zeros", "ones", "signs"])
def test_compiled_last_gulp_is_the_readable_one(kind: str) -> None:
    """BlockDigest.end() leaves the accumulators of the numpy oracle."""
    gulp = memoryview(block_of(kind))[-GULP_BYTES:]
    digest, oracle = BlockDigest(compiled=True), BlockDigest(compiled=True)
    digest.end(gulp)
    take_last_numpy(oracle.accumulators.values, gulp)

    assert digest.accumulators.values.tolist() == oracle.accumulators.values.tolist()


def test_library_alone() -> None:
    """What no loop averages is given to the library, in pieces, whatever its length."""
    digest = BlockDigest(compiled=False)
    digest.update(memoryview(b"a"))
    digest.update(memoryview(b"bc"))

    assert not digest.accumulators.count
    assert digest.digest() == xxhash.xxh3_128_digest(b"abc")


@pytest.mark.parametrize("length", [0, 1, 999, 1000, 1001, 3000, 4500])
@pytest.mark.parametrize("piece", [7, 1000, 2300, 5000])
def test_stream(length: int, piece: int) -> None:
    """The hash of the hashes of its blocks, in whatever pieces it comes, and whoever hashed the blocks."""
    data = np.random.default_rng(1).bytes(length)
    blocks = [xxhash.xxh3_128_digest(data[start : start + 1000]) for start in range(0, length, 1000)]
    stream, apart = Digest(1000), Digest(1000)
    for start in range(0, length, piece):
        stream.update(memoryview(data)[start : start + piece])
    for block in blocks:
        apart.add(block)

    assert stream.digest() == apart.digest() == xxhash.xxh3_128_digest(b"".join(blocks))


def test_blocks_between_bytes() -> None:
    """A block that someone else hashed may stand anywhere among blocks that come as bytes."""
    mixed, plain = Digest(10), Digest(10)
    plain.update(memoryview(b"0123456789" * 3 + b"end"))
    mixed.update(memoryview(b"0123456789"))
    mixed.add(xxhash.xxh3_128_digest(b"0123456789"))
    mixed.update(memoryview(b"0123456789end"))

    assert mixed.digest() == plain.digest()
