"""The digest of a body's data, worked out beside the sending or the receiving: XXH3 over the XXH3s of its stretches.

TCP's own checksum lets one broken segment in 65,536 pass, and a proxy's memory is checked by nobody. XXH3 (128 bits)
hashes 30 GB/s, where CRC-32 reaches 3.2: only xxhash will do, and where it is not installed, nothing is digested.

Knows bytes and xxhash. Does not know bodies, sockets, or what follows from a digest that differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, pairwise, repeat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xxhash

__all__ = ["BLOCK_BYTES", "HASHED_AT_ONCE", "Digest", "Rest", "blocks", "can_digest", "digests_of"]

#: Bytes of each stretch of a body that holds whole tensors; its last one is shorter. The service hashes so, as it
#: averages.
BLOCK_BYTES = 8 << 20
#: So many bytes are hashed just before they are sent, or just after they were received: they are in the core's cache.
HASHED_AT_ONCE = 1 << 20


def can_digest() -> bool:
    """Whether xxhash is installed."""
    try:
        import xxhash  # noqa: F401 - asked for, not used
    except ModuleNotFoundError:
        return False
    return True


def blocks() -> Iterator[int]:
    """The stretches of a body of whole tensors."""
    return repeat(BLOCK_BYTES)


def digests_of(data: Iterable[memoryview], sizes: Sequence[int]) -> list[bytes]:
    """The digest of each of several stretches of a stream, as of a body of whole tensors. sizes: the stretches' bytes,
    in order; what the stream has beyond them is in no digest."""
    digests, bounds, at = [Digest(blocks()) for _ in sizes], [0, *accumulate(sizes)], 0
    for piece in data:
        for digest, (start, stop) in zip(digests, pairwise(bounds), strict=True):
            digest.update(piece[max(start - at, 0) : max(stop - at, 0)])
        at += len(piece)
    return [each.digest() for each in digests]


class Digest:
    """The digest of a stream of bytes. Not thread-safe.

    stretches: bytes of each stretch, in order; what is left of the stream after them is a stretch too.
    skip: so many bytes at the stream's beginning are not digested.
    """

    def __init__(self, stretches: Iterable[int], *, skip: int = 0) -> None:
        self._skip = skip
        self._stretches = chain(stretches, repeat(1 << 62))
        self._part = _new()
        #: The XXH3s of the stretches that have ended.
        self._ended: list[bytes] = []
        self._size = self._room = next(self._stretches)
        self._end_full()

    def update(self, data: memoryview) -> None:
        """Take in the next bytes of the stream, any number of them."""
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        data = data[skipped:]
        while data:
            taken, data = data[: self._room], data[self._room :]
            self._part.update(taken)
            self._room -= len(taken)
            self._end_full()

    def digest(self) -> bytes:
        """The digest, 16 bytes, after the stream's last byte."""
        if self._room < self._size:
            self._end()
        whole = _new()
        whole.update(b"".join(self._ended))
        return whole.digest()

    def append(self, rest: Rest) -> None:
        """Take in a stretch of a stream in blocks, of which this digest has all that is before."""
        self.update(memoryview(rest.lead))
        if rest.size:
            self._ended += rest.digest._ended
            self._part, self._room = rest.digest._part, rest.digest._room

    def _end_full(self) -> None:
        while not self._room:
            self._end()

    def _end(self) -> None:
        self._ended.append(self._part.digest())
        self._part.reset()
        self._size = self._room = next(self._stretches)


class Rest:
    """What a lane has of a stream in blocks, from byte ``begin`` on: for Digest.append(). Not thread-safe.

    lead: the bytes up to the next block. digest, size: of those after them.
    """

    def __init__(self, begin: int) -> None:
        self.lead = bytearray()
        self.digest = Digest(blocks())
        self.size = 0
        self._missing = -begin % BLOCK_BYTES

    def update(self, data: memoryview) -> None:
        """Take in the next bytes of the stream, any number of them."""
        lead, data = data[: self._missing], data[self._missing :]
        self.lead += lead
        self._missing -= len(lead)
        self.size += len(data)
        self.digest.update(data)


def _new() -> xxhash.xxh3_128:
    import xxhash

    return xxhash.xxh3_128()
