"""One pass over the parameters of a push, as they arrive: digest, average (or cast), look for NaN, digest the results.

The pass runs behind the receiving: parameters that have arrived are averaged while the next are on the wire, so when
the last byte is in, at most one piece is left to average. Results are written to memory of the push alone, so a push
that breaks off or turns out wrong is simply dropped.

A pass is made of *stretches*: runs of whole digest blocks, each worked on by itself, in any order and on any thread. A
``Stretch`` works from its first byte to its last; the ``Pass`` joins what the stretches found, in order of the bytes. A
push that arrives over one connection is one stretch, a push in shared memory one stretch for each block.

Knows staged memory, arenas and the kernel. Does not know sockets, threads, or when a result becomes the run's state.
"""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ema_client.errors import DigestMismatch, NonFinite, Overloaded, listed
from ema_client.protocol import LAYOUT_DTYPES
from ema_service.averaging import (
    BLOCK_BYTES,
    GULP_BYTES,
    NO_DIGEST,
    Accumulators,
    BlockDigest,
    Digest,
    Squares,
    averaging,
    casting,
    digesting,
    finite,
)
from ema_service.memory import Arena, Layout, Staged
from ema_service.memory.arena import overloaded
from ema_service.memory.layout import Section
from ema_service.memory.staging import Region
from ema_service.shadows.results import DeviceResult, Result, Sink, joined
from ema_service.values import Array

__all__ = ["DeviceStretch", "Feed", "Grain", "HostStretch", "Pass", "Stretch", "pass_over"]


_NO_MEMORY = "the push could not be averaged"


@dataclass(frozen=True, slots=True)
class Grain:
    """How many bytes of parameters a pass digests and averages at a time.

    piece: on the host: small enough to be in a cache when it is averaged, large enough for the averaging loop to store
    results past the cache, and for the interpreter to be no part of what a push costs. device_piece: on a device, which
    wants more to do at once. block: of the digest; whole pieces.
    """

    piece: int = 1 << 20
    device_piece: int = BLOCK_BYTES
    block: int = BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Feed:
    """What the parameters of a push do to one average: out <- shadow - weight * (shadow - param).

    Without a shadow, and in copied sections: out <- param. sink: told how far the result is final, with its bytes in
    host memory; only a result with a sink gets a digest.
    """

    out: Arena
    shadow: Arena | None
    weight: float
    sink: Sink | None = None


@dataclass(frozen=True, slots=True)
class _Kernel:
    """What feeds one average in one section: averages a range of elements and says if all results are finite.

    digesting: the same with the digests of parameters and results, None where no such loop is compiled.
    """

    average: Callable[[int, int], bool]
    digesting: Callable[[int, int, Accumulators, Accumulators], bool] | None = None


@dataclass(frozen=True, slots=True)
class _Block:
    """The digests of the block in hand: of its parameters, and of each feed's results where the kernel digests them."""

    params: BlockDigest
    results: list[BlockDigest]


def pass_over(
    staged: Staged, feeds: Sequence[Feed], *, check: bool, measure: bool = False, grain: Grain | None = None
) -> Pass:
    """The pass over a staged push, on the host or on a device.

    feeds: in order; a feed whose ``out`` is the push's own memory comes last, for its results overwrite the parameters.
    Without feeds the pass only digests. check: whether NaN and Inf in a result raise NonFinite. measure: whether the
    first feed's result is measured (Pass.squares).
    """
    return Pass(staged, feeds, check=check, measure=measure, grain=grain or Grain())


