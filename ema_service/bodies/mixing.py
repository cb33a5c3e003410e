"""A weighted sum of sources of one layout, worked out as it is read: no more memory than a piece of each.

Sums are float64 and are rounded once, to each tensor's dtype.

Knows entries, dtypes and byte offsets. Does not know what the sources are or where the weights come from.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch

from ema_client.protocol import LAYOUT_DTYPES
from ema_client.wire import Entry
from ema_service.bodies.outgoing import ReadBytes
from ema_service.memory.arena import TORCH_DTYPES

__all__ = ["Mixture"]


class Mixture:
    """The sum of sources, each times its weight. Thread-safe where the sources are.

    entries: of every source, in the order of their bytes. sources: what reads each, and its weight.
    """

    def __init__(self, entries: Sequence[Entry], sources: Sequence[tuple[ReadBytes, float]]) -> None:
        self._entries = [entry for entry in entries if entry.begin < entry.end]
        self._begins = [entry.begin for entry in self._entries]
        self._sources = sources

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of the sum's data section, which lie in tensors of one dtype. Blocks."""
        entry = self._entries[bisect_right(self._begins, start) - 1]
        width, dtype = LAYOUT_DTYPES[entry.dtype], TORCH_DTYPES[entry.dtype]
        # Whole elements: tensors of one dtype lie back to back.
        first = start - (start - entry.begin) % width
        last = stop + (entry.begin - stop) % width
        total = torch.zeros((last - first) // width, dtype=torch.float64)
        for read, weight in self._sources:
            total.add_(torch.frombuffer(read(first, last), dtype=dtype).to(torch.float64), alpha=weight)
        summed = total.to(dtype).view(torch.uint8).numpy().data
        return summed[start - first : stop - first]
