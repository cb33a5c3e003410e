"""The answers of a gateway that come once something happened: a stream of events, and weights of a step to come.

Knows requests, and that whoever asked may be gone. Does not know how the hosts' streams become one (watching), or what
weights are.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ema_client.errors import StepNotReached
from ema_client.protocol import MAX_STEP, MAX_WAIT
from ema_service.cluster.gateway.hosts import passed_on
from ema_service.cluster.gateway.pulls import Streaming
from ema_service.cluster.gateway.watching import Watches

__all__ = ["once_reached", "send_events"]


async def send_events(run: str, request: Request, watches: Watches) -> Response:
    """The stream of a run's events. Raises as Watches.watching()."""
    async with contextlib.AsyncExitStack() as undo:
        watch = await undo.enter_async_context(watches.watching(run, passed_on(request.headers)))
        kinds = watches.hosts.metrics.events
        return _Events(watch.stream(lambda kind: kinds.labels(kind).inc()), undo.pop_all())


async def once_reached(run: str, request: Request, watches: Watches) -> None:
    """Return once every host has the step that the request waits for, and at once where it waits for none.

    Raises StepNotReached; ClientDisconnect where nobody waits any more; as Watches.watching().
    """
    asked = _asked(request)
    if asked is None:
        return
    step, seconds = asked
    async with watches.watching(run, passed_on(request.headers)) as watch:
        waiting, leaving = asyncio.create_task(watch.reached(step, seconds)), asyncio.create_task(_gone(request))
        try:
            await asyncio.wait([waiting, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ClientDisconnect
            if not waiting.result():
                raise StepNotReached(f"run {run!r} did not reach step {step} on all hosts within {seconds:g} seconds")
        finally:
            waiting.cancel()
            leaving.cancel()


def _asked(request: Request) -> tuple[int, float] | None:
    """The step that a request waits for, and for how many seconds; None where it waits for none, or says so wrongly:
    hosts answer both."""
    try:
        step, seconds = int(request.query_params["min_step"]), float(request.query_params["wait"])
    except (KeyError, ValueError):
        return None
    return (step, seconds) if 0 <= step <= MAX_STEP and 0 < seconds <= MAX_WAIT else None


async def _gone(request: Request) -> None:
    """Return once whoever asked is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Events(Streaming):
    """A stream of events, with its place among those who wait until the answer ends."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], held: contextlib.AsyncExitStack) -> None:
        # no-transform and X-Accel-Buffering: a proxy that collects events would delay them.
        headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
        super().__init__(chunks, status_code=200, headers=headers)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)