class Pass:
    """One pass over a staged push: its stretches, and what joins them. Every byte is in one stretch by finish().

    feeds: the averages that the push feeds.

    stretch() is called by one thread at a time; stretches are worked on by as many threads as there are stretches.
    """

    def __init__(self, staged: Staged, feeds: Sequence[Feed], *, check: bool, measure: bool, grain: Grain) -> None:
        self._staged = staged
        self.feeds = feeds
        self._check = check
        self._measure = measure
        self._grain = grain
        #: Of each feed that is told of: its result in host memory, all bytes.
        self._results = [self._in_host_memory(feed.out) if feed.sink else None for feed in feeds]
        #: By the first byte of each.
        self._stretches: dict[int, Stretch] = {}

    @property
    def seconds(self) -> float:
        """Seconds that digesting and averaging took so far, of all threads together."""
        return sum(stretch.seconds for stretch in self._stretches.values())

    def squares(self) -> npt.NDArray[np.float64] | None:
        """The sums of squares of (result - parameters), parameters and result of the first feed, once the pass is over:
        (tensors, 3), NaN where a tensor is copied; None where nothing was measured."""
        kernels = [each.kernels for each in self._stretches.values()]
        taken = {id(each.squares): each.squares for each in kernels if each.squares}
        if not taken:
            return None
        found = np.zeros((len(self._layout), 3))
        for index, section in enumerate(self._layout.sections):
            for squares in taken.values():
                if section.copied:
                    found[section.tensors] = np.nan
                elif index in squares:
                    found[section.tensors] += squares[index].total()
        return found

    @property
    def _layout(self) -> Layout:
        return self._staged.layout

    def stretch(self, start: int, stop: int) -> Stretch:
        """Begin a stretch, bytes ``start`` to ``stop`` of the parameters: whole blocks of the digest, the layout's last
        may be shorter.

        In place of the stretch that began there and broke off: nobody may be working on that one any more.
        """
        self.forget(start)
        region = self._staged.region(start, stop)
        return self._begin(region, self._kernels(region), self._grain.piece)

    def block(self, start: int, beside: Stretch | None = None) -> Stretch:
        """Begin the stretch that is one block, by its first byte; where it was begun, the one that was.

        Any thread may ask, and finish the stretch. beside: of another block, with which this one is measured: both are
        forgotten, or neither.
        """
        kernels = beside.kernels if beside else self._kernels(self._staged.region())
        return self._block(start, kernels, self._grain.piece)

    def forget(self, start: int) -> None:
        """Forget the stretch that begins at byte ``start``: other parameters come, or the same once more. Returns once
        nobody works on it."""
        if old := self._stretches.pop(start, None):
            old.drop()

    def advance(self, received: int) -> None:
        """As Stretch.advance(), of a push that is one stretch."""
        self._only().advance(received)

    def finish(self) -> bytes:
        """Digest and average the rest. Returns the digest of the parameters (averaging.Digest, 16 bytes).

        Raises DigestMismatch where the parameters are not those that were sent (Staged.expected); NonFinite; Overloaded
        where the device has no memory for the work; SegmentUnusable where the parameters lay in a client's memory and
        were withdrawn (Staged.settle).
        """
        with overloaded(_NO_MEMORY):
            stretches = self._worked_off()
            self._staged.settle()
            digest = Digest(self._grain.block)
            for block in (block for stretch in stretches for block in stretch.blocks):
                digest.add(block)
            if self._staged.expected not in (None, digest.digest()):
                # Before anything else is said of them: a flipped bit may have made a NaN, and none was sent.
                raise DigestMismatch("the parameters that arrived are not those that were sent: their digests differ")
            for number, feed in enumerate(self.feeds):
                if self._check and not self._is_finite(number, feed.out):
                    raise NonFinite(f"NaN or Inf in {listed(feed.out.non_finite())}")
            self._join_results(stretches)
            return digest.digest()

    def _worked_off(self) -> list[Stretch]:
        """All stretches, from the first byte to the last, once everything is averaged."""
        try:
            if self._staged.helpers is not None:
                self._divide(self._staged.helpers)
            elif not self._stretches:
                self._only()
            stretches = self._in_order()
            for stretch in stretches:
                stretch.finish()
        finally:
            # The kernels hold views of the parameters, which may lie in a client's memory: freed as soon as nobody
            # reads it.
            for stretch in self._stretches.values():
                stretch.kernels.clear()
        return stretches

    def _join_results(self, stretches: list[Stretch]) -> None:
        """Give each average that somebody follows the digest of its result."""
        for number, data in enumerate(self._results):
            if data is not None:
                told = [result for stretch in stretches if (result := stretch.results[number])]
                self.feeds[number].out.digest = joined(data, told, self._grain.block)

    # --- stretches ---------------------------------------------------------------------------------------------------

    def _only(self) -> Stretch:
        """The stretch of a push that is one."""
        return self._stretches.get(0) or self.stretch(0, self._layout.param_bytes)

    def _begin(self, region: Region, kernels: _Kernels, piece: int) -> Stretch:
        results = [
            self._result(number, region) if result is not None else None for number, result in enumerate(self._results)
        ]
        kind = HostStretch if self._staged.on_host else DeviceStretch
        return self._stretches.setdefault(
            region.start, kind(self._layout, region, kernels, results, self._grain, piece)
        )

    def _in_order(self) -> list[Stretch]:
        """All stretches, from the first byte to the last. Raises Overloaded where one of them was never begun."""
        stretches, reached = [self._stretches[start] for start in sorted(self._stretches)], 0
        for stretch in stretches:
            if stretch.start != reached:
                break
            reached = stretch.stop
        if reached != self._layout.param_bytes:
            raise Overloaded(f"{_NO_MEMORY}, or broke off", retry_after=1.0)
        return stretches

    def _divide(self, helpers: Executor) -> None:
        """Digest and average each block as a stretch of its own, on many threads: the parameters of each lie apart from
        the results of every other."""
        kernels = self._kernels(self._staged.region())

        def alone(start: int) -> int:
            # The block is averaged in one piece if possible: between two pieces, threads wait for one another at the
            # interpreter lock.
            block = self._block(start, kernels, self._grain.block)
            block.finish()
            return block.stop

        for averaged in helpers.map(alone, range(0, self._layout.param_bytes, self._grain.block)):
            self._staged.passed(averaged)

    def _block(self, start: int, kernels: _Kernels, piece: int) -> Stretch:
        """The stretch of one block, begun unless it was. kernels: of other blocks, to share what can be shared."""
        if found := self._stretches.get(start):
            return found
        size = self._grain.block
        region = self._staged.region(start, min(start + size, self._layout.param_bytes))
        in_one_place = self._staged.adopted is not None or self._layout.param_bytes == self._layout.shadow_bytes
        if not in_one_place:
            kernels = self._kernels(region, kernels.squares)
        return self._begin(region, kernels, piece)

    def _kernels(self, region: Region, squares: dict[int, Squares] | None = None) -> _Kernels:
        """The kernels of a region. squares: where other regions are measured too, to be measured together."""
        if squares is None and self._measure:
            squares = {}
        check = self._check and self._staged.on_host
        return _Kernels(self._layout, self.feeds, region, check=check, squares=squares)

    # --- what memory of the host and of a device differ in -----------------------------------------------------------

    def _in_host_memory(self, out: Arena) -> Array:
        return out.host if self._staged.on_host else self._staged.host_twin(out)

    def _result(self, number: int, region: Region) -> Result:
        """The Result that tells the sink of a feed about a stretch."""
        feed, data, block = self.feeds[number], self._results[number], self._grain.block
        if feed.sink is None or data is None:
            raise RuntimeError("a feed without a sink has no result to tell of")
        start, stop = self._layout.shadow_at(region.start), self._layout.shadow_at(region.stop)
        if self._staged.on_host:
            return Result(feed.sink, data, start, stop, block)
        return DeviceResult(feed.sink, data, start, stop, block, feed.out, self._staged)

    def _is_finite(self, number: int, out: Arena) -> bool:
        """Whether the result of a feed has no NaN and no Inf, now that everything is averaged."""
        if self._staged.on_host:
            return all(stretch.finite[number] for stretch in self._stretches.values())
        # Asking a device waits for the device: asked once, at the end of the pass.
        return all(finite(out.section(index)) for index in range(len(self._layout.sections)))


