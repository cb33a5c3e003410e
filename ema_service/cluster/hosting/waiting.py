"""Requests that wait for what all hosts of a cluster decide: each for some seconds, and none beyond the server's end.

Lives on one event loop; whoever waits holds neither thread nor lock. Does not know what is decided, or by whom.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ema_client.errors import EmaError, Overloaded, Stopping

__all__ = ["Waiting"]

_log = logging.getLogger(__name__)

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
        #: Work that goes on whether or not its request still waits.
        self._working: set[asyncio.Task[Any]] = set()

    def stop(self) -> None:
        """Let nobody wait any more: the server was told to stop."""
        self._stopping = True
        for each in self._stops:
            each.set()

    async def soon(self, work: Coroutine[Any, Any, T], seconds: float) -> T | None:
        """What ``work`` gives; None where that takes longer than so many seconds. The work goes on, whoever waits.

        Raises what ``work`` raises in that time.
        """
        task = asyncio.ensure_future(work)
        self._working.add(task)
        task.add_done_callback(self._worked)
        done, _ = await asyncio.wait({task}, timeout=seconds)
        return task.result() if done else None

    def _worked(self, task: asyncio.Task[Any]) -> None:
        self._working.discard(task)
        fault = None if task.cancelled() else task.exception()
        if fault and not isinstance(fault, EmaError):
            _log.error("what was to be decided by all hosts came to nothing", exc_info=fault)

    async def close(self) -> None:
        """End all work that goes on. After stop()."""
        for task in self._working:
            task.cancel()
        await asyncio.gather(*self._working, return_exceptions=True)

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
