"""Routes that keep what a sweep over averages of several lengths found, and show the newest.

Knows the routes and their answers. Does not know how averages are worked out (weights), or where sweeps are kept.
"""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter

from ema_client.errors import InvalidRequest, RunNotFound, StorageFailed, Superseded
from ema_client.protocol import SweepInfo, SweepList
from ema_service.api.errors import problem_responses
from ema_service.api.limits import JSON_REFUSALS, takes_json
from ema_service.api.routes.parameters import Key, RunName, Server
from ema_service.api.schemas import SWEEP_BYTES, SweepBody

__all__ = ["router"]

router = APIRouter(prefix="/v1/runs/{run}/sweeps", tags=["history"])


@router.post(
    "",
    status_code=201,
    summary="Report a sweep",
    openapi_extra=takes_json(SWEEP_BYTES),
    responses=problem_responses(*JSON_REFUSALS, RunNotFound, InvalidRequest, StorageFailed, Superseded),
)
async def add_sweep(run: RunName, body: SweepBody, server: Server, key: Key = None) -> SweepInfo:
    """Keep what averages of several lengths came to, by an evaluation of the caller's, for who looks at the run.

    The run itself is as it was. The newest eight reports of a run are kept.
    """
    return await server.steer(run, partial(server.registry.add_sweep, run, body.to_report(), key))


@router.get(
    "",
    summary="Show what sweeps found",
    responses=problem_responses(RunNotFound, InvalidRequest, StorageFailed),
)
async def list_sweeps(run: RunName, server: Server) -> SweepList:
    """The newest sweeps that were reported of the run, the newest last."""
    sweeps = server.registry.sweeps(run)
    return SweepList(run, await server.workers.block(sweeps.all))
