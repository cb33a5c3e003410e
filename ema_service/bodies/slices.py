"""Slices of a run's tensors: where their bytes belong, and whether every element comes exactly once.

Knows boxes (a range in each dimension of a tensor), layouts and offsets. Does not know which update the slices are of,
memory budgets, or who sends them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from ema_client.errors import LayoutMismatch, listed
from ema_client.protocol import LAYOUT_DTYPES
from ema_client.wire import Box, Entry, Header, box_shape, range_of_box, read_slices
from ema_service.memory.layout import Layout

__all__ = ["Cover", "Piece", "pieces_of", "slices_of"]

#: Bytes of a contiguous slice received at once: large enough that the loop costs nothing, small enough to be hashed
#: while in the cache.
_RECEIVED_AT_ONCE = 4 << 20
#: A contiguous stretch of so many bytes is worth a read of its own. Shorter ones are received together and put in place
#: by one strided copy.
_STRETCH_BYTES = 64 << 10
#: Bytes of one strided copy, which is made on the event loop and takes a fraction of a millisecond.
_SCATTERED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a part that are received together, all of one block of the parameters.

    entry: the tensor, as the layout has it. extent: the bytes of the parameters from the piece's first to its last.
    box: which elements of the tensor the piece has, where they are scattered within ``extent``; None where the piece is
    all of ``extent``.
    """

    entry: Entry
    nbytes: int
    extent: slice
    box: Box | None = None

    def scatter(self, received: memoryview, memory: memoryview) -> None:
        """Copy the received bytes to where the elements of ``box`` lie. memory: that of ``extent``."""
        if self.box is None:
            raise RuntimeError("a piece without a box is received to where it belongs")
        dtype = np.dtype(f"u{LAYOUT_DTYPES[self.entry.dtype]}")
        strides = tuple(prod(self.entry.shape[axis + 1 :]) * dtype.itemsize for axis in range(len(self.box)))
        target = np.ndarray(box_shape(self.box), dtype, memory, strides=strides)
        target[...] = np.frombuffer(received, dtype).reshape(target.shape)


def slices_of(header: Header, layout: Layout) -> dict[str, tuple[Box, ...]]:
    """The slices in a part's body, by tensor, in the order of their bytes. A tensor that is whole is one slice.

    Raises MalformedBody; LayoutMismatch naming the tensors or slices that the layout does not have.
    """
    given = read_slices(header)
    faults, slices = [], {}
    for entry in header.entries:
        mine = layout.find(entry.name)
        boxes = given.get(entry.name, (tuple((0, size) for size in entry.shape),))
        fault = _fault(entry, mine, boxes, sliced=entry.name in given)
        if fault or mine is None:
            faults.append(fault)
        elif entry.end > entry.begin:
            slices[entry.name] = boxes
    if faults:
        raise LayoutMismatch(listed(faults, "; "))
    return slices


def _fault(entry: Entry, mine: Entry | None, boxes: tuple[Box, ...], *, sliced: bool) -> str:
    """What is wrong with the slices of one tensor; empty where nothing is. mine: the tensor in the layout."""
    name = entry.name[:200]
    if mine is None:
        return f"not in the layout: {name}"
    if entry.dtype != mine.dtype:
        return f"{name} is {entry.dtype}, expected {mine.dtype}"
    if not sliced:
        return "" if entry.shape == mine.shape else f"{name} is {list(entry.shape)}, expected {list(mine.shape)}"
    for box in boxes:
        if len(box) != len(mine.shape) or any(stop > size for (_, stop), size in zip(box, mine.shape, strict=True)):
            return f"{name}: the slice {_shown(box)} is not within {list(mine.shape)}"
    return ""


def pieces_of(slices: Mapping[str, tuple[Box, ...]], layout: Layout, block: int) -> Iterator[Piece]:
    """The bytes of a part in the order in which they are sent, cut into pieces of at most a few MiB, none of which lies
    in two blocks of ``block`` bytes of the parameters."""
    for name, boxes in slices.items():
        entry = layout.entry(name)
        for box in boxes:
            yield from _pieces(entry, box, block)


