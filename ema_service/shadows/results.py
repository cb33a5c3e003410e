"""Results of a pass that are written to disk as they become final: digested, and handed to a sink.

Knows arenas, digests and copies from a device. Does not know how a result is computed (passes) or written (storage).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from ema_service.averaging import GULP_BYTES, BlockDigest, Digest
from ema_service.memory import Arena, Staged
from ema_service.memory.arena import Mark
from ema_service.values import Array

__all__ = ["DeviceResult", "Result", "Sink"]

#: A function (data, upto): all bytes of a result in host memory, the same at each call, and how many are final.
Sink = Callable[[memoryview, int], None]


class Result:
    """The result of one average in host memory, of which a sink is told.

    arena: gets the digest at the end. data: the result's bytes. block_bytes: of the digest.
    """

    def __init__(self, arena: Arena, sink: Sink, data: Array, block_bytes: int) -> None:
        self._arena = arena
        self._sink = sink
        self._data = data.data
        self._digest = Digest(block_bytes)
        self._told = 0

    def made(self, upto: int, block: BlockDigest | None = None, *, ended: bool = False) -> None:
        """Digest the result up to ``upto`` bytes, which are final, and tell the sink.

        block: the digest of the block in hand, where the averaging kernel works it out, all but the block's last gulp.
        ended: the block in hand ends at ``upto``.
        """
        if block is None:
            self._digest.update(self._data[self._told : upto])
        elif ended:
            block.end(self._data[upto - GULP_BYTES : upto])
            self._digest.add(block.digest())
        self._told = upto
        self._sink(self._data, upto)

    def finish(self) -> None:
        """Give the arena the digest of the result, every byte of which is final."""
        self._arena.digest = self._digest.digest()


class DeviceResult(Result):
    """A result on a device: copied to the host behind the averaging; a thread tells the sink as copies arrive.

    twin: host memory for the copy. The thread refers to this object, so the pool lends the twin to nobody else before
    every copy has arrived.
    """

    def __init__(self, arena: Arena, sink: Sink, twin: Array, staged: Staged, block_bytes: int) -> None:
        super().__init__(arena, sink, twin, block_bytes)
        self._twin = twin
        self._mark = staged.mark
        self._followers = staged.followers
        self._copied = 0
        self._under_way = deque[tuple[int, Mark]]()
        self._follower: Future[None] | None = None
        self._lock = threading.Lock()

    def made(self, upto: int, block: BlockDigest | None = None, *, ended: bool = False) -> None:  # noqa: ARG002 - host only
        """Begin to copy the result up to ``upto`` bytes to the host. Does not wait."""
        if upto == self._copied:
            return
        from ema_service.tensors import tensor_of

        piece = slice(self._copied, upto)
        tensor_of(self._twin[piece]).copy_(self._arena.tensor[piece], non_blocking=True)
        self._copied = upto
        with self._lock:
            self._under_way.append((upto, self._mark()))
            if len(self._under_way) == 1:
                self._follower = self._followers.submit(self._follow)

    def finish(self) -> None:
        """Wait for the copies, then give the arena its digest."""
        if self._follower:
            self._follower.result()
        super().finish()

    def _follow(self) -> None:
        """Wait for the copies under way, one after the other, and tell the sink of each. Ends when none is left."""
        while True:
            upto, mark = self._under_way[0]
            mark.synchronize()
            super().made(upto)
            with self._lock:
                self._under_way.popleft()
                if not self._under_way:
                    return
