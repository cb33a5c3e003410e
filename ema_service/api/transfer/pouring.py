"""Sends weights from the memory they lie in, on a thread of their own while the reader takes them.

A thread writes weights while they are taken as fast as it does (the ASGI extension ``ema.pour``); what a full socket
leaves is sent by the event loop, as any body is.

Knows sockets and pieces of memory. Does not know uvicorn, or what the bytes mean.
"""

from __future__ import annotations

import os
import select
from collections.abc import Awaitable, Callable, Iterator

from fastapi import Request

from ema_service.api.transfer.socket_threads import SocketThreads

__all__ = ["POUR", "POURED_BYTES", "Pour", "Pouring", "pour"]

#: Name of the ASGI extension: ``await pour(left, more, senders)``, see pour().
POUR = "ema.pour"

Pour = Callable[[memoryview, Iterator[memoryview], SocketThreads], Awaitable[tuple[int, memoryview]]]

#: A thread writes pieces that are at least so long; for less it is not worth waking.
POURED_BYTES = 1 << 20
#: A thread leaves the rest to the event loop once the reader has taken nothing for so many milliseconds.
_IDLE_MS = 20


async def pour(
    request: Request, left: memoryview, more: Iterator[memoryview], senders: SocketThreads
) -> tuple[int, memoryview]:
    """Send ``left``, and of ``more`` what the reader takes at once; the head of the answer must have been sent.

    Returns how many bytes were sent, and what is left of the last piece: it, and what ``more`` still has, is to be sent
    as any body is. Nothing is sent where a thread is of no use: for a small piece, under TLS or another ASGI server, or
    while the socket is full. Raises what ``more`` raises.
    """
    extension: Pour | None = request.scope.get("extensions", {}).get(POUR)
    return await extension(left, more, senders) if extension else (0, left)


class Pouring:
    """Writes pieces to a socket, on a thread, while it takes them. Ends where they do, where the reader was full for
    a moment, or who awaits it gave up.

    The end of the connection is left for the event loop to find. sent: bytes; left: of the piece in hand.
    """

    def __init__(self, descriptor: int, left: memoryview, more: Iterator[memoryview]) -> None:
        self._descriptor = descriptor
        self._more = more
        self.left = left
        self.sent = 0
        self.stopped = False

    def close(self) -> None:
        os.close(self._descriptor)

    def run(self) -> None:
        """Raises what ``more`` raises."""
        try:
            room = select.poll()
            room.register(self._descriptor, select.POLLOUT)
            while not self.stopped and (self.left or self._next()):
                try:
                    count = os.write(self._descriptor, self.left)
                except BlockingIOError:
                    if not room.poll(_IDLE_MS):
                        return
                    continue
                except OSError:
                    return
                self.left = self.left[count:]
                self.sent += count
        finally:
            self.close()

    def _next(self) -> bool:
        self.left = next(self._more, memoryview(b""))
        return bool(self.left)
