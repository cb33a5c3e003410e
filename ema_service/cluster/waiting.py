"""Requests that wait for what all hosts of a cluster decide: each for some seconds, and none beyond the server's end.

Lives on one event loop; whoever waits holds neither thread nor lock. Does not know what is decided, or by whom.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from ema_client.errors import EmaError, Overloaded, Stopping

__all__ = ["Waiting"]

T = TypeVar("T")

#: Seconds that a request waits for all hosts; then its sender comes again, with the same key.
_DECISION_SECONDS = 30.0


class Waiting:
    """Who waits at one host."""

    def __init__(self, linked: Callable[[], bool], *, seconds: float = _DECISION_SECONDS) -> None:
        """linked: whether the host hears a coordinator. seconds: that a request waits."""
        self._linked = linked
        self._seconds = seconds
        self._stopping = False
        self._stops: set[asyncio.Event] = set()

    def stop(self) -> None:
        """Let nobody wait any more: the server was told to stop."""
        self._stopping = True
        for each in self._stops:
            each.set()

    async def until(self, result: asyncio.Future[T], told: str, seconds: float | None = None) -> T:
        """What ``result`` gives. told: what is late then. seconds: if others than those of the host.

        Raises what ``result`` raises; Overloaded after those seconds; Stopping.
        """
        stopped = asyncio.Event()
        stop = asyncio.ensure_future(stopped.wait())
        either: set[asyncio.Future[Any]] = {result, stop}
        self._stops.add(stopped)
        try:
            if self._stopping:
                stopped.set()
            await asyncio.wait(either, timeout=seconds or self._seconds, return_when=asyncio.FIRST_COMPLETED)
            if result.done():
                return result.result()
        finally:
            self._stops.discard(stopped)
            for each in either:
                each.cancel()
        raise self._late(told)

    def _late(self, told: str) -> EmaError:
        """Why a request is answered before all hosts have decided."""
        if self._stopping:
            return Stopping("the server was told to stop", retry_after=1.0)
        why = "another host is away or slow" if self._linked() else "this host hears no coordinator"
        return Overloaded(
            f"{told} not decided by all hosts in {self._seconds:g} seconds: {why}",
            hint="send it again, under the same key: it counts once",
            retry_after=1.0,
        )
