"""One pass over the parameters of a push, as they arrive: digest them, average (or cast), look for NaN, digest results.

The pass runs behind the receiving: whatever part of the parameters has come is averaged while the next part is on the
wire, and when the last byte is in, little is left to do. Nothing of the run is touched (the result lies in the
push's own memory), so a push that breaks off or turns out wrong is simply dropped.

Knows staged memory, arenas and the kernel. Does not know sockets, threads, or when a result becomes the run's state.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from torch import Tensor

from ema_client.errors import NonFinite
from ema_client.protocol import LAYOUT_DTYPES
from ema_service.averaging import (
    BLOCK_BYTES,
    GULP_BYTES,
    Accumulators,
    BlockDigest,
    Digest,
    averaging,
    casting,
    digesting,
)
from ema_service.runs.arena import Arena
from ema_service.runs.layout import Section
from ema_service.runs.staging import Staged

__all__ = ["Feed", "Pass"]

#: Parameters are hashed and averaged in pieces of this: what was just received is still in the core's cache (2 MiB),
#: with room for the shadow beside it. A GPU is given more to do at once. A block of the digest is whole pieces.
PIECE_BYTES = 256 << 10
GPU_PIECE_BYTES = BLOCK_BYTES
#: How many tensors an error names before it counts the rest.
_NAMED_IN_ERRORS = 5


@dataclass(frozen=True, slots=True)
class Feed:
    """What the parameters do to one average.

    out <- shadow - weight * (shadow - param); without a shadow, and in copied sections, out <- param.
    sink: given all of the result's bytes, and how many of them are final, as they come; only where ``out`` is host
    memory. Such a result gets its digest.
    """

    out: Arena
    shadow: Arena | None
    weight: float
    sink: Callable[[memoryview, int], None] | None = None


@dataclass(frozen=True, slots=True)
class _Bound:
    """What feeds each average from one section, given the elements to take; and the first of them with the digest
    worked out in the same reading, where there is such a loop."""

    kernels: list[Callable[[int, int], bool]]
    digesting: Callable[[int, int, Accumulators, Accumulators], bool] | None


@dataclass(frozen=True, slots=True)
class _Block:
    """A block of the parameters at work. results: of the first average; compiled where they are the same bytes of it
    and someone follows it, else nothing of them is taken in here."""

    params: BlockDigest
    results: BlockDigest


@dataclass(slots=True)
class _Result:
    """A result that someone follows. made: how many of its bytes are final."""

    arena: Arena
    sink: Callable[[memoryview, int], None]
    data: memoryview
    digest: Digest = field(default_factory=Digest)
    made: int = 0


class Pass:
    """Feeds averages from a staged push, from its first byte to its last. Thread-safe: one thread at a time works.

    feeds: in order; one whose ``out`` is the push's own memory comes last, for it overwrites the parameters. None: the
    digest alone. check: whether NaN and Inf in a result are an error.
    """

    def __init__(self, staged: Staged, feeds: Sequence[Feed], *, check: bool) -> None:
        self._staged = staged
        self._layout = staged.layout
        self._starts = [section.param.start for section in self._layout.sections]
        self._feeds = feeds
        self._check = check
        self._position = 0
        self._finite = [True] * len(feeds)
        self._results = [
            _Result(feed.out, feed.sink, _bytes_of(feed.out.tensor)) if feed.sink else None for feed in feeds
        ]
        self._bound: dict[int, _Bound] = {}
        self._block: _Block | None = None
        self._digest = Digest()
        self._lock = threading.Lock()

    def advance(self, received: int) -> None:
        """Work through what is there: the first ``received`` bytes of the parameters."""
        with self._lock:
            piece = PIECE_BYTES if self._staged.device.type == "cpu" else GPU_PIECE_BYTES
            if received < self._layout.param_bytes:
                # Whole pieces until the end, so that what is made of them is whole pages for the disk.
                received -= received % piece
            for index, section, start, stop in self._pieces(self._position, received, piece):
                if self._block is None:
                    self._block = self._begin_block(index, section, start)
                self._take(self._block, index, section, start, stop)
                ended = stop % BLOCK_BYTES == 0 or stop == self._layout.param_bytes
                self._keep(self._block, section, stop, ended=ended)
                if ended:
                    self._block = None
                self._position = stop

    def finish(self) -> bytes:
        """Work through the rest and return the digest (xxh3, 128 bits) of the parameters.

        Raises NonFinite, and what the parameters' memory raises where it was withdrawn (Staged.settle).
        """
        try:
            if self._staged.shared is None:
                self.advance(self._layout.param_bytes)
            else:
                self._divide(self._staged.shared.helpers)
        finally:
            # Views of the parameters: another process' memory is held no longer than it is read.
            self._bound.clear()
        self._staged.settle()
        for feed, finite in zip(self._feeds, self._finite, strict=True):
            if not finite:
                raise _refusal(feed.out)
        for result in self._results:
            if result:
                result.arena.digest = result.digest.digest()
        return self._digest.digest()

    def _divide(self, helpers: Executor) -> None:
        """Work through all blocks, of parameters that lie apart from every ``out``: in any order, on many threads."""
        stop = self._layout.param_bytes
        blocks = [(start, min(start + BLOCK_BYTES, stop)) for start in range(0, stop, BLOCK_BYTES)]
        for bounds, block in zip(blocks, helpers.map(self._divided, blocks), strict=True):
            for _, section, _, end in self._pieces(*bounds, BLOCK_BYTES):
                self._keep(block, section, end, ended=end == bounds[1])

    def _divided(self, bounds: tuple[int, int]) -> _Block:
        # In one piece where that can be: threads wait for the interpreter between two, one for another.
        pieces = list(self._pieces(*bounds, BLOCK_BYTES))
        block = self._begin_block(*pieces[0][:3])
        for piece in pieces:
            self._take(block, *piece)
        return block

    def _pieces(self, position: int, received: int, piece: int) -> Iterator[tuple[int, Section, int, int]]:
        """The bytes from ``position`` to ``received`` in pieces of whole elements of one section, cut where all bytes
        from the first on would be: no piece lies in two blocks."""
        for index in range(bisect_right(self._starts, position) - 1, len(self._starts)):
            section = self._layout.sections[index]
            if section.param.start >= received:
                return
            stop = min(received, section.param.stop)
            stop -= (stop - section.param.start) % LAYOUT_DTYPES[section.param_dtype]
            # A part that ends inside an element leaves the sections behind it alone, though their bytes may have come.
            while section.param.start <= position < stop:
                end = min(position + piece - position % piece, stop)
                yield index, section, position, end
                position = end

    def _begin_block(self, index: int, section: Section, start: int) -> _Block:
        """The averaging works out digests of blocks that are whole and of one section; the library does the rest."""
        compiled = start + BLOCK_BYTES <= section.param.stop and self._bind(index).digesting is not None
        same = section.param.start == section.shadow.start and section.param_dtype == section.shadow_dtype
        results = compiled and same and self._results[0] is not None
        return _Block(BlockDigest(compiled=compiled), BlockDigest(compiled=results))

    def _take(self, block: _Block, index: int, section: Section, start: int, stop: int) -> None:
        """Digest and average one piece."""
        data, bound = self._staged.data[start:stop], self._bind(index)
        first, last = _elements(section, start, stop)
        done = first
        if bound.kernels:
            self._staged.upload(start, stop)
        if bound.digesting and block.params.compiled:
            done = last
            if stop % BLOCK_BYTES == 0:
                done -= GULP_BYTES // LAYOUT_DTYPES[section.param_dtype]
            accumulators = block.params.accumulators, block.results.accumulators
            self._note(0, finite=bound.digesting(first, done, *accumulators))
            if done < last:
                block.params.end(data[-GULP_BYTES:])
        else:
            block.params.update(data)
        for number, kernel in enumerate(bound.kernels):
            begin = first if number else done
            if begin < last:
                self._note(number, finite=kernel(begin, last))

    def _note(self, number: int, *, finite: bool) -> None:
        if not finite:
            self._finite[number] = False

    def _bind(self, index: int) -> _Bound:
        """What works on one section. Once for a section: its views take longer than a small piece."""
        if bound := self._bound.get(index):
            return bound
        kernels, digest = [], None
        copied = self._layout.sections[index].copied
        for number, feed in enumerate(self._feeds):
            out, param = feed.out.section(index), self._staged.param(index)
            if feed.shadow is None or copied:
                kernels.append(casting(out, param, check=self._check))
                continue
            shadow = feed.shadow.section(index)
            kernels.append(averaging(out, shadow, param, feed.weight, check=self._check))
            if number == 0:
                digest = digesting(out, shadow, param, feed.weight, check=self._check)
        return self._bound.setdefault(index, _Bound(kernels, digest))

    def _keep(self, block: _Block, section: Section, stop: int, *, ended: bool = False) -> None:
        """Say how far the results are, while the last of them are in the cache, and with the block its digests. In
        order."""
        if ended:
            self._digest.add(block.params.digest())
        _, made = _elements(section, section.param.start, stop)
        upto = section.shadow.start + made * LAYOUT_DTYPES[section.shadow_dtype]
        for result in self._results:
            if result is None:
                continue
            if not block.results.compiled or result is not self._results[0]:
                result.digest.update(result.data[result.made : upto])
            elif ended:
                block.results.end(result.data[upto - GULP_BYTES : upto])
                result.digest.add(block.results.digest())
            result.made = upto
            result.sink(result.data, upto)


def _elements(section: Section, start: int, stop: int) -> tuple[int, int]:
    width = LAYOUT_DTYPES[section.param_dtype]
    return (start - section.param.start) // width, (stop - section.param.start) // width


def _bytes_of(values: Tensor) -> memoryview:
    return values.numpy().data


def _refusal(arena: Arena) -> NonFinite:
    names = arena.non_finite()
    more = f" and {len(names) - _NAMED_IN_ERRORS} more" if len(names) > _NAMED_IN_ERRORS else ""
    return NonFinite(f"NaN or Inf in {', '.join(names[:_NAMED_IN_ERRORS])}{more}")
