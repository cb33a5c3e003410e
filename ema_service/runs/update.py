"""One pass over the parameters of a push, as they arrive: digest, average (or cast), look for NaN.

The pass runs behind the receiving: whatever part of the parameters has come is averaged while the next part is on the
wire, and when the last byte is in, little is left to do. Nothing of the run is touched (the result lies in the
push's own memory), so a push that breaks off or turns out wrong is simply dropped.

Knows staged memory, arenas and the kernel. Does not know sockets, threads, or when a result becomes the run's state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import xxhash
from torch import Tensor

from ema_client.errors import NonFinite
from ema_client.protocol import LAYOUT_DTYPES
from ema_service.averaging import averaging, casting
from ema_service.runs.arena import Arena
from ema_service.runs.layout import Section
from ema_service.runs.staging import Staged

__all__ = ["Feed", "Pass"]

#: Parameters are hashed and averaged in pieces of this: what was just received is still in the core's cache (2 MiB),
#: with room for the shadow beside it. A GPU is given more to do at once.
PIECE_BYTES = 256 << 10
GPU_PIECE_BYTES = 64 << 20
#: Threads that share the work of a push wait for the interpreter between two pieces, one for another: on 2 cores and
#: 1 GiB, pieces of 256 KiB took 290 ms, 1 MiB 209, 4 MiB 189.
SHARED_PIECE_BYTES = 4 << 20
#: The digest of the parameters is the hash of the hashes of blocks of so many bytes: several threads can work it out.
BLOCK_BYTES = 8 << 20
#: How many tensors an error names before it counts the rest.
_NAMED_IN_ERRORS = 5


@dataclass(frozen=True, slots=True)
class Feed:
    """What the parameters do to one average.

    out <- shadow - weight * (shadow - param); without a shadow, out <- param.
    sink: given all of the result's bytes, and how many of them are final, as they come; only where ``out`` is host
    memory.
    """

    out: Arena
    shadow: Arena | None
    weight: float
    sink: Callable[[memoryview, int], None] | None = None


class Pass:
    """Feeds averages from a staged push, from its first byte to its last. Thread-safe: one thread at a time works.

    feeds: in order; one whose ``out`` is the push's own memory comes last, for it overwrites the parameters. None: the
    digest alone. check: whether NaN and Inf in a result are an error.
    """

    def __init__(self, staged: Staged, feeds: Sequence[Feed], *, check: bool) -> None:
        self._staged = staged
        self._layout = staged.layout
        self._feeds = feeds
        self._check = check
        self._position = 0
        self._finite = [True] * len(feeds)
        self._results = [_bytes_of(feed.out.tensor) if feed.sink else memoryview(b"") for feed in feeds]
        self._kernels: dict[int, list[Callable[[int, int], bool]]] = {}
        self._digest = _BlockDigest()
        self._lock = threading.Lock()

    def advance(self, received: int) -> None:
        """Work through what is there: the first ``received`` bytes of the parameters."""
        with self._lock:
            piece = PIECE_BYTES if self._staged.device.type == "cpu" else GPU_PIECE_BYTES
            if received < self._layout.param_bytes:
                # Whole pieces until the end, so that what is made of them is whole pages for the disk.
                received -= received % piece
            for index, section, start, stop in self._pieces(self._position, received, piece):
                self._digest.update(self._staged.data[start:stop])
                self._average(index, section, start, stop)
                self._keep(section, stop)
                self._position = stop

    def finish(self) -> bytes:
        """Work through the rest and return the digest (xxh3, 128 bits) of the parameters.

        Raises NonFinite, and what the parameters' memory raises where it was withdrawn (Staged.settle).
        """
        try:
            if self._staged.shared is None:
                self.advance(self._layout.param_bytes)
                digests = self._digest.finish()
            else:
                digests = self._divide(self._staged.shared.helpers)
        finally:
            # Views of the parameters: another process' memory is held no longer than it is read.
            self._kernels.clear()
        self._staged.settle()
        for feed, finite in zip(self._feeds, self._finite, strict=True):
            if not finite:
                raise _refusal(feed.out)
        return xxhash.xxh3_128_digest(b"".join(digests))

    def _divide(self, helpers: Executor) -> list[bytes]:
        """Work through all blocks, of parameters that lie apart from every ``out``: in any order, on many threads."""
        stop = self._layout.param_bytes
        blocks = [(start, min(start + BLOCK_BYTES, stop)) for start in range(0, stop, BLOCK_BYTES)]
        digests = []
        for block, digest in zip(blocks, helpers.map(self._block, blocks), strict=True):
            digests.append(digest)
            for _, section, _, stop in self._pieces(*block, BLOCK_BYTES):
                self._keep(section, stop)
        return digests

    def _block(self, block: tuple[int, int]) -> bytes:
        digest = xxhash.xxh3_128()
        for index, section, start, stop in self._pieces(*block, SHARED_PIECE_BYTES):
            digest.update(self._staged.data[start:stop])
            self._average(index, section, start, stop)
        return digest.digest()

    def _pieces(self, position: int, received: int, piece: int) -> Iterator[tuple[int, Section, int, int]]:
        """The bytes from ``position`` to ``received`` in pieces of whole elements of one section."""
        for index, section in enumerate(self._layout.sections):
            stop = min(received, section.param.stop)
            stop -= (stop - section.param.start) % LAYOUT_DTYPES[section.param_dtype]
            # A part that ends inside an element leaves the sections behind it alone, though their bytes may have come.
            while section.param.start <= position < stop:
                end = min(position + piece, stop)
                yield index, section, position, end
                position = end

    def _average(self, index: int, section: Section, start: int, stop: int) -> None:
        if not self._feeds:
            return
        kernels = self._kernels.get(index) or self._bind(index)
        self._staged.upload(start, stop)
        first, last = _elements(section, start, stop)
        for number, kernel in enumerate(kernels):
            if not kernel(first, last):
                self._finite[number] = False

    def _bind(self, index: int) -> list[Callable[[int, int], bool]]:
        """What feeds each average from one section. Once for a section: its views take longer than a small piece."""
        param = self._staged.param(index)
        kernels = []
        for feed in self._feeds:
            out = feed.out.section(index)
            if feed.shadow is None:
                kernels.append(casting(out, param, check=self._check))
            else:
                kernels.append(averaging(out, feed.shadow.section(index), param, feed.weight, check=self._check))
        self._kernels[index] = kernels
        return kernels

    def _keep(self, section: Section, stop: int) -> None:
        """Tell the sinks how far the results are, while the last of them are in the cache. In order."""
        _, made = _elements(section, section.param.start, stop)
        upto = section.shadow.start + made * LAYOUT_DTYPES[section.shadow_dtype]
        for feed, result in zip(self._feeds, self._results, strict=True):
            if feed.sink:
                feed.sink(result, upto)


class _BlockDigest:
    """The digests of the blocks of a stream, whatever pieces it comes in."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []
        self._block = xxhash.xxh3_128()
        self._room = BLOCK_BYTES

    def update(self, data: memoryview) -> None:
        while len(data) >= self._room:
            self._block.update(data[: self._room])
            data = data[self._room :]
            self._digests.append(self._block.digest())
            self._block, self._room = xxhash.xxh3_128(), BLOCK_BYTES
        self._block.update(data)
        self._room -= len(data)

    def finish(self) -> list[bytes]:
        return self._digests if self._room == BLOCK_BYTES else [*self._digests, self._block.digest()]


def _elements(section: Section, start: int, stop: int) -> tuple[int, int]:
    width = LAYOUT_DTYPES[section.param_dtype]
    return (start - section.param.start) // width, (stop - section.param.start) // width


def _bytes_of(values: Tensor) -> memoryview:
    return values.numpy().data


def _refusal(arena: Arena) -> NonFinite:
    names = arena.non_finite()
    more = f" and {len(names) - _NAMED_IN_ERRORS} more" if len(names) > _NAMED_IN_ERRORS else ""
    return NonFinite(f"NaN or Inf in {', '.join(names[:_NAMED_IN_ERRORS])}{more}")
