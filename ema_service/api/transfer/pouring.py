"""Sends weights from the memory they lie in, on a thread, as long as the reader takes them.

A thread writes to the socket while the reader keeps up (the ASGI extension ``ema.pour``); what a full socket leaves is
sent by the event loop, like any body.

Knows streams and pieces of memory. Does not know uvicorn, or what the bytes mean.
"""

from __future__ import annotations

import select
from collections.abc import Awaitable, Callable, Iterator

from fastapi import Request

from ema_service.api.transfer.socket_threads import SocketThreads
from ema_service.api.transfer.streams import Stream

__all__ = ["MIN_POURED_BYTES", "POUR", "Pour", "Pouring", "pour"]

#: Name of the ASGI extension: ``await pour(left, more, senders)``, see pour().
POUR = "ema.pour"

Pour = Callable[[memoryview, Iterator[memoryview], SocketThreads], Awaitable[tuple[int, memoryview]]]

#: Bytes of the smallest piece that a thread is woken to write.
MIN_POURED_BYTES = 1 << 20
#: A thread leaves the rest to the event loop when the reader has taken nothing for so many milliseconds.
_IDLE_MS = 20


async def pour(
    request: Request, left: memoryview, more: Iterator[memoryview], senders: SocketThreads
) -> tuple[int, memoryview]:
    """Send ``left``, and the pieces of ``more`` that the reader takes at once.

    The head of the answer must have been sent.

    Returns how many bytes were sent, and the rest of the last piece: the caller sends that rest, and the pieces still
    in ``more``, like any body. Nothing is sent where a thread is of no use: a small piece, another ASGI server, a full
    socket. Raises what ``more`` raises.
    """
    extension: Pour | None = request.scope.get("extensions", {}).get(POUR)
    return await extension(left, more, senders) if extension else (0, left)


class Pouring:
    """Writes pieces to a connection on a thread, until there are no more, the reader takes nothing, or the waiting task
    gave up.

    sent: bytes. left: the rest of the piece in hand. The end of the connection is left for the event loop to find.
    """

    def __init__(self, stream: Stream, left: memoryview, more: Iterator[memoryview]) -> None:
        self._stream = stream
        self._more = more
        self.left = left
        self.sent = 0
        self.stopped = False

    def run(self) -> None:
        """Write until something ends it, then give the connection back. Raises what ``more`` raises."""
        try:
            room = select.poll()
            room.register(self._stream, select.POLLOUT)
            while not self.stopped and (self.left or self._next()):
                try:
                    count = self._stream.write(self.left)
                except BlockingIOError:
                    if not room.poll(_IDLE_MS):
                        return
                    continue
                except OSError:
                    return
                self.left = self.left[count:]
                self.sent += count
        finally:
            self._stream.close()

    def _next(self) -> bool:
        """Take the next piece of the weights, and say whether there was one."""
        self.left = next(self._more, memoryview(b""))
        return bool(self.left)
