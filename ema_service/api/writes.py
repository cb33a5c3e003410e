"""The writes in hand: how many there are, and that none is begun once the server is told to stop.

What must outlive a stop is taken to disk while slow readers still read. So writes end first, and a sender that comes
later is told to come again, to the next server.

Knows ASGI and HTTP's methods. Does not know what is written.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from starlette.types import ASGIApp, Receive, Scope, Send

from ema_client.errors import Stopping
from ema_service.api.errors import problem_response

__all__ = ["WriteGate", "Writes"]

_READS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


class Writes:
    """The writes of one server. On the event loop only.

    closed: whether no more is taken.
    """

    def __init__(self) -> None:
        self.closed = False
        self._in_hand = 0
        self._none = asyncio.Event()
        self._none.set()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """A write is in hand within the block."""
        self._in_hand += 1
        self._none.clear()
        try:
            yield
        finally:
            self._in_hand -= 1
            if not self._in_hand:
                self._none.set()

    async def end(self, seconds: float) -> None:
        """Take no more writes, and return when none is in hand, or after some seconds."""
        self.closed = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._none.wait()


class WriteGate:
    """ASGI middleware that counts writes, and refuses them once they are closed. refused: told the code of each
    refusal."""

    def __init__(self, app: ASGIApp, writes: Writes, refused: Callable[[str], None]) -> None:
        self._app = app
        self._writes = writes
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _READS:
            await self._app(scope, receive, send)
        elif self._writes.closed:
            self._refused(Stopping.code)
            error = Stopping("the server was told to stop, and takes no more writes", retry_after=1.0)
            await problem_response(error, {"Connection": "close"})(scope, receive, send)
        else:
            with self._writes.one():
                await self._app(scope, receive, send)
