"""Lanes: the connections that bring stretches of updates at the moment.

Lanes are bounded: each is a connection, and while its bytes come fast a thread. Those of one update are shared evenly
by its senders, the ranks of a sharded trainer; one lane each of them has in any case, as it would have one connection
for a part that is not cut. A stretch that comes once more, for its connection broke off unnoticed or stands still, ends
the lane before it: two lanes never write one memory. An earlier attempt whose head a network held back ends no later
one.

Knows names of stretches and the tasks that receive them. Does not know bytes, or what becomes of a stretch (runs).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from ema_client.errors import Overloaded, Superseded

__all__ = ["Lane", "Lanes"]

#: Retry-After of a stretch beyond the bounds: stretches end every moment, and a lane has nothing else to do.
_RETRY_SECONDS = 0.1


class Lane:
    """The receiving of one stretch. On the event loop only.

    attempt: the sender's number. gone: set once nothing of the lane writes to memory any more.
    """

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.gone = asyncio.Event()
        self._stopped = False
        self._receiving: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """End the receiving: the same stretch has come once more."""
        self._stopped = True
        if self._receiving:
            self._receiving.cancel()

    async def receive(self, receiving: Coroutine[Any, Any, None]) -> None:
        """Await ``receiving``. Raises what that raises; Superseded where stop() ended it."""
        self._receiving = asyncio.create_task(receiving)
        if self._stopped:
            self._receiving.cancel()
        try:
            await self._receiving
        except asyncio.CancelledError:
            if not self._stopped:
                raise
            raise Superseded("the stretch came once more, over another connection", retry_after=0.0) from None


class Lanes:
    """All lanes of a server. On the event loop only.

    most: of one update at once, but one of each sender. in_all: of all updates at once.
    """

    def __init__(self, most: int, in_all: int) -> None:
        self._most = most
        self.in_all = in_all
        self._lanes: dict[tuple[object, object], Lane] = {}
        self._of: Counter[object] = Counter()

    def __len__(self) -> int:
        return len(self._lanes)

    @contextlib.asynccontextmanager
    async def lane(self, push: object, stretch: object, attempt: int, senders: int = 1) -> AsyncIterator[Lane]:
        """A lane for a stretch of a push, within the block. Ends a lane of the same stretch, and waits for its end.

        push: a whole update, or the part of one of ``senders``. attempt: of attempts at one stretch a later one has a
        higher number. Raises Superseded where a later attempt is on its way, Overloaded beyond the bounds.
        """
        name, most = (push, stretch), max(1, self._most // senders)
        while before := self._lanes.get(name):
            if before.attempt > attempt:
                raise Superseded("a later attempt at the stretch is on its way", retry_after=0.0)
            before.stop()
            await before.gone.wait()
        if self._of[push] >= most:
            whose = "this update" if senders == 1 else f"this part, one of {senders},"
            raise Overloaded(
                f"{self._of[push]} stretches of {whose} are coming already (max_lanes)", retry_after=_RETRY_SECONDS
            )
        if len(self._lanes) >= self.in_all:
            raise Overloaded(
                f"{self.in_all} stretches of updates are coming already (a quarter of max_connections)",
                retry_after=_RETRY_SECONDS,
            )
        lane = self._lanes[name] = Lane(attempt)
        self._of[push] += 1
        try:
            yield lane
        finally:
            del self._lanes[name]
            self._of[push] -= 1
            if not self._of[push]:
                del self._of[push]
            lane.gone.set()
