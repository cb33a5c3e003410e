"""Routes that add an average to a run that exists, and remove one.

Knows the routes and their answers. Does not know how a run changes its averages.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Path, Response

from ema_client.errors import (
    AverageExists,
    AverageNotFound,
    InvalidRequest,
    LastAverage,
    Overloaded,
    RunDegraded,
    RunNotFound,
    StorageFailed,
    Superseded,
    TooManyAverages,
)
from ema_client.protocol import NAME_PATTERN, RunInfo
from ema_service.api.errors import problem_responses
from ema_service.api.limits import JSON_REFUSALS, takes_json
from ema_service.api.routes.parameters import Key, RunName, Server
from ema_service.api.schemas import CHANGE_BYTES, AverageConfigBody

__all__ = ["router"]

router = APIRouter(prefix="/v1/runs/{run}/averages", tags=["runs"])

AverageName = Annotated[str, Path(pattern=NAME_PATTERN, description="Name of the average", examples=["long"])]

_ERRORS = (RunNotFound, RunDegraded, InvalidRequest, StorageFailed, Superseded)


@router.post(
    "",
    status_code=201,
    summary="Add an average",
    openapi_extra=takes_json(CHANGE_BYTES),
    responses={
        200: {"model": RunInfo, "description": "The run has this very average"},
        **problem_responses(*JSON_REFUSALS, *_ERRORS, AverageExists, TooManyAverages, Overloaded),
    },
)
async def add_average(
    run: RunName, body: AverageConfigBody, response: Response, server: Server, key: Key = None
) -> RunInfo:
    """Feed one more average from the next update on: it begins with that update's parameters, bit for bit.

    Until then it has no weights to read. The same average again changes nothing.
    """
    if server.host:
        info, added = await server.host.add_average(run, body.to_config(), key)
        response.status_code = 201 if added else 200
        return info
    # In the turn of files, as a removal.
    changed, added = await server.file(run, partial(server.registry.add_average, run, body.to_config(), key))
    response.status_code = 201 if added else 200
    return changed.info()


@router.delete(
    "/{name}",
    status_code=204,
    summary="Remove an average",
    responses=problem_responses(*_ERRORS, AverageNotFound, LastAverage),
)
async def remove_average(run: RunName, name: AverageName, server: Server, key: Key = None) -> None:
    """Remove an average with its weights; a reader that has them reads on, and snapshots keep theirs."""
    if server.host:
        await server.host.remove_average(run, name, key)
        return
    # In the turn of files, and not of updates, which go on while a version is brought to the medium.
    await server.file(run, partial(server.registry.remove_average, run, name, key))
