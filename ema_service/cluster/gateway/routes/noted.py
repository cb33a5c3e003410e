"""What hosts noted of a run: measurements, distances, a timeline.

Knows what hosts are asked. Does not know how it becomes that of one run (past).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import httpx2
from fastapi import Request
from fastapi.responses import Response

from ema_client.protocol import Distances, History, Timeline, distances_path, history_path, timeline_path, to_json
from ema_service.cluster.gateway.asking import Asking
from ema_service.cluster.gateway.hosts import HostAddress, parsed, passed_on
from ema_service.cluster.gateway.past import asked_of_hosts, whole_distances, whole_history, whole_timeline
from ema_service.cluster.gateway.pulls import is_known
from ema_service.cluster.gateway.routes.paths import RUN, Route, RunName

__all__ = ["NotedRoutes"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NotedRoutes:
    """The answers about how it went."""

    asking: Asking

    @property
    def routes(self) -> tuple[Route, ...]:
        """Method, path and answer."""
        return (
            ("GET", f"{RUN}/history", self.history),
            ("GET", f"{RUN}/distances", self.distances),
            ("GET", f"{RUN}/timeline", self.timeline),
        )

    async def history(self, run: RunName, request: Request) -> Response:
        """What was measured of the whole run's updates."""
        return await self._past(request, history_path(run), History, whole_history)

    async def distances(self, run: RunName, request: Request) -> Response:
        """How far each tensor's shadow was from its parameters."""
        return await self._past(request, distances_path(run), Distances, whole_distances)

    async def timeline(self, run: RunName, request: Request) -> Response:
        """What was done to the run."""
        most, since, query = asked_of_hosts(request.query_params)
        merge = partial(whole_timeline, most=most, since=since)
        return await self._past(request, timeline_path(run), Timeline, merge, query)

    async def _past(
        self,
        request: Request,
        path: str,
        kind: type[T],
        merge: Callable[[Sequence[T]], T],
        query: Mapping[str, str] | None = None,
    ) -> Response:
        """What each host noted, as of one run; on a thread, for a history has thousands of numbers. query: for the
        hosts, by default the request's."""
        headers, query = passed_on(request.headers), query or dict(request.query_params)

        async def ask(host: HostAddress) -> tuple[HostAddress, httpx2.Response]:
            return host, await self.asking.hosts.send(host, "GET", path, headers, params=query)

        told = await self.asking.hosts.each(ask)
        body = await asyncio.to_thread(
            lambda: json.dumps(to_json(merge([parsed(host, answer, kind) for host, answer in told]))).encode()
        )
        return _tagged(request, body)


def _tagged(request: Request, body: bytes) -> Response:
    """An answer of JSON, or that the reader has it already."""
    tag = f'"{hashlib.blake2b(body, digest_size=16).hexdigest()}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache", "Vary": "Authorization"}
    if is_known(request, tag):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)
