"""Threads that a socket is lent to, for the receiving or the sending of one body.

Knows threads and the event loop. Does not know sockets, bodies, or what is done with either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ema_service.threads import Threads

__all__ = ["SocketThreads"]


class SocketThreads:
    """Threads that sockets are lent to, one socket to a thread.

    On the event loop only. free: how many threads are idle.
    """

    def __init__(self, threads: Threads, count: int) -> None:
        self._threads = threads
        self.free = count

    def lend(self, work: Callable[[], None]) -> asyncio.Future[None]:
        """Have a thread do ``work`` with a socket. One must be free."""
        self.free -= 1
        working = asyncio.get_running_loop().run_in_executor(self._threads, work)
        working.add_done_callback(self._give_back)
        return working

    def _give_back(self, _working: asyncio.Future[None]) -> None:
        self.free += 1
