"""What is asked of a gateway itself: whether it lives, what it counts, who its hosts are.

Knows what all hosts are asked. Does not know runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from ema_client.protocol import API, ServerInfo, server_path
from ema_service.cluster.gateway.asking import Asking, json_answer
from ema_service.cluster.gateway.hosts import passed_on
from ema_service.cluster.gateway.overview import overview_of
from ema_service.cluster.gateway.routes.paths import Route
from ema_service.cluster.gateway.watching import Watches
from ema_service.cluster.gateway.whole import whole_server

__all__ = ["OwnRoutes"]


@dataclass(frozen=True, slots=True)
class OwnRoutes:
    """The answers of a gateway for itself."""

    asking: Asking
    watches: Watches

    @property
    def routes(self) -> tuple[Route, ...]:
        """Method, path and answer."""
        return (
            ("GET", "/healthz", self.alive),
            ("GET", "/readyz", self.ready),
            ("GET", "/metrics", self.metrics),
            ("GET", server_path(), self.server),
            ("GET", f"{API}/hosts", self.overview),
        )

    async def alive(self) -> Response:
        """200 as long as the event loop turns."""
        return JSONResponse({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        """200 while every host takes all requests."""
        hosts, headers = self.asking.hosts, passed_on(request.headers)
        await hosts.each(lambda host: hosts.send(host, "GET", "/readyz", headers))
        return JSONResponse({"status": "ready", "hosts": len(await hosts.all())})

    async def metrics(self) -> Response:
        """The gateway's own, for Prometheus."""
        self.asking.hosts.metrics.waiting.set(self.watches.waiting)
        return Response(generate_latest(self.asking.hosts.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def server(self, request: Request) -> Response:
        """What the hosts are together."""
        return json_answer(whole_server(await self.asking.each(request, server_path(), ServerInfo)))

    async def overview(self, request: Request) -> Response:
        """Who the hosts are, and how each stands."""
        return json_answer(await overview_of(self.asking.hosts, passed_on(request.headers)))
