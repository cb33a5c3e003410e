"""One pass over the parameters of a push, as they arrive: digest, average (or cast), look for NaN, digest the results.

The pass runs behind the receiving: parameters that have arrived are averaged while the next are on the wire, so when
the last byte is in, at most one piece is left to average. Results are written to memory of the push alone, so a push
that breaks off or turns out wrong is simply dropped.

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
from ema_service.shadows.results import DeviceResult, Result, Sink

__all__ = ["DevicePass", "Feed", "Grain", "HostPass", "Pass", "pass_over"]


_NO_MEMORY = "the push could not be averaged"


@dataclass(frozen=True, slots=True)
class Grain:
    """How many bytes of parameters a pass digests and averages at a time.

    piece: on the host, where a piece just received is still in the core's cache (2 MiB), with room for the shadow
    beside it. device_piece: on a device, which wants more to do at once. block: of the digest; whole pieces.
    """

    piece: int = 256 << 10
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
    kind = HostPass if staged.on_host else DevicePass
    return kind(staged, feeds, check=check, measure=measure, grain=grain or Grain())


class Pass(ABC):
    """One pass over a staged push, which feeds averages from the first byte of the parameters to the last.

    Thread-safe: while one thread works, others wait.

    More than a dozen attributes: what a push brings, and how far each part of the work has come.
    """

    def __init__(self, staged: Staged, feeds: Sequence[Feed], *, check: bool, measure: bool, grain: Grain) -> None:
        self._staged = staged
        self._feeds = feeds
        self._check = check
        self._grain = grain
        #: Bytes of the parameters that are digested so far.
        self._position = 0
        self._results = [self._result(feed.out, feed.sink) if feed.sink else None for feed in feeds]
        self._bound: dict[int, list[_Kernel]] = {}
        self._block: _Block | None = None
        self._digest = Digest(grain.block)
        self._lock = threading.Lock()
        #: Whether a piece was begun and not ended: the pass has no result then.
        self._broke_off = False
        #: Seconds that digesting and averaging took so far.
        self.seconds = 0.0
        #: Of the first feed, by section; None where nothing is measured.
        self._squares: dict[int, Squares] | None = {} if measure else None

    def squares(self) -> npt.NDArray[np.float64] | None:
        """The sums of squares of (result - parameters), parameters and result of the first feed, once the pass is over:
        (tensors, 3), NaN where a tensor is copied; None where nothing was measured."""
        if not self._squares:
            return None
        found = np.zeros((len(self._layout), 3))
        for index, section in enumerate(self._layout.sections):
            if section.copied:
                found[section.tensors] = np.nan
            elif index in self._squares:
                found[section.tensors] = self._squares[index].total()
        return found

    @property
    def _layout(self) -> Layout:
        return self._staged.layout

    def advance(self, received: int) -> None:
        """Digest the parameters that have arrived, the first ``received`` bytes, and average as much as pays.

        Raises Overloaded where the device has no memory for the work, at every call from then on.
        """
        with self._lock, self._whole():
            if received < self._layout.param_bytes:
                # Whole pieces until the end, so that sinks write whole pages of the disk.
                received -= received % self._grain.piece
            for index, section, start, stop in self._pieces(self._position, received, self._grain.piece):
                if self._block is None:
                    self._block = self._begin_block(index, section, start)
                averaged = self._take(self._block, index, section, start, stop)
                ended = stop % self._grain.block == 0 or stop == self._layout.param_bytes
                self._tell(self._block, section, averaged, ended=ended)
                if ended:
                    self._block = None
                self._position = stop

    def finish(self) -> bytes:
        """Digest and average the rest. Returns the digest of the parameters (averaging.Digest, 16 bytes).

        Raises DigestMismatch where the parameters are not those that were sent (Staged.expected); NonFinite; Overloaded
        where the device has no memory for the work; SegmentUnusable where the parameters lay in a client's memory and
        were withdrawn (Staged.settle).
        """
        with overloaded(_NO_MEMORY):
            return self._finish()

    def _finish(self) -> bytes:
        try:
            if self._staged.shared is None:
                self.advance(self._layout.param_bytes)
            else:
                with self._whole():
                    self._divide(self._staged.shared.helpers)
        finally:
            # The kernels hold views of the parameters, which may lie in a client's memory: freed as soon as nobody
            # reads it.
            self._bound.clear()
        self._staged.settle()
        digest = self._digest.digest()
        if self._staged.expected not in (None, digest):
            # Before anything else is said of them: a flipped bit may have made a NaN, and none was sent.
            raise DigestMismatch("the parameters that arrived are not those that were sent: their digests differ")
        for number, feed in enumerate(self._feeds):
            if self._check and not self._is_finite(number, feed.out):
                raise NonFinite(f"NaN or Inf in {listed(feed.out.non_finite())}")
        for result in self._results:
            if result:
                result.finish()
        return digest

    # --- what memory of the host and of a device differ in -----------------------------------------------------------

    #: Whether the kernels look for NaN and Inf as they average.
    _checks_pieces: bool

    @abstractmethod
    def _result(self, out: Arena, sink: Sink) -> Result:
        """The Result that tells ``sink`` of an average: of memory of the host, or copied back from a device."""

    @abstractmethod
    def _take(self, block: _Block, index: int, section: Section, start: int, stop: int) -> int:
        """Digest one piece and average as much as pays. Returns how many bytes of the parameters are averaged by
        then."""

    @abstractmethod
    def _take_alone(self, block: _Block, index: int, section: Section, start: int, stop: int) -> object:
        """Digest and average one piece of the parameters, in any order of pieces. Many threads do so at once."""

    @abstractmethod
    def _is_finite(self, number: int, out: Arena) -> bool:
        """Whether the result of a feed has no NaN and no Inf, now that everything is averaged."""

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Work on pieces that is all done, or the pass is over: a piece begun twice would be averaged twice."""
        if self._broke_off:
            raise Overloaded(f"{_NO_MEMORY}, or broke off", retry_after=1.0)
        self._broke_off, begun = True, time.perf_counter()
        with overloaded(_NO_MEMORY):
            yield
        self._broke_off = False
        self.seconds += time.perf_counter() - begun

    # --- pieces, blocks and kernels ----------------------------------------------------------------------------------

    def _divide(self, helpers: Executor) -> None:
        """Digest and average all blocks in any order, on many threads: the parameters lie apart from every ``out``."""
        stop, size = self._layout.param_bytes, self._grain.block
        blocks = [(start, min(start + size, stop)) for start in range(0, stop, size)]
        for bounds, block in zip(blocks, helpers.map(self._divided, blocks), strict=True):
            for _, section, _, end in self._pieces(*bounds, size):
                self._tell(block, section, end, ended=end == bounds[1])
            self._staged.passed(bounds[1])

    def _divided(self, bounds: tuple[int, int]) -> _Block:
        """Digest and average one block, on one thread."""
        # The block is averaged in one piece if possible: between two pieces, threads wait for one another at the
        # interpreter lock.
        pieces = list(self._pieces(*bounds, self._grain.block))
        block = self._begin_block(*pieces[0][:3])
        for piece in pieces:
            self._take_alone(block, *piece)
        return block

    def _pieces(self, position: int, received: int, piece: int) -> Iterator[tuple[int, Section, int, int]]:
        """Cut the bytes ``position`` to ``received`` into pieces of whole elements of one section: (index, section,
        start, stop).

        Pieces end where a multiple of ``piece`` bytes ends, so no piece lies in two blocks.
        """
        sections = self._layout.sections
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
        loops = [whole and kernel.digesting is not None for kernel in self._bind(index)]
        results = [loop and same and result is not None for loop, result in zip(loops, self._results, strict=True)]
        return _Block(
            BlockDigest(size, compiled=loops[:1] == [True]),
            [BlockDigest(size, compiled=compiled) for compiled in results],
        )

    def _bind(self, index: int) -> list[_Kernel]:
        """The kernels of one section, made once: making their views takes longer than averaging a small piece."""
        if bound := self._bound.get(index):
            return bound
        kernels = []
        check = self._check and self._checks_pieces
        copied = self._layout.sections[index].copied
        for number, feed in enumerate(self._feeds):
            out, param = feed.out.section(index), self._staged.param(index)
            if feed.shadow is None or copied:
                kernels.append(_Kernel(casting(out, param, check=check)))
                continue
            inputs = out, feed.shadow.section(index), param, feed.weight
            squares = self._squares_of(index) if number == 0 else None
            averaged = averaging(*inputs, check=check, squares=squares)
            kernels.append(_Kernel(averaged, digesting(*inputs, check=check, squares=squares)))
        return self._bound.setdefault(index, kernels)

    def _squares_of(self, index: int) -> Squares | None:
        """Where the first feed's squares in a section are added; None where they are not wanted."""
        return None if self._squares is None else self._squares.setdefault(index, Squares(self._layout.ends[index]))

    def _tell(self, block: _Block, section: Section, stop: int, *, ended: bool = False) -> None:
        """Tell the sinks how far results are final, while the last results are in the cache. In order of the bytes.

        stop: bytes of the parameters that are averaged. ended: the block ends there, so its digests are complete.
        """
        if ended:
            self._digest.add(block.params.digest())
        _, made = _elements(section, section.param.start, stop)
        upto = section.shadow.start + made * LAYOUT_DTYPES[section.shadow_dtype]
        for result, digest in zip(self._results, block.results, strict=True):
            if result:
                result.made(upto, digest if digest.compiled else None, ended=ended)


