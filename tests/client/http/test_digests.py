"""The digest of a body's data is the service's, however the bytes come. Knows the service's own digest and xxhash."""

from __future__ import annotations

import random

import pytest
import xxhash

from ema_client.http.digests import BLOCK_BYTES, Digest, Rest, blocks, digests_of
from ema_service.averaging import Digest as ServiceDigest


@pytest.mark.parametrize("size", [0, 1, 1000, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES + 77])
def test_blocks_are_the_services(size: int) -> None:
    """Client and service agree on the digest of any data, in whatever pieces the client has it."""
    dice = random.Random(size)
    raw = memoryview(dice.randbytes(size))
    theirs = ServiceDigest()
    theirs.update(raw)

    for _ in range(3):
        ours, rest = Digest(blocks(), skip=5), memoryview(b"12345" + bytes(raw))
        while rest:
            count = dice.randrange(1, max(2, size))
            ours.update(rest[:count])
            rest = rest[count:]
        assert ours.digest() == theirs.digest()


@pytest.mark.parametrize("begin", [1, 1000, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES - 7])
def test_two_threads_make_one_digest(begin: int) -> None:
    """Wherever a stream is parted, what two threads have of it is the digest of the whole."""
    raw = memoryview(random.Random(begin).randbytes(3 * BLOCK_BYTES + 77))
    theirs = ServiceDigest()
    theirs.update(raw)
    ours, rest = Digest(blocks()), Rest(begin)
    ours.update(raw[:begin])
    for start in range(begin, len(raw), 1_000_003):
        rest.update(raw[start : start + 1_000_003])
    ours.append(rest)

    assert ours.digest() == theirs.digest()


def test_stretches_may_be_empty() -> None:
    """Each tensor of a part is a stretch, also one without an element."""
    digest = Digest([0, 3, 0, 0, 2, 0])
    digest.update(memoryview(b"abcde"))
    whole = xxhash.xxh3_128()
    for stretch in (b"", b"abc", b"", b"", b"de", b""):
        whole.update(xxhash.xxh3_128_digest(stretch))

    assert digest.digest() == whole.digest()


@pytest.mark.parametrize("sizes", [[], [0], [10], [3, 0, 4, 3], [2, 2], [9, 5, 0]])
@pytest.mark.parametrize("pieces", [1, 4, 10])
def test_stretches_are_digested_each_by_itself(sizes: list[int], pieces: int) -> None:
    """However the stream comes, and whether it is longer than the stretches, or ends before they do."""
    raw = memoryview(b"0123456789")
    found = digests_of((raw[at : at + pieces] for at in range(0, len(raw), pieces)), sizes)

    bounds = [sum(sizes[:at]) for at in range(len(sizes) + 1)]
    for each, start, stop in zip(found, bounds[:-1], bounds[1:], strict=True):
        alone = Digest(blocks())
        alone.update(raw[start:stop])
        assert each == alone.digest()