class _Kernels:
    """The kernels of each section, made once: making their views takes longer than averaging a small piece.

    region: where the parameters lie. check: whether the kernels look for NaN and Inf as they average. squares: by
    section, what is measured of the first feed; None where nothing is.
    """

    def __init__(
        self,
        layout: Layout,
        feeds: Sequence[Feed],
        region: Region,
        *,
        check: bool,
        squares: dict[int, Squares] | None,
    ) -> None:
        self.squares = squares
        self._layout = layout
        self._feeds = feeds
        self._region = region
        self._check = check
        self._bound: dict[int, list[_Kernel]] = {}

    def of(self, index: int) -> list[_Kernel]:
        """The kernels of one section, one for each feed."""
        if bound := self._bound.get(index):
            return bound
        return self._bound.setdefault(index, [self._kernel(number, index) for number in range(len(self._feeds))])

    def clear(self) -> None:
        """Let go of the views of all memory."""
        self._bound.clear()

    def _kernel(self, number: int, index: int) -> _Kernel:
        feed = self._feeds[number]
        out, param = feed.out.section(index), self._region.param(index)
        if feed.shadow is None or self._layout.sections[index].copied:
            return _Kernel(casting(out, param, check=self._check))
        inputs = out, feed.shadow.section(index), param, feed.weight
        squares = self._squares_of(index) if number == 0 else None
        averaged = averaging(*inputs, check=self._check, squares=squares)
        return _Kernel(averaged, digesting(*inputs, check=self._check, squares=squares))

    def _squares_of(self, index: int) -> Squares | None:
        """Where the first feed's squares in a section are added; None where they are not wanted."""
        return None if self.squares is None else self.squares.setdefault(index, Squares(self._layout.ends[index]))


