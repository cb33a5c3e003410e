"""The blocks of the parameters that one part of an update, or a stretch of one, brings whole, averaged as they come.

Knows which bytes the part brought, and which of its blocks are averaged. Does not know slices, other parts, or whether
a block may be averaged now (gathering).
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable

from ema_service.shadows.passes import Stretch

__all__ = ["PartBlocks"]


class PartBlocks:
    """The blocks of one part. One thread tells what arrived; any thread averages, one at a time.

    block_bytes: of a block; the last one may have fewer. arrived: bytes of all blocks that the part brought whole so
    far.
    """

    def __init__(self, block_bytes: int, param_bytes: int) -> None:
        self.arrived = 0
        self.block_bytes = block_bytes
        self._param_bytes = param_bytes
        #: By its first byte, how many bytes of each block the part brought.
        self._brought = Counter[int]()
        #: The first bytes of blocks that are whole, and that nobody averages yet.
        self._ready = deque[int]()
        #: The work on the latest block that was averaged.
        self._latest: Stretch | None = None
        self._lock = threading.Lock()

    @property
    def waiting(self) -> bool:
        """Whether a block is whole and not averaged."""
        return bool(self._ready)

    def bring(self, extent: slice, nbytes: int) -> None:
        """Note that ``nbytes`` bytes are in place, all within ``extent`` of the parameters, which lies in one block."""
        start = extent.start - extent.start % self.block_bytes
        self._brought[start] += nbytes
        if self._brought[start] == self.size(start):
            self.arrived += self.size(start)
            self._ready.append(start)

    def size(self, start: int) -> int:
        """Bytes of the block that begins at ``start``."""
        return min(self.block_bytes, self._param_bytes - start)

    def shared(self) -> dict[int, int]:
        """By its first byte, how many bytes came of each block that did not come whole."""
        return {start: nbytes for start, nbytes in self._brought.items() if nbytes < self.size(start)}

    def completed(self, start: int) -> None:
        """A block of which others brought the rest is whole by now, and waits to be averaged."""
        self._ready.append(start)

    def average(self, work_on: Callable[[int, Stretch | None], Stretch | None]) -> None:
        """Average the blocks that are whole, on the calling thread.

        work_on: gives the work on a block, by its first byte and by the work on an earlier block; None where the block,
        and every later one, is to be averaged with the set. Raises what ``work_on`` raises, and Overloaded.
        """
        with self._lock:
            while self._ready and (work := work_on(self._ready[0], self._latest)):
                self._ready.popleft()
                self._latest = work
                work.finish()
