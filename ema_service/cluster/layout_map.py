"""A layout over k shards: which rows of which tensors each shard has, and where they lie in a body of the whole run.

In canonical order a run's tensors are one row of bytes. That row is cut k - 1 times, always between two rows of a
tensor (indices of its first dimension), so that

- a shard is an ordinary run whose layout is some tensors and some tensors' rows, in the order that they have anyway;
- a shard's data is one stretch of the whole body's data: a merged body is one header and the shards' data in turn, and
  a byte of the whole body is found on its shard by subtraction;
- a shard's stretch of an update is a part of the whole one, with one slice a tensor (``ema.slices``).

Cut i lies where the bytes of the shadows, which are what a host holds and averages, are nearest to i / k of all: each
shard has as many as the others, give or take a row. A run of fewer rows than shards has shards with no row of a tensor.
The cuts follow from the layout and k alone, so nobody has to be asked for them, and neither is ever changed for a run.

Knows tensors, rows and offsets. Does not know who holds a shard, or how its bytes travel.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from ema_client.errors import InvalidRequest
from ema_client.protocol import TensorSpec
from ema_client.wire import Box, Entry, box_shape, build_header
from ema_service.memory.layout import Layout

__all__ = ["LayoutMap", "MergedBody", "ShardLayout", "Span"]


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """What one shard has.

    layout: the shard's own, as of any run. boxes: by tensor, in canonical order, the elements of the run's tensor that
    are here: some rows, and of these everything. params, shadows: the stretch of all parameters' and of all shadows'
    bytes that is here.
    """

    place: int
    layout: Layout
    boxes: Mapping[str, Box]
    params: slice
    shadows: slice


class Span(NamedTuple):
    """Bytes of a merged body that lie next to each other in one source.

    shard: whose data they are of; None for the header. start, stop: in that data, or in the header.
    """

    shard: int | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class MergedBody:
    """A body of the whole run, put together of one header and the shards' data.

    header: with its length prefix. bounds: at which byte of the data each shard's begin, and the last one's end.
    """

    header: bytes
    bounds: tuple[int, ...]

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return len(self.header) + self.bounds[-1]

    def spans(self, start: int = 0, stop: int | None = None) -> Iterator[Span]:
        """Where bytes [start, stop) of the body come from, in their order. stop: None for the end of the body."""
        stop = self.length if stop is None else min(stop, self.length)
        edges = (0, *(len(self.header) + bound for bound in self.bounds))
        for source, (begin, end) in enumerate(pairwise(edges)):
            first, last = max(start, begin), min(stop, end)
            if first < last:
                yield Span(source - 1 if source else None, first - begin, last - begin)


class LayoutMap:
    """A run's layout, cut into shards. layout: the whole. shards: by place."""

    def __init__(self, layout: Layout, shards: int) -> None:
        """Raises InvalidRequest where the layout has fewer rows than there are to be shards, and none that is a
        tensor's: of scalars alone no shard can have nothing."""
        rows = _Rows(layout.shadows)
        if shards < 1 or (shards > max(rows.count, 1) and rows.first_of_many is None):
            raise InvalidRequest(
                f"shards: {shards}; the layout has {rows.count} scalars with bytes and no tensor of one dimension or "
                f"more, which make 1 to {max(rows.count, 1)} shards"
            )
        self.layout = layout
        self._cuts = [(0, 0), *map(rows.place, rows.cuts(shards)), (len(layout), 0)]
        params, shadows = self.bounds(layout.params), self.bounds(layout.shadows)
        self.shards = tuple(
            self._shard(place, slice(*params[place : place + 2]), slice(*shadows[place : place + 2]))
            for place in range(shards)
        )

    def bounds(self, entries: Sequence[Entry]) -> tuple[int, ...]:
        """At which byte each shard begins, and the last one ends, where the run's tensors lie as ``entries`` says:
        those of parameters, of shadows, or of either once cast to another dtype."""
        ends = [entry.begin for entry in entries] + [entries[-1].end]
        return tuple(ends[at] + (row * _row_bytes(entries[at]) if row else 0) for at, row in self._cuts)

    def merged(self, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> MergedBody:
        """The body of the whole run whose tensors lie as ``entries`` says. metadata: for the header."""
        return MergedBody(build_header(entries, metadata), self.bounds(entries))

    # ----------------------------------------------------------------------------------------------------------------

    def _shard(self, place: int, params: slice, shadows: slice) -> ShardLayout:
        boxes = dict(self._boxes(self._cuts[place], self._cuts[place + 1]))
        specs = [TensorSpec(name, box_shape(box), self.layout.entry(name).dtype) for name, box in boxes.items()]
        copied = [name for name in self.layout.copied if name in boxes]
        return ShardLayout(place, Layout(specs, copied), boxes, params, shadows)

    def _boxes(self, cut: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[str, Box]]:
        """The tensors between two cuts, each with what of it lies there; between cuts at one place, where there are
        fewer rows than shards, no row of the tensor that follows."""
        if cut == end:
            entry = self.layout.params[cut[0]]
            yield entry.name, ((cut[1], cut[1]), *((0, size) for size in entry.shape[1:]))
            return
        for at in range(cut[0], end[0] + 1 if end[1] else end[0]):
            entry = self.layout.params[at]
            box = tuple((0, size) for size in entry.shape)
            if entry.shape:
                start, stop = cut[1] if at == cut[0] else 0, end[1] if at == end[0] else entry.shape[0]
                box = ((start, stop), *box[1:])
            yield entry.name, box


class _Rows:
    """The rows of all tensors that have bytes, numbered through. A tensor without dimensions is one row."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._tensors = [(at, entry) for at, entry in enumerate(entries) if entry.end > entry.begin]
        self._begins = [entry.begin for _, entry in self._tensors]
        #: Number of the first row of each tensor.
        self._firsts = [0]
        for _, entry in self._tensors:
            self._firsts.append(self._firsts[-1] + (entry.shape[0] if entry.shape else 1))
        self.count = self._firsts.pop()
        self._bytes = entries[-1].end

    @property
    def first_of_many(self) -> int | None:
        """The first row of the first tensor that has dimensions; None where all are scalars."""
        return next((row for row, (_, entry) in zip(self._firsts, self._tensors, strict=True) if entry.shape), None)

    def cuts(self, shards: int) -> Iterator[int]:
        """The rows before which to cut: the nearest to equal bytes that leave a row to each shard. Of fewer rows each
        is a shard, and the shards that have none come before the first tensor with dimensions."""
        if (missing := shards - max(self.count, 1)) > 0:
            first = self.first_of_many or 0
            yield from sorted([*range(1, self.count), *[first] * missing])
            return
        last = 0
        for cut in range(1, shards):
            last = min(max(self._nearest(cut, shards), last + 1), self.count - (shards - cut))
            yield last

    def place(self, row: int) -> tuple[int, int]:
        """The tensor that a row belongs to, as its place in the layout, and which of its rows it is."""
        index = bisect_right(self._firsts, row) - 1
        return self._tensors[index][0], row - self._firsts[index]

    def _nearest(self, part: int, parts: int) -> int:
        """The row whose first byte is nearest to ``part / parts`` of all bytes."""
        index = bisect_right(self._begins, part * self._bytes // parts) - 1
        entry = self._tensors[index][1]
        size = _row_bytes(entry)
        within = part * self._bytes - parts * entry.begin
        # In integers: a layout of some terabytes has more bytes than float64 tells apart by the row.
        return self._firsts[index] + (2 * within + parts * size) // (2 * parts * size)


def _row_bytes(entry: Entry) -> int:
    """Bytes of one row of a tensor that has bytes."""
    return (entry.end - entry.begin) // (entry.shape[0] if entry.shape else 1)
