"""Weighted sums of sources of one layout, worked out as they are read: no more memory than a piece of each.

Sums are float64 and are rounded once, to each tensor's dtype. Several sums of the same sources cost one reading.

Knows entries, dtypes and byte offsets. Does not know what the sources are or where the weights come from.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache, partial
from typing import cast

import numpy as np

from ema_client.protocol import LAYOUT_DTYPES
from ema_client.wire import Entry
from ema_service.averaging import add_weighted
from ema_service.bodies.outgoing import ReadBytes, WeightsStream
from ema_service.values import DTYPES, Array, array_over, typed, widened

__all__ = ["Ingredient", "Mixture", "interleaved"]

#: Of each source at a time: with float64 sums, what a core's cache holds.
_BLOCK_ELEMENTS = 1 << 17


@dataclass(frozen=True, slots=True)
class Ingredient:
    """A source of sums. read: gives bytes of the source's data section, to many threads. weights: its weight in each
    sum.

    entries: the source's tensors, in the order of their bytes; of the sums' names and shapes, perhaps of another dtype.
    """

    read: ReadBytes
    entries: Sequence[Entry]
    weights: tuple[float, ...]


class Mixture:
    """Sums of ingredients, each times its weight.

    entries: of every sum, in the order of their bytes. threads: that blocks are divided among, which read ingredients
    at the same time. copied: names of tensors that a sum takes from the last ingredient as they are.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        ingredients: Sequence[Ingredient],
        threads: Executor,
        *,
        copied: Collection[str] = (),
    ) -> None:
        self._threads = threads
        pairs = [i for i, entry in enumerate(entries) if entry.begin < entry.end]
        self._entries = [entries[i] for i in pairs]
        self._begins = [entry.begin for entry in self._entries]
        self._ingredients = ingredients
        self._theirs = [[each.entries[i] for i in pairs] for each in ingredients]
        self._copied = frozenset(copied)

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of the first sum's data section, which lie in tensors of one dtype. Blocks."""
        return self.read_each(start, stop)[0]

    def read_each(self, start: int, stop: int) -> list[memoryview]:
        """As read(), of each sum."""
        index = bisect_right(self._begins, start) - 1
        begin, dtype = self._entries[index].begin, self._entries[index].dtype
        width = LAYOUT_DTYPES[dtype]
        # Whole elements: tensors of one dtype lie back to back.
        first = start - (start - begin) % width
        last = stop + (begin - stop) % width
        pieces = [self._sums(*span, copied=copied) for *span, copied in self._spans(index, first, last)]
        sums = pieces[0] if len(pieces) == 1 else [np.concatenate(each) for each in zip(*pieces, strict=True)]
        rounded = (_rounded(each, dtype) for each in sums)
        return [data[start - first : stop - first] for data in rounded]

    def _spans(self, index: int, first: int, last: int) -> Iterator[tuple[int, int, int, bool]]:
        """Bytes [first, last), from entry ``index`` on, cut where copied tensors begin and end: (index, first, last,
        whether copied)."""
        position = index
        while first < last:
            copied = self._is_copied(position)
            end = position + 1
            while end < len(self._entries) and self._begins[end] < last and self._is_copied(end) == copied:
                end += 1
            stop = min(last, self._entries[end - 1].end)
            yield position, first, stop, copied
            position, first = end, stop

    def _is_copied(self, index: int) -> bool:
        return self._entries[index].name in self._copied

    def _sums(self, index: int, first: int, last: int, *, copied: bool) -> list[Array]:
        """Elements of each sum, float64: bytes [first, last) of a sum, from entry ``index`` on."""
        entry = self._entries[index]
        width = LAYOUT_DTYPES[entry.dtype]
        skipped, count = (first - entry.begin) // width, (last - first) // width
        if copied:
            taken = self._elements(len(self._ingredients) - 1, index, skipped, count).astype(np.float64)
            return [taken] * len(self._ingredients[-1].weights)
        sums = np.zeros((len(self._ingredients[0].weights), count))

        def add(begin: int) -> None:
            block = sums[:, begin : begin + _BLOCK_ELEMENTS]
            for number, ingredient in enumerate(self._ingredients):
                if any(ingredient.weights):
                    values = self._elements(number, index, skipped + begin, block.shape[1])
                    add_weighted(block, values, ingredient.weights)

        deque(self._threads.map(add, range(0, count, _BLOCK_ELEMENTS)), maxlen=0)
        return list(sums)

    def _elements(self, number: int, index: int, skipped: int, count: int) -> Array:
        """So many elements of an ingredient, behind the first ``skipped`` of entry ``index``: float64, or float32."""
        entry = self._theirs[number][index]
        width = LAYOUT_DTYPES[entry.dtype]
        begin = entry.begin + skipped * width
        raw = self._ingredients[number].read(begin, begin + count * width)
        return _exact(raw, entry.dtype)


def _exact(raw: memoryview, dtype: str) -> Array:
    """The values of a dtype, which every half is a float32 of."""
    values = cast(Array, typed(array_over(raw), dtype))
    if dtype in ("F32", "F64"):
        return values
    return widened(values) if dtype == "BF16" else values.astype(np.float32)


def _rounded(values: Array, dtype: str) -> memoryview:
    """The bytes of float64 values as another dtype, rounded to the nearest; ties to even."""
    if dtype in ("F32", "F64"):
        return values.astype(DTYPES[dtype]).view(np.uint8).data
    # By way of float32, as torch does: rounded twice.
    from ema_service.tensors import TORCH_DTYPES, array_of, tensor_of

    return array_of(tensor_of(values).to(TORCH_DTYPES[dtype])).view(np.uint8).data


def interleaved(streams: Sequence[WeightsStream], mixture: Mixture, at_once: int) -> Iterator[memoryview]:
    """The bodies of all sums, in one reading: every head, then the data in turn, ``at_once`` bytes of each.

    streams: one for each sum, alike but for what their heads say.
    """
    for stream in streams:
        yield from stream.chunks(mixture.read, 0, stream.head_bytes)
    data_bytes = streams[0].length - streams[0].head_bytes
    for position in range(0, data_bytes, at_once):
        read = cache(mixture.read_each)  # every stream reads the same stretches of the piece
        for number, stream in enumerate(streams):
            start = stream.head_bytes + position
            stop = min(start + at_once, stream.length)
            yield from stream.chunks(partial(_of_sum, read, number), start, stop)


def _of_sum(read: Callable[[int, int], list[memoryview]], number: int, start: int, stop: int) -> memoryview:
    return read(start, stop)[number]