class Stretch(ABC):
    """The work on one stretch of the parameters, from its first byte to its last.

    Thread-safe: while one thread works, others wait. start, stop: bytes of the parameters. blocks: the digests of its
    blocks so far. results: of each feed, told as results become final; None where nobody follows. finite: of each feed,
    whether the kernels met neither NaN nor Inf. seconds: that digesting and averaging took so far.

    More than a dozen attributes: what is worked with, what was found, and how far each part of the work has come.
    """

    def __init__(
        self,
        layout: Layout,
        region: Region,
        kernels: _Kernels,
        results: list[Result | None],
        grain: Grain,
        piece: int,
    ) -> None:
        self.start, self.stop = region.start, region.stop
        self.blocks: list[bytes] = []
        self.kernels = kernels
        self.results = results
        self.finite = [True] * len(results)
        self.seconds = 0.0
        self._layout = layout
        self._region = region
        self._grain = grain
        self._piece = piece
        #: Bytes of the parameters that are digested so far, counted from the push's first.
        self._position = region.start
        self._block: _Block | None = None
        self._lock = threading.Lock()
        #: Whether a piece was begun and not ended: the stretch has no result then.
        self._broke_off = False

    @property
    def data(self) -> memoryview:
        """The host memory that the stretch's parameters are received into."""
        return self._region.data

    def advance(self, received: int) -> None:
        """Digest the parameters that have arrived, up to byte ``received`` of the push, and average as much as pays.

        Raises Overloaded where the device has no memory for the work, at every call from then on.
        """
        if received < self.stop:
            # Whole pieces until the end, so that sinks write whole pages of the disk.
            received -= received % self._piece
            if received <= self._position and not self._broke_off:
                return
        with self._lock, self._whole():
            for index, section, start, stop in self._pieces(self._position, received):
                if self._block is None:
                    self._block = self._begin_block(index, section, start)
                averaged = self._take(self._block, index, section, start, stop)
                ended = stop % self._grain.block == 0 or stop == self.stop
                self._tell(self._block, section, averaged, ended=ended)
                if ended:
                    self._block = None
                self._position = stop

    def finish(self) -> None:
        """Digest and average the rest, and wait until whoever follows has been told. Raises as advance()."""
        self.advance(self.stop)
        for result in self.results:
            if result:
                result.settle()

    def digest(self) -> bytes:
        """The digest of the stretch's parameters, as of a push of these bytes alone, once finished (16 bytes)."""
        digest = Digest(self._grain.block)
        for block in self.blocks:
            digest.add(block)
        return digest.digest()

    def drop(self) -> None:
        """Return once nobody works on the stretch or follows its results; others work on these bytes from now on."""
        with self._lock:
            self._broke_off = True
        for result in self.results:
            if result:
                result.settle()
                result.undo()

    @abstractmethod
    def _take(self, block: _Block, index: int, section: Section, start: int, stop: int) -> int:
        """Digest one piece and average as much as pays. Returns how many bytes of the parameters are averaged by
        then."""

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Work on pieces that is all done, or the stretch is over: a piece begun twice would be averaged twice."""
        if self._broke_off:
            raise Overloaded(f"{_NO_MEMORY}, or broke off", retry_after=1.0)
        self._broke_off, begun = True, time.perf_counter()
        with overloaded(_NO_MEMORY):
            yield
        self._broke_off = False
        self.seconds += time.perf_counter() - begun

    # --- pieces and blocks -------------------------------------------------------------------------------------------

    def _pieces(self, position: int, received: int) -> Iterator[tuple[int, Section, int, int]]:
        """Cut the bytes ``position`` to ``received`` into pieces of whole elements of one section: (index, section,
        start, stop).

        Pieces end where a multiple of the piece's size ends, so no piece lies in two blocks.
        """
        sections, piece = self._layout.sections, self._piece
        for index in range(bisect_right(sections, position, key=lambda each: each.param.start) - 1, len(sections)):
            section = sections[index]
            if section.param.start >= received:
                return
            stop = min(received, section.param.stop)
            stop -= (stop - section.param.start) % LAYOUT_DTYPES[section.param_dtype]
            # Received bytes that end inside an element leave ``position`` before it: the sections behind are not begun.
            while section.param.start <= position < stop:
                end = min(position + piece - position % piece, stop)
                yield index, section, position, end
                position = end

    def _begin_block(self, index: int, section: Section, start: int) -> _Block:
        """The digests of a block that begins at ``start``.

        The kernel digests blocks that are whole and of one section; the library digests the others.
        """
        size = self._grain.block
        whole = start + size <= section.param.stop
        same = section.param.start == section.shadow.start and section.param_dtype == section.shadow_dtype
        loops = [whole and kernel.digesting is not None for kernel in self.kernels.of(index)]
        results = [loop and same and result is not None for loop, result in zip(loops, self.results, strict=True)]
        return _Block(
            BlockDigest(size, compiled=loops[:1] == [True]),
            [BlockDigest(size, compiled=compiled) for compiled in results],
        )

    def _tell(self, block: _Block, section: Section, stop: int, *, ended: bool = False) -> None:
        """Tell the sinks how far results are final, while the last results are in the cache. In order of the bytes.

        stop: bytes of the parameters that are averaged. ended: the block ends there, so its digests are complete.
        """
        if ended:
            self.blocks.append(block.params.digest())
        _, made = _elements(section, section.param.start, stop)
        upto = section.shadow.start + made * LAYOUT_DTYPES[section.shadow_dtype]
        for result, digest in zip(self.results, block.results, strict=True):
            if result:
                result.made(upto, digest if digest.compiled else None, ended=ended)


class HostStretch(Stretch):
    """A stretch in host memory: each piece is digested and averaged while the piece is in the core's cache."""

    def _take(self, block: _Block, index: int, section: Section, start: int, stop: int) -> int:
        data = self._region.bytes(start, stop)
        first, last = _elements(section, start, stop)
        # Kernels that digest stop before a block's last gulp, which XXH3 treats differently (BlockDigest.end).
        gulps = last
        if stop % self._grain.block == 0:
            gulps -= GULP_BYTES // LAYOUT_DTYPES[section.param_dtype]
        if not block.params.compiled:
            block.params.update(data)
        for number, kernel in enumerate(self.kernels.of(index)):
            # The first kernel takes the parameters, before the last result overwrites them.
            params = block.params.accumulators if number == 0 else NO_DIGEST
            results, done = block.results[number].accumulators, first
            if kernel.digesting and (params.count or results.count):
                self._note(number, finite=kernel.digesting(first, gulps, params, results))
                done = gulps
            if params.count and gulps < last:
                block.params.end(data[-GULP_BYTES:])
            if done < last:
                self._note(number, finite=kernel.average(done, last))
        return stop

    def _note(self, number: int, *, finite: bool) -> None:
        """Remember a piece whose results are not all finite."""
        if not finite:
            self.finite[number] = False


class DeviceStretch(Stretch):
    """A stretch on a device: pieces are digested on the host; enough of them together are uploaded and averaged."""

    #: Bytes of the parameters that the device was told to average so far, counted from the push's first.
    _averaged = -1

    def _take(self, block: _Block, index: int, section: Section, start: int, stop: int) -> int:
        averaged = max(self._averaged, self.start)
        block.params.update(self._region.bytes(start, stop))
        if stop % self._grain.device_piece and stop < min(section.param.stop, self.stop):
            return averaged
        self._average(index, section, averaged, stop)
        self._averaged = stop
        return stop

    def _average(self, index: int, section: Section, start: int, stop: int) -> None:
        """Tell the device to fetch and average bytes ``start`` to ``stop``, which lie in one section. Does not wait."""
        kernels = self.kernels.of(index)
        if kernels:
            self._region.upload(start, stop)
        for kernel in kernels:
            kernel.average(*_elements(section, start, stop))


def _elements(section: Section, start: int, stop: int) -> tuple[int, int]:
    """Bytes ``start`` to ``stop`` of the parameters as a range of a section's elements."""
    width = LAYOUT_DTYPES[section.param_dtype]
    return (start - section.param.start) // width, (stop - section.param.start) // width
