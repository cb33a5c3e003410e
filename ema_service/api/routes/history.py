"""Routes that tell how a run went: its measurements, the distances of its tensors, and what was done to it.

Knows the routes and their answers. Does not know how a run is measured (runs), or where lines are kept.
"""

from __future__ import annotations

import sqlite3
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from ema_client.errors import AverageNotFound, InvalidRequest, RunNotFound, StorageFailed
from ema_client.protocol import (
    DEFAULT_ENTRIES,
    DEFAULT_POINTS,
    HISTORY_POINTS,
    NAME_PATTERN,
    TIMELINE_ENTRIES,
    Distances,
    History,
    Timeline,
    TimelineEntry,
)
from ema_service.api.answers import CONDITION, is_known, json_answer, json_bytes, not_modified, tagged
from ema_service.api.errors import problem_responses
from ema_service.api.routes.parameters import Decimal, Number, RunName, Server
from ema_service.persistence import Timeline as Lines

__all__ = ["router"]

router = APIRouter(prefix="/v1/runs/{run}", tags=["history"])

Since = Annotated[Decimal, Query(ge=0, le=253_402_000_000, description="Only later; seconds since 1970-01-01 UTC")]
Points = Annotated[Number, Query(ge=HISTORY_POINTS[0], le=HISTORY_POINTS[1], description="At most so many")]
Limit = Annotated[Number, Query(ge=TIMELINE_ENTRIES[0], le=TIMELINE_ENTRIES[1], description="At most so many")]
AverageName = Annotated[str | None, Query(pattern=NAME_PATTERN, description="Which average; by default the first")]

_CONDITIONAL = {"parameters": [CONDITION]}


@router.get(
    "/history",
    summary="Show how a run went",
    response_class=Response,
    openapi_extra=_CONDITIONAL,
    responses={**tagged(History), **problem_responses(RunNotFound, AverageNotFound, InvalidRequest)},
)
async def get_history(
    run: RunName,
    request: Request,
    server: Server,
    since: Since = 0.0,
    points: Points = DEFAULT_POINTS,
    average: AverageName = None,
) -> Response:
    """What was measured of the run's updates, a column each: distances of shadow and parameters, rates, times.

    ``points`` of the measurements after ``since``, evenly over time; the newest is among them. Distances and norms are
    of the run's first average; of another they are null.
    """
    found, measurements = server.registry.get(run), server.registry.measurements(run)
    succession = found.ledger.succession
    first, wanted = succession.member(None).name, succession.member(average).name
    tag = f'"{wanted}-{found.created_at!r}-{measurements.tag}"'
    if is_known(request, tag):
        return not_modified(tag)
    tell = partial(measurements.history, wanted, since=since, points=points, measured=wanted == first)
    # Not by FastAPI, which would validate 20,000 numbers on the event loop.
    return await server.workers.block(lambda: json_answer(request, json_bytes(tell()), tag))


@router.get(
    "/distances",
    summary="Show the distance of each tensor",
    response_class=Response,
    openapi_extra=_CONDITIONAL,
    responses={**tagged(Distances), **problem_responses(RunNotFound, InvalidRequest)},
)
async def get_distances(run: RunName, request: Request, server: Server) -> Response:
    """How far each tensor's shadow was from its parameters, after the newest update that was measured."""
    found, measurements = server.registry.get(run), server.registry.measurements(run)
    tag = f'"{found.created_at!r}-{measurements.tag}"'
    if is_known(request, tag):
        return not_modified(tag)
    tell = partial(measurements.distances, found.ledger.succession.member(None).name)
    return await server.workers.block(lambda: json_answer(request, json_bytes(tell()), tag))


@router.get(
    "/timeline",
    summary="Show what was done to a run",
    responses=problem_responses(RunNotFound, InvalidRequest, StorageFailed),
)
async def get_timeline(run: RunName, server: Server, since: Since = 0.0, limit: Limit = DEFAULT_ENTRIES) -> Timeline:
    """Changes of the decay, rewinds, trainers that took over, snapshots, damage: the newest entries, the newest
    last."""
    lines = server.registry.timeline(run)
    return await server.workers.block(partial(_timeline, run, lines, since, limit))


def _timeline(run: str, lines: Lines, since: float, limit: int) -> Timeline:
    """The timeline of a run as the protocol has it. Raises StorageFailed."""
    try:
        found = lines.lines(since, limit)
    except sqlite3.Error as fault:
        raise StorageFailed(f"the timeline of run {run!r} cannot be read: {fault}", retry_after=1.0) from fault
    entries = [
        TimelineEntry(line.at, line.kind, line.step, line.num_updates, line.text)  # type: ignore[arg-type]
        for line in found
    ]
    return Timeline(run, tuple(entries))
