"""One pass over the parameters of a push, as they arrive: digest them, average (or cast), look for NaN, digest results.

The pass runs behind the receiving: whatever part of the parameters has come is averaged while the next part is on the
wire, and when the last byte is in, little is left to do. Nothing of the run is touched (the result lies in the
push's own memory), so a push that breaks off or turns out wrong is simply dropped.

Knows staged memory, arenas and the kernel. Does not know sockets, threads, or when a result becomes the run's state.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

from torch import Tensor

from ema_client.errors import NonFinite, listed
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
    finite,
)
from ema_service.memory.arena import Arena, Mark
from ema_service.memory.layout import Section
from ema_service.memory.staging import Staged

__all__ = ["Feed", "Pass"]

#: Parameters are hashed and averaged in pieces of this: what was just received is still in the core's cache (2 MiB),
#: with room for the shadow beside it. A GPU is given more to do at once. A block of the digest is whole pieces.
PIECE_BYTES = 256 << 10
GPU_PIECE_BYTES = BLOCK_BYTES


#: Given bytes in host memory, always the same, and how many of them are final.
Sink = Callable[[memoryview, int], None]


@dataclass(frozen=True, slots=True)
class Feed:
    """What the parameters do to one average.

    out <- shadow - weight * (shadow - param); without a shadow, and in copied sections, out <- param.
    sink: given all of the result's bytes, and how many of them are final, as they come, in host memory. Such a result
    gets its digest.
    """

    out: Arena
    shadow: Arena | None
    weight: float
    sink: Sink | None = None


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


class _Result:
    """A result that someone follows, in host memory."""

    def __init__(self, arena: Arena, sink: Sink, data: Tensor) -> None:
        self.arena = arena
        self._sink = sink
        self._data = data.numpy().data
        self._digest = Digest()
        self._told = 0

    def made(self, upto: int, block: BlockDigest | None = None, *, ended: bool = False) -> None:
        """So many of its bytes are final. block: took in what is made of the block that ``ended``, but for its last
        gulp."""
        if block is None:
            self._digest.update(self._data[self._told : upto])
        elif ended:
            block.end(self._data[upto - GULP_BYTES : upto])
            self._digest.add(block.digest())
        self._told = upto
        self._sink(self._data, upto)

    def finish(self) -> None:
        """All is made: tell the last of it, and let the arena have its digest."""
        self.arena.digest = self._digest.digest()


class _DeviceResult(_Result):
    """A result on a device: copied to the host behind the averaging, and told by a thread as it arrives there.

    twin: that memory. It is nobody else's before everything has arrived: the thread holds this object.
    """

    def __init__(self, arena: Arena, sink: Sink, twin: Tensor, staged: Staged) -> None:
        super().__init__(arena, sink, twin)
        self._twin = twin
        self._mark = staged.mark
        self._followers = staged.followers
        self._copied = 0
        self._under_way = deque[tuple[int, Mark]]()
        self._follower: Future[None] | None = None
        self._lock = threading.Lock()

    def made(self, upto: int, block: BlockDigest | None = None, *, ended: bool = False) -> None:  # noqa: ARG002 - None
        if upto == self._copied:
            return
        piece = slice(self._copied, upto)
        self._twin[piece].copy_(self.arena.tensor[piece], non_blocking=True)
        self._copied = upto
        with self._lock:
            self._under_way.append((upto, self._mark()))
            if len(self._under_way) == 1:
                self._follower = self._followers.submit(self._follow)

    def finish(self) -> None:
        if self._follower:
            self._follower.result()
        super().finish()

    def _follow(self) -> None:
        while True:
            upto, mark = self._under_way[0]
            mark.synchronize()
            super().made(upto)
            with self._lock:
                self._under_way.popleft()
                if not self._under_way:
                    return


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
        #: At each piece as it is made. To a device each look is a wait: there it is one look at the end.
        self._looks = staged.on_host
        #: Bytes of the parameters that are digested, and averaged.
        self._position = self._averaged = 0
        self._finite = [True] * len(feeds)
        self._results = [self._followed(feed.out, feed.sink) if feed.sink else None for feed in feeds]
        self._bound: dict[int, _Bound] = {}
        self._block: _Block | None = None
        self._digest = Digest()
        self._lock = threading.Lock()

    def advance(self, received: int) -> None:
        """Work through what is there: the first ``received`` bytes of the parameters."""
        with self._lock:
            if received < self._layout.param_bytes:
                # Whole pieces until the end, so that what is made of them is whole pages for the disk.
                received -= received % PIECE_BYTES
            for index, section, start, stop in self._pieces(self._position, received, PIECE_BYTES):
                if self._block is None:
                    self._block = self._begin_block(index, section, start)
                if self._staged.on_host:
                    self._take(self._block, index, section, start, stop)
                    self._averaged = stop
                else:
                    self._take_for_device(self._block, index, section, start, stop)
                ended = stop % BLOCK_BYTES == 0 or stop == self._layout.param_bytes
                self._keep(self._block, section, self._averaged, ended=ended)
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
        for feed, as_made in zip(self._feeds, self._finite, strict=True):
            if not (as_made if self._looks else self._is_finite(feed.out)):
                raise _refusal(feed.out)
        for result in self._results:
            if result:
                result.finish()
        return self._digest.digest()

    def _followed(self, out: Arena, sink: Sink) -> _Result:
        if self._staged.on_host:
            return _Result(out, sink, out.tensor)
        return _DeviceResult(out, sink, self._staged.host_twin(out), self._staged)

    def _is_finite(self, out: Arena) -> bool:
        return not self._check or all(finite(out.section(index)) for index in range(len(self._starts)))

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
        if bound.kernels:
            self._staged.upload(start, stop)
        for number, kernel in enumerate(bound.kernels):
            begin = first if number else done
            if begin < last:
                self._note(number, finite=kernel(begin, last))

    def _take_for_device(self, block: _Block, index: int, section: Section, start: int, stop: int) -> None:
        """Digest a piece that is still in the core's cache; average once there is enough for a device."""
        block.params.update(self._staged.data[start:stop])
        if stop % GPU_PIECE_BYTES and stop < section.param.stop:
            return
        bound, begun, self._averaged = self._bind(index), self._averaged, stop
        if bound.kernels:
            self._staged.upload(begun, stop)
        for kernel in bound.kernels:
            kernel(*_elements(section, begun, stop))

    def _note(self, number: int, *, finite: bool) -> None:
        if not finite:
            self._finite[number] = False

    def _bind(self, index: int) -> _Bound:
        """What works on one section. Once for a section: its views take longer than a small piece."""
        if bound := self._bound.get(index):
            return bound
        kernels, digest = [], None
        check = self._check and self._looks
        copied = self._layout.sections[index].copied
        for number, feed in enumerate(self._feeds):
            out, param = feed.out.section(index), self._staged.param(index)
            if feed.shadow is None or copied:
                kernels.append(casting(out, param, check=check))
                continue
            shadow = feed.shadow.section(index)
            kernels.append(averaging(out, shadow, param, feed.weight, check=check))
            if number == 0:
                digest = digesting(out, shadow, param, feed.weight, check=check)
        return self._bound.setdefault(index, _Bound(kernels, digest))

    def _keep(self, block: _Block, section: Section, stop: int, *, ended: bool = False) -> None:
        """Say how far the results are, while the last of them are in the cache, and with the block its digests. In
        order."""
        if ended:
            self._digest.add(block.params.digest())
        _, made = _elements(section, section.param.start, stop)
        upto = section.shadow.start + made * LAYOUT_DTYPES[section.shadow_dtype]
        for number, result in enumerate(self._results):
            if result:
                compiled = block.results if block.results.compiled and number == 0 else None
                result.made(upto, compiled, ended=ended)


def _elements(section: Section, start: int, stop: int) -> tuple[int, int]:
    width = LAYOUT_DTYPES[section.param_dtype]
    return (start - section.param.start) // width, (stop - section.param.start) // width


def _refusal(arena: Arena) -> NonFinite:
    return NonFinite(f"NaN or Inf in {listed(arena.non_finite())}")
