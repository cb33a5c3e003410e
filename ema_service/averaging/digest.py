"""Digests of byte streams: XXH3 (128 bits) of each block of 8 MiB, and XXH3 over the digests of the blocks.

The xxhash library hashes a block, or the compiled averaging loop does (fused.py) while the block's bytes are in its
registers. Both give the same 16 bytes. Hashing in the loop saves a second reading of the memory: averaging 1 GiB on one
core takes 141 ms, 185 with the library's hashing after it, 146 with both in one reading.

Knows bytes, and XXH3 by xxh3.py. Does not know parameters, dtypes, threads, or what a digest is for.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xxhash

from ema_service.averaging.machine_code import AVERAGING
from ema_service.averaging.xxh3 import GULP_BYTES, NO_DIGEST, Accumulators, merged
from ema_service.values import address

__all__ = ["BLOCK_BYTES", "GULP_BYTES", "Accumulators", "BlockDigest", "Digest", "SizedDigest"]

#: Bytes of a block. Blocks are hashed apart from each other, so several threads can hash one stream.
BLOCK_BYTES = 8 << 20


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


class SizedDigest:
    """The digest of a part of an update: XXH3 over the hashes of its tensors. Not thread-safe.

    sizes: bytes of each tensor, in the order of the stream.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        self._sizes = iter(sizes)
        self._hashes: list[bytes] = []
        self._tensor = xxhash.xxh3_128()
        self._room = next(self._sizes, 0)

    def update(self, data: memoryview) -> None:
        """Hash more bytes of the stream, any number of them, and none beyond its end."""
        while data and self._room:
            part, data = data[: self._room], data[self._room :]
            self._tensor.update(part)
            self._room -= len(part)
            if not self._room:
                self._hashes.append(self._tensor.digest())
                self._tensor.reset()
                self._room = next(self._sizes, 0)

    def digest(self) -> bytes:
        """The digest, 16 bytes, after the stream's last byte."""
        return xxhash.xxh3_128(b"".join(self._hashes)).digest()


class BlockDigest:
    """The XXH3 hash of one block, fed in order: as bytes by update(), or gulp by gulp by compiled code.

    compiled: the averaging loop gives ``accumulators`` to take_in() for every gulp but the last, which end() takes. So
    the block must be whole, ``block_bytes`` long. Otherwise ``accumulators`` has none, and update() takes all bytes of
    a block of any length.
    """

    def __init__(self, block_bytes: int = BLOCK_BYTES, *, compiled: bool) -> None:
        self.compiled = compiled
        self._block_bytes = block_bytes
        self.accumulators = Accumulators() if compiled else NO_DIGEST
        self._library = xxhash.xxh3_128()

    def update(self, data: memoryview) -> None:
        """Hash more bytes of a block that compiled code does not hash."""
        self._library.update(data)

    def end(self, gulp: memoryview) -> None:
        """Hash the last GULP_BYTES of a block whose other gulps the compiled loop has hashed."""
        data = np.frombuffer(gulp, np.uint8)
        AVERAGING["take_last"](self.accumulators.address, address(data))

    def digest(self) -> bytes:
        """The hash, 16 bytes, most significant first, as the library gives it."""
        if not self.compiled:
            return self._library.digest()
        return merged(self.accumulators.values, self._block_bytes)
