"""Routes for whoever runs the server: liveness, readiness, metrics.

Knows the server's state as a whole. Does not know runs.
"""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from ema_service.api.routes.parameters import Server

__all__ = ["router"]

router = APIRouter(tags=["operations"])


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> dict[str, str]:
    """200 as long as the event loop turns."""
    return {"status": "alive"}


@router.get("/readyz", summary="Can the server take requests?")
async def readyz(server: Server) -> dict[str, str]:
    """200 once every run of the data dir has been brought back; before that the server accepts no connection."""
    return {"status": "ready", "device": str(server.registry.memory.device)}


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(server: Server) -> Response:
    """Counters and gauges in Prometheus' text format."""
    return Response(server.metrics.render(), media_type=CONTENT_TYPE_LATEST)