class HostPass(Pass):
    """A pass in host memory: each piece is digested and averaged while the piece is in the core's cache."""

    _checks_pieces = True

    def __init__(self, staged: Staged, feeds: Sequence[Feed], *, check: bool, measure: bool, grain: Grain) -> None:
        super().__init__(staged, feeds, check=check, measure=measure, grain=grain)
        self._finite = [True] * len(feeds)

    def _result(self, out: Arena, sink: Sink) -> Result:
        return Result(out, sink, out.host, self._grain.block)

    def _take(self, block: _Block, index: int, section: Section, start: int, stop: int) -> int:
        data = self._staged.data[start:stop]
        first, last = _elements(section, start, stop)
        # Kernels that digest stop before a block's last gulp, which XXH3 treats differently (BlockDigest.end).
        gulps = last
        if stop % self._grain.block == 0:
            gulps -= GULP_BYTES // LAYOUT_DTYPES[section.param_dtype]
        if not block.params.compiled:
            block.params.update(data)
        for number, kernel in enumerate(self._bind(index)):
            # The first kernel takes the parameters, before the last result overwrites them.
            params = block.params.accumulators if number == 0 else NO_DIGEST
            results, done = block.results[number].accumulators, first
            if kernel.digesting and (params.size or results.size):
                self._note(number, finite=kernel.digesting(first, gulps, params, results))
                done = gulps
            if params.size and gulps < last:
                block.params.end(data[-GULP_BYTES:])
            if done < last:
                self._note(number, finite=kernel.average(done, last))
        return stop

    _take_alone = _take

    def _is_finite(self, number: int, out: Arena) -> bool:  # noqa: ARG002 - the kernels looked at each piece
        return self._finite[number]

    def _note(self, number: int, *, finite: bool) -> None:
        """Remember a piece whose results are not all finite."""
        if not finite:
            self._finite[number] = False


