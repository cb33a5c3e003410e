"""Routes of a run as a whole: create, list, show, change, delete.

Knows the routes and their answers. Does not know how a run works.
"""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from ema_client.errors import (
    AverageNotFound,
    AwaitingWeights,
    Forbidden,
    InvalidRequest,
    LayoutMismatch,
    RunDegraded,
    RunExists,
    RunNotFound,
    SnapshotDamaged,
    SnapshotNotFound,
    StorageDisabled,
    StorageFailed,
    Superseded,
    TooManyRuns,
)
from ema_client.protocol import RunConfig, RunInfo, RunList, Writer
from ema_service.api.auth import access_of
from ema_service.api.errors import problem_responses
from ema_service.api.limits import JSON_REFUSALS
from ema_service.api.routes.parameters import RunName, Server
from ema_service.api.schemas import RewindBody, RunConfigBody, RunPatchBody, json_body

__all__ = ["router"]

router = APIRouter(prefix="/v1/runs", tags=["runs"])


@router.post(
    "",
    status_code=201,
    summary="Create a run",
    openapi_extra=json_body(RunConfigBody),
    responses={
        200: {"model": RunInfo, "description": "The run exists with this very configuration"},
        **problem_responses(
            *JSON_REFUSALS, RunExists, TooManyRuns, Forbidden, InvalidRequest, StorageDisabled, StorageFailed
        ),
    },
)
async def create_run(request: Request, response: Response, server: Server) -> RunInfo:
    """Create a run from its configuration. The run then awaits its initial weights.

    The same configuration again changes nothing.
    """
    config = await server.workers.block(partial(_read_config, await request.body()))
    access_of(request).check("push", config.run)
    run, created = await server.workers.block(partial(server.registry.create, config))
    response.status_code = 201 if created else 200
    return run.info()


def _read_config(raw: bytes) -> RunConfig:
    """The configuration in a request's body. Raises RequestValidationError.

    Not by FastAPI, which would parse on the event loop: a layout of 200,000 tensors takes seconds.
    """
    try:
        return RunConfigBody.model_validate_json(raw).to_config()
    except ValidationError as fault:
        raise RequestValidationError(fault.errors(include_url=False, include_context=False)) from None


@router.get("", summary="List runs")
async def list_runs(request: Request, server: Server) -> RunList:
    """All runs that the token may see, oldest first."""
    access = access_of(request)
    return RunList(tuple(run.info() for run in server.registry.runs() if access.may("pull", run.config.run)))


@router.get("/{run}", summary="Show a run", responses=problem_responses(RunNotFound, InvalidRequest))
async def show_run(run: RunName, server: Server) -> RunInfo:
    """The run as it stands: decay, num_updates, step, version, size."""
    return server.registry.get(run).info()


@router.patch(
    "/{run}",
    summary="Change the decay",
    responses=problem_responses(
        *JSON_REFUSALS, RunNotFound, AverageNotFound, AwaitingWeights, RunDegraded, InvalidRequest, StorageFailed
    ),
)
async def change_run(run: RunName, body: RunPatchBody, server: Server) -> RunInfo:
    """Change the decay of one average from the next update on. The change is kept in the run's history."""
    changed = await server.workers.block(partial(server.registry.set_decay, run, body.decay, body.average))
    return changed.info()


@router.post(
    "/{run}/reset-num-updates",
    summary="Begin the warm-up anew",
    responses=problem_responses(RunNotFound, AwaitingWeights, RunDegraded, InvalidRequest, StorageFailed),
)
async def reset_num_updates(run: RunName, server: Server) -> RunInfo:
    """Set num_updates to 0; where use_num_updates is off, it stays -1."""
    return (await server.workers.block(partial(server.registry.reset_num_updates, run))).info()


@router.post(
    "/{run}/writers",
    status_code=201,
    summary="Attach a trainer",
    responses=problem_responses(RunNotFound, InvalidRequest, StorageFailed),
)
async def attach_writer(run: RunName, server: Server) -> Writer:
    """Give a trainer a number to send with each push (``Ema-Writer``).

    From now on pushes with an earlier number, and without a number, are refused: a trainer that was replaced cannot
    push.
    """
    return await server.workers.block(partial(server.registry.attach, run))


@router.post(
    "/{run}/rewind",
    summary="Go back to a snapshot",
    responses=problem_responses(
        *JSON_REFUSALS,
        RunNotFound,
        SnapshotNotFound,
        SnapshotDamaged,
        StorageDisabled,
        RunDegraded,
        AverageNotFound,
        LayoutMismatch,
        Forbidden,
        InvalidRequest,
        StorageFailed,
        Superseded,
    ),
)
async def rewind_run(run: RunName, request: Request, body: RewindBody, server: Server) -> RunInfo:
    """Make the snapshot's weights, step, counter and decays the current ones, in a new epoch.

    For a trainer that resumed from an older checkpoint. With another run's snapshot: branch from that run; the run may
    have no weights yet. Without a snapshot: let a degraded run go on with the version that is there.
    """
    registry, snapshot, source = server.registry, body.snapshot, body.run
    if source is not None:
        if snapshot is None:
            raise InvalidRequest(f"run: {source!r} was given without a snapshot of it")
        access_of(request).check("pull", source)
    go = partial(registry.accept, run) if snapshot is None else partial(registry.rewind, run, snapshot, source)
    return (await server.workers.block(go)).info()


@router.delete(
    "/{run}", status_code=204, summary="Delete a run", responses=problem_responses(RunNotFound, InvalidRequest)
)
async def delete_run(run: RunName, server: Server) -> None:
    """Delete the run with its weights and all its snapshots. There is no way back."""
    await server.workers.block(partial(server.registry.delete, run))
