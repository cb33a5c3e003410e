"""Routes for whoever runs the server: liveness, readiness, metrics, and what the server is and may take.

Knows the server's state as a whole. Does not know runs.
"""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from ema_client.errors import Overloaded, Stopping, StorageFailed
from ema_client.protocol import ServerInfo
from ema_service.api.auth import access_of
from ema_service.api.errors import problem_responses
from ema_service.api.facts import stranger_info
from ema_service.api.routes.parameters import Server

__all__ = ["router"]

router = APIRouter(tags=["operations"])


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> dict[str, str]:
    """200 as long as the event loop turns."""
    return {"status": "alive"}


@router.get(
    "/readyz",
    summary="Does the server take all requests?",
    responses=problem_responses(Overloaded, StorageFailed, Stopping),
)
async def readyz(server: Server) -> dict[str, str]:
    """200 while the server takes whatever is asked for; 503 while its disk is full, or once it was told to stop; on a
    host of a cluster also while it hears no coordinator, and on one of twins until it has all that its twin has.

    On a full disk new runs and snapshots are refused, and updates go on. Before every run of the data dir has been
    brought back the server accepts no connection.
    """
    if server.stopping:
        raise Stopping("the server was told to stop")
    await server.workers.report(server.facts.check_ready)
    return {"status": "ready", "device": str(server.registry.memory.device)}


@router.get("/v1/server", summary="What is this server?")
async def show_server(request: Request, server: Server) -> ServerInfo:
    """Version, device, memory and disk beside their limits, and the scopes of the request's token.

    Any token will do. Without one, where the server asks for tokens: name and version, and nothing else.
    """
    access = access_of(request)
    if not access.scopes:
        return stranger_info()
    return await server.workers.report(partial(server.facts.info, access))


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request, server: Server) -> Response:
    """Counters, gauges and histograms in Prometheus' text format; of runs, those that the token may read are named."""
    text = await server.workers.report(partial(server.facts.metrics, access_of(request)))
    return Response(text, media_type=CONTENT_TYPE_LATEST)