class DevicePass(Pass):
    """A pass on a device: pieces are digested on the host; enough of them together are uploaded and averaged."""

    #: Asking a device whether results are finite waits for the device: asked once, at the end of the pass.
    _checks_pieces = False

    def __init__(self, staged: Staged, feeds: Sequence[Feed], *, check: bool, measure: bool, grain: Grain) -> None:
        super().__init__(staged, feeds, check=check, measure=measure, grain=grain)
        #: Bytes of the parameters that the device was told to average so far.
        self._averaged = 0

    def _result(self, out: Arena, sink: Sink) -> Result:
        return DeviceResult(out, sink, self._staged.host_twin(out), self._staged, self._grain.block)

    def _take(self, block: _Block, index: int, section: Section, start: int, stop: int) -> int:
        block.params.update(self._staged.data[start:stop])
        if stop % self._grain.device_piece and stop < section.param.stop:
            return self._averaged
        self._average(index, section, self._averaged, stop)
        self._averaged = stop
        return stop

    def _take_alone(self, block: _Block, index: int, section: Section, start: int, stop: int) -> None:
        block.params.update(self._staged.data[start:stop])
        self._average(index, section, start, stop)

    def _average(self, index: int, section: Section, start: int, stop: int) -> None:
        """Tell the device to fetch and average bytes ``start`` to ``stop``, which lie in one section. Does not wait."""
        kernels = self._bind(index)
        if kernels:
            self._staged.upload(start, stop)
        for kernel in kernels:
            kernel.average(*_elements(section, start, stop))

    def _is_finite(self, number: int, out: Arena) -> bool:  # noqa: ARG002 - the result itself is looked at
        return all(finite(out.section(index)) for index in range(len(self._layout.sections)))


def _elements(section: Section, start: int, stop: int) -> tuple[int, int]:
    """Bytes ``start`` to ``stop`` of the parameters as a range of a section's elements."""
    width = LAYOUT_DTYPES[section.param_dtype]
    return (start - section.param.start) // width, (stop - section.param.start) // width
