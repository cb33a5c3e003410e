"""Routes of snapshots: make one (copy_to on the server), list, show, delete. weights.py serves their weights.

Knows the routes and their answers. Does not know how a snapshot is kept.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from ema_client.errors import (
    AwaitingWeights,
    Forbidden,
    InvalidRequest,
    Overloaded,
    RunNotFound,
    SnapshotDamaged,
    SnapshotExists,
    SnapshotNotFound,
    StorageDisabled,
    StorageFailed,
    Superseded,
    SynthesisRefused,
    TooManySnapshots,
    VersionGone,
)
from ema_client.protocol import MAX_STEP, SnapshotInfo, SnapshotList
from ema_service.api.auth import access_of
from ema_service.api.context import Context
from ema_service.api.errors import problem_responses
from ema_service.api.routes.parameters import CreatedAt, Key, Number, RunName, Server, SnapshotName
from ema_service.api.synthesis import Asked, AskedFor, recipe_of, work_out
from ema_service.runs import Run

__all__ = ["router"]

router = APIRouter(prefix="/v1/runs/{run}/snapshots", tags=["snapshots"])


@router.put(
    "/{name}",
    status_code=201,
    summary="Take a snapshot",
    responses={
        200: {"model": SnapshotInfo, "description": "The snapshot exists and is of this very version"},
        **problem_responses(
            RunNotFound,
            AwaitingWeights,
            Forbidden,
            SnapshotExists,
            TooManySnapshots,
            StorageDisabled,
            InvalidRequest,
            StorageFailed,
            Superseded,
            SynthesisRefused,
            SnapshotDamaged,
            VersionGone,
            Overloaded,
        ),
    },
)
async def put_snapshot(
    run: RunName,
    name: SnapshotName,
    request: Request,
    response: Response,
    server: Server,
    keep: Annotated[Number | None, Query(ge=1, le=MAX_STEP, description="How many of its series stay")] = None,
    key: Key = None,
    *,
    asked: AskedFor,
) -> SnapshotInfo:
    """Copy all averages, as they are now, to files under this name.

    The snapshot is on disk when the request is answered, and is never changed after. ``keep``: of the snapshots whose
    names are the same up to the last "-", only so many, the newest, stay. With ``sigma_rel``, ``decay``, ``half_life``
    or ``window`` the snapshot is of one average that the run did not track, worked out of its ring.
    """
    if keep is not None:
        # The rest of the series is deleted: a reader may not.
        access_of(request).check("push", run)
    found, snapshots = server.registry.get(run), server.registry.snapshots(run)
    if asked.targets:
        asked.one()
        if keep is not None:
            raise InvalidRequest("keep: does not go with sigma_rel, decay, half_life or window")
        if asked.recipe or asked.version:
            raise InvalidRequest("recipe, version: are for weights that are read, and do not go with a snapshot")
        info, created = await _keep_average(request, server, found, asked, name, key)
    elif server.host:
        info, created = await server.host.take_snapshot(run, name, keep=keep, key=key)
    else:
        info, created = await server.file(run, partial(snapshots.take, name, found.ready_state, keep=keep, key=key))
    response.status_code = 201 if created else 200
    return info


async def _keep_average(
    request: Request, server: Context, run: Run, asked: Asked, name: str, key: str | None
) -> tuple[SnapshotInfo, bool]:
    """Keep what is asked for as a snapshot, on all hosts where there are several, and say whether the snapshot is
    new."""
    if server.host:
        return await server.host.keep_average(run.config.run, name, partial(recipe_of, server, run, asked), key)
    snapshots = server.registry.snapshots(run.config.run)
    with ExitStack() as source:
        [recipe], mixture = await work_out(request, server, run, asked, source)
        work = partial(snapshots.keep, name, run.layout.shadows, recipe.info, mixture.read, key=key)
        return await server.file(run.config.run, work)


@router.get(
    "",
    summary="List snapshots",
    responses=problem_responses(RunNotFound, StorageDisabled, InvalidRequest, StorageFailed),
)
async def list_snapshots(run: RunName, server: Server) -> SnapshotList:
    """The run's snapshots, oldest first."""
    return SnapshotList(tuple(await server.workers.block(server.registry.snapshots(run).all)))


@router.get(
    "/{name}",
    summary="Show a snapshot",
    responses=problem_responses(RunNotFound, SnapshotNotFound, StorageDisabled, InvalidRequest, StorageFailed),
)
async def show_snapshot(run: RunName, name: SnapshotName, server: Server) -> SnapshotInfo:
    """Step, version and size of the snapshot."""
    return await server.workers.block(partial(server.registry.snapshots(run).find, name))


@router.delete(
    "/{name}",
    status_code=204,
    summary="Delete a snapshot",
    responses=problem_responses(RunNotFound, SnapshotNotFound, StorageDisabled, InvalidRequest, StorageFailed),
)
async def delete_snapshot(run: RunName, name: SnapshotName, server: Server, created_at: CreatedAt = None) -> None:
    """Delete the snapshot's files. A download under way goes on to its end."""
    if server.host:
        await server.host.delete_snapshot(run, name, created_at)
    else:
        await server.file(run, partial(server.registry.snapshots(run).delete, name, created_at))
