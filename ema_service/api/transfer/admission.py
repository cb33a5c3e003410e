"""Waiting for room in a budget: first come, first served, and not for long.

Knows the order of the waiting requests and their deadline. Does not know what the budget is of: its owner says whether
there is room now, and tells when some came free.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from ema_client.errors import Overloaded
from ema_service.api.transfer.connection import on_lost

__all__ = ["WAIT_SECONDS", "Admission"]

T = TypeVar("T")

#: Seconds that a request waits for room before it is told to come again. A push of a gigabyte takes less than a second,
#: so a budget that stays full for longer is overload; and clients that asked first (Expect: 100-continue) wait 5 s
#: before they send.
WAIT_SECONDS = 4.0


class Admission:
    """The queue before one budget. Lives on the event loop: no thread is held, however many requests wait.

    The first request waits for room, those behind it for their turn, even where there would be room for them: else a
    large push would never have its turn among small ones. waiting: how many requests wait.
    """

    def __init__(self, seconds: float = WAIT_SECONDS) -> None:
        """seconds: how long each may wait. To be called on the event loop."""
        self.waiting = 0
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()  # asyncio serves those who wait for a lock in order
        self._room = asyncio.Event()

    def room(self) -> None:
        """Look again: there may be room. Thread-safe, and takes no lock, for it may be called in a garbage
        collection."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and every waiting request with it
            self._loop.call_soon_threadsafe(self._room.set)

    async def take(self, request: Request, attempt: Callable[[], T]) -> T:
        """What ``attempt`` returns, as soon as it does not raise Overloaded.

        attempt: must not block. Raises Overloaded where there was no room in time, ClientDisconnect where the client
        did not wait, and what else ``attempt`` raises.
        """
        if not self.waiting:
            with contextlib.suppress(Overloaded):
                return attempt()
        self.waiting += 1
        try:
            return await self._wait(request, attempt)
        finally:
            self.waiting -= 1

    async def _wait(self, request: Request, attempt: Callable[[], T]) -> T:
        """Wait for the turn, then for room. Raises as take()."""
        full = Overloaded(f"{self.waiting - 1} others have been waiting for room before this request", retry_after=1.0)
        gone = False

        def leave() -> None:
            nonlocal gone
            gone = True
            deadline.reschedule(self._loop.time())

        try:
            async with asyncio.timeout(self._seconds) as deadline:
                with on_lost(request, leave):
                    async with self._turn:
                        while True:
                            self._room.clear()
                            try:
                                return attempt()
                            except Overloaded as fault:
                                full = fault
                            await self._room.wait()
        except TimeoutError:
            if gone:
                raise ClientDisconnect from None
            try:
                raise full from None
            finally:
                del full