def _pieces(entry: Entry, box: Box, block: int) -> Iterator[Piece]:
    """The bytes of one slice as pieces: cut along the first dimension until contiguous, or small enough for one
    copy, and at the end of each block."""
    if range_of_box(box, entry.shape):
        extent = _extent(entry, box)
        begin = extent.start
        while begin < extent.stop:
            end = min(begin + _RECEIVED_AT_ONCE, begin - begin % block + block, extent.stop)
            yield Piece(entry, end - begin, slice(begin, end))
            begin = end
        return
    axis = next(axis for axis, (start, stop) in enumerate(box) if stop - start > 1)
    start, last = box[axis]
    while start < last:
        count = _rows_at_once(entry, box, axis, start, block)
        inner = (*box[:axis], (start, start + max(count, 1)), *box[axis + 1 :])
        if count:
            yield Piece(entry, _bytes_of(entry, inner), _extent(entry, inner), inner)
        else:
            yield from _pieces(entry, inner, block)
        start += max(count, 1)


def _rows_at_once(entry: Entry, box: Box, axis: int, start: int, block: int) -> int:
    """How many rows of a box, along ``axis`` from ``start`` on, make one piece; 0 where a row has to be cut."""
    row = (*box[:axis], (start, start + 1), *box[axis + 1 :])
    nbytes, extent = _bytes_of(entry, row), _extent(entry, row)
    if nbytes >= _STRETCH_BYTES:
        return 0
    left: int = extent.start - extent.start % block + block - extent.stop
    apart = prod(entry.shape[axis + 1 :]) * LAYOUT_DTYPES[entry.dtype]
    return min(_SCATTERED_AT_ONCE // nbytes, left // apart + 1, box[axis][1] - start)


def _bytes_of(entry: Entry, box: Box) -> int:
    return prod(box_shape(box)) * LAYOUT_DTYPES[entry.dtype]


def _extent(entry: Entry, box: Box) -> slice:
    """The bytes of the parameters from the first element of a box to the last."""
    width, first, last = LAYOUT_DTYPES[entry.dtype], 0, 0
    for (start, stop), size in zip(box, entry.shape, strict=True):
        first, last = first * size + start, last * size + stop - 1
    return slice(entry.begin + first * width, entry.begin + (last + 1) * width)


class Cover:
    """Which elements of one tensor are claimed, and by which piece: a part, or a stretch of one. No element is claimed
    twice."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        # (first element, element behind the last, box, piece) of contiguous slices, sorted: all slices of a sharding by
        # rows are.
        self._ranges: list[tuple[int, int, Box, Hashable]] = []
        # (box, piece) of the other slices.
        self._scattered: list[tuple[Box, Hashable]] = []

    @property
    def whole(self) -> bool:
        """Whether every element of the tensor is claimed."""
        claimed = sum(stop - start for start, stop, _, _ in self._ranges)
        return claimed + sum(prod(box_shape(box)) for box, _ in self._scattered) == prod(self._shape)

    def claim(self, piece: Hashable, boxes: tuple[Box, ...]) -> Hashable | None:
        """Claim slices for a piece.

        Returns None; or the piece that has some of the elements, and then nothing is claimed.
        """
        for box in boxes:
            found = range_of_box(box, self._shape)
            other = self._other(box, found)
            if other is not None:
                self.release(piece)
                return other
            if found:
                insort(self._ranges, (*found, box, piece), key=_first)
            else:
                self._scattered.append((box, piece))
        return None

    def release(self, piece: Hashable) -> None:
        """Forget every claim of a piece."""
        self._ranges = [item for item in self._ranges if item[3] != piece]
        self._scattered = [item for item in self._scattered if item[1] != piece]

    def _other(self, box: Box, found: tuple[int, int] | None) -> Hashable | None:
        """A piece that claimed elements of ``box``, or None. found: the box as a range of elements, where it is
        contiguous."""
        if found:
            index = bisect_left(self._ranges, found[0], key=_first)
            if index < len(self._ranges) and self._ranges[index][0] < found[1]:
                return self._ranges[index][3]
            if index and self._ranges[index - 1][1] > found[0]:
                return self._ranges[index - 1][3]
        others = [] if found else [(other, piece) for _, _, other, piece in self._ranges]
        return next((piece for other, piece in [*others, *self._scattered] if _overlap(box, other)), None)


def _first(item: tuple[int, int, Box, Hashable]) -> int:
    return item[0]


def _overlap(box: Box, other: Box) -> bool:
    """Whether two boxes have an element in common."""
    return all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True))


def _shown(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"
