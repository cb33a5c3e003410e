"""Results of a pass that are written to disk as they become final: digested, and handed to a sink.

Knows arenas, digests and copies from a device. Does not know how a result is computed (passes) or written (storage).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Protocol

from ema_service.averaging import GULP_BYTES, BlockDigest, Digest
from ema_service.memory import Arena, Staged
from ema_service.memory.arena import Mark
from ema_service.values import Array

__all__ = ["DeviceResult", "Result", "Sink", "joined"]


class Sink(Protocol):
    """What is told of a result: (data, upto, start).

    data: all bytes of the result in host memory, the same at each call. upto: how far the stretch that begins at byte
    ``start`` is final; growing, until the stretch begins again.
    """

    def __call__(self, data: memoryview, upto: int, start: int, /) -> None: ...


class Result:
    """A stretch of the result of one average in host memory, of which a sink is told.

    data: the whole result's bytes. start, stop: of the stretch, in bytes of the result. block_bytes: of the digest.
    """

    def __init__(self, sink: Sink, data: Array, start: int, stop: int, block_bytes: int) -> None:
        self._sink = sink
        self._data = data.data
        self._start = self._told = start
        self._block_bytes = block_bytes
        #: Where the first block begins that lies in the stretch, and where the last ends.
        self._first = -(-start // block_bytes) * block_bytes
        self._last = stop if stop == len(self._data) else stop - stop % block_bytes
        self._digest = Digest(block_bytes)

    def made(self, upto: int, block: BlockDigest | None = None, *, ended: bool = False) -> None:
        """Digest the result up to ``upto`` bytes, which are final, and tell the sink.

        block: the digest of the block in hand, where the averaging kernel works it out, all but the block's last gulp.
        ended: the block in hand ends at ``upto``.
        """
        if block is None:
            self._digest.update(self._data[max(self._told, self._first) : min(upto, self._last)])
        elif ended:
            block.end(self._data[upto - GULP_BYTES : upto])
            self._digest.add(block.digest())
        self._told = upto
        self._sink(self._data, upto, self._start)

    def settle(self) -> None:
        """Return once the sink has been told of everything that was made."""

    def undo(self) -> None:
        """Tell the sink that nothing of the stretch is final, for it is averaged once more: perhaps in one piece, which
        by its end alone could not be told from the first time."""
        self._sink(self._data, self._start, self._start)

    def blocks(self) -> dict[int, bytes]:
        """The digests of the blocks that lie in the stretch, by the first byte of each, once everything is made.

        The last block of the result may be shorter than the others.
        """
        self._digest.end()
        return {self._first + i * self._block_bytes: block for i, block in enumerate(self._digest.blocks)}


class DeviceResult(Result):
    """A result on a device: copied to the host behind the averaging; a thread tells the sink as copies arrive.

    twin: host memory for the copy. The thread refers to this object, so the pool lends the twin to nobody else before
    every copy has arrived.
    """

    def __init__(
        self, sink: Sink, twin: Array, start: int, stop: int, block_bytes: int, arena: Arena, staged: Staged
    ) -> None:
        super().__init__(sink, twin, start, stop, block_bytes)
        self._arena = arena
        self._twin = twin
        self._mark = staged.mark
        self._followers = staged.followers
        self._copied = start
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

    def settle(self) -> None:
        if self._follower:
            self._follower.result()

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


def joined(data: Array, stretches: Iterable[Result], block_bytes: int) -> bytes:
    """The digest of a whole result of which the stretches are: 16 bytes.

    data: all bytes of the result, in host memory. Blocks that lie in two stretches are read here.
    """
    whole, digest, known = data.data, Digest(block_bytes), dict[int, bytes]()
    for stretch in stretches:
        known |= stretch.blocks()
    for start in range(0, len(whole), block_bytes):
        if start in known:
            digest.add(known[start])
        else:
            digest.update(whole[start : start + block_bytes])
    return digest.digest()
