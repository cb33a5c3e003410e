"""Routes of a run as a whole: create, list, show, change, delete.

Knows the routes and their answers. Does not know how a run works.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated

import xxhash
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from ema_client.errors import (
    AverageNotFound,
    AwaitingWeights,
    Forbidden,
    InvalidRequest,
    LayoutMismatch,
    Overloaded,
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
from ema_client.protocol import (
    MAX_STEP,
    MAX_TENSORS,
    NAME_PATTERN,
    RunConfig,
    RunInfo,
    RunLayout,
    RunList,
    Writer,
    to_json,
)
from ema_service.api.answers import CONDITION, is_known, json_answer, not_modified, tagged
from ema_service.api.auth import access_of
from ema_service.api.errors import problem_responses
from ema_service.api.limits import JSON_REFUSALS, takes_json
from ema_service.api.routes.parameters import CreatedAt, Key, Number, RunName, Server
from ema_service.api.schemas import (
    CHANGE_BYTES,
    CONFIG_BYTES,
    RewindBody,
    RunConfigBody,
    RunPatchBody,
    json_body,
)
from ema_service.averaging import BLOCK_BYTES
from ema_service.cluster.messages import Adjustment
from ema_service.runs import Run
from ema_service.runs.claims import MAX_RUNS

__all__ = ["router"]

router = APIRouter(prefix="/v1/runs", tags=["runs"])

#: Runs told of before another request has its turn: 20 take a millisecond or two.
_AT_ONCE = 20
#: Colons in a configuration: three for each tensor, and some in names. Each unknown member costs the parser 500 bytes,
#: so that 32 MiB of them would take a gigabyte.
_MAX_COLONS = 4 * MAX_TENSORS


@router.post(
    "",
    status_code=201,
    summary="Create a run",
    openapi_extra=takes_json(CONFIG_BYTES, json_body(RunConfigBody)),
    responses={
        200: {"model": RunInfo, "description": "The run exists with this very configuration"},
        **problem_responses(
            *JSON_REFUSALS,
            RunExists,
            TooManyRuns,
            Forbidden,
            InvalidRequest,
            StorageDisabled,
            StorageFailed,
            Superseded,
            Overloaded,
        ),
    },
)
async def create_run(request: Request, response: Response, server: Server) -> RunInfo:
    """Create a run from its configuration. The run then awaits its initial weights.

    The same configuration again changes nothing. A run of another configuration that never had weights gives way.
    """
    config = await server.workers.block(partial(_read_config, await request.body()))
    access_of(request).check("push", config.run)
    if server.host:
        run, created = await server.host.create(config)
    else:
        async with server.turn(config.run, "creation"):
            run, created = await server.workers.block(partial(server.registry.create, config))
    response.status_code = 201 if created else 200
    return run.info()


def _read_config(raw: bytes) -> RunConfig:
    """The configuration in a request's body. Raises RequestValidationError, InvalidRequest.

    Not by FastAPI, which would parse on the event loop: a layout of 200,000 tensors takes seconds.
    """
    if raw.count(b":") > _MAX_COLONS:
        raise InvalidRequest(f"the configuration has more members than {MAX_TENSORS} tensors can have")
    try:
        return RunConfigBody.model_validate_json(raw).to_config()
    except ValidationError as fault:
        raise RequestValidationError(fault.errors(include_url=False, include_context=False)) from None


@router.get(
    "",
    summary="List runs",
    response_class=Response,
    openapi_extra={"parameters": [CONDITION]},
    responses={**tagged(RunList), **problem_responses(InvalidRequest)},
)
async def list_runs(
    request: Request,
    server: Server,
    limit: Annotated[Number | None, Query(ge=1, le=MAX_RUNS, description="Most runs of this page")] = None,
    after: Annotated[str | None, Query(pattern=NAME_PATTERN, description="The last run of the page before")] = None,
) -> Response:
    """All runs that the token may see, oldest first; with ``limit`` or ``after`` a page of them, by name.

    Packed where the reader takes gzip, and 304 without a body where nothing moved since the answer of If-None-Match.
    """
    access = access_of(request)
    found = [run for run in server.registry.runs() if access.may("pull", run.config.run)]
    if limit is not None or after is not None:
        found = [run for run in found if run.config.run > (after or "")]
        found = sorted(found, key=lambda run: run.config.run)[:limit]
    raw = b'{"runs":[%b]}' % b",".join([info async for info in _infos(found)])
    tag = f'"{xxhash.xxh3_128_hexdigest(raw)}"'
    if is_known(request, tag):
        return not_modified(tag)
    # Packing 10 MB takes a tenth of a second.
    return await server.workers.block(partial(json_answer, request, raw, tag))


async def _infos(runs: Sequence[Run]) -> AsyncIterator[bytes]:
    """What is told of each run, as JSON. Others get the event loop in between: of 10,000 runs it takes seconds."""
    for number, run in enumerate(runs):
        if number % _AT_ONCE == 0:
            await asyncio.sleep(0)
        yield json.dumps(to_json(run.info()), ensure_ascii=False, separators=(",", ":")).encode()


@router.get("/{run}", summary="Show a run", responses=problem_responses(RunNotFound, InvalidRequest))
async def show_run(run: RunName, server: Server) -> RunInfo:
    """The run as it stands: decay, num_updates, step, version, size."""
    return server.registry.get(run).info()


@router.get(
    "/{run}/layout",
    summary="Show a run's tensors",
    response_model=RunLayout,
    responses=problem_responses(RunNotFound, InvalidRequest),
)
async def show_layout(run: RunName, server: Server) -> Response:
    """Names, shapes and dtypes of the tensors of an update, and which of them are copied."""
    found = server.registry.get(run)
    # Not by FastAPI, on the event loop, as in create_run().
    raw = await server.workers.block(partial(_layout_json, found, server.settings.max_lanes))
    return Response(raw, media_type="application/json")


def _layout_json(run: Run, lanes: int) -> bytes:
    config, layout = run.config, run.layout
    told = RunLayout(config.run, config.layout, config.copied, layout.digest)
    if layout.divisible and lanes > 1:
        told = replace(told, block_bytes=BLOCK_BYTES, lanes=lanes)
    return json.dumps(to_json(told)).encode()


@router.get(
    "/{run}/config",
    summary="Show a run's configuration",
    response_model=RunConfig,
    responses=problem_responses(RunNotFound, InvalidRequest, StorageFailed),
)
async def show_config(run: RunName, server: Server) -> Response:
    """With which the run was created; of a run on several hosts, that of the whole run."""
    raw = await server.workers.block(lambda: json.dumps(to_json(server.registry.whole(run))).encode())
    return Response(raw, media_type="application/json")


@router.patch(
    "/{run}",
    summary="Change the decay",
    openapi_extra=takes_json(CHANGE_BYTES),
    responses=problem_responses(
        *JSON_REFUSALS,
        RunNotFound,
        AverageNotFound,
        AwaitingWeights,
        RunDegraded,
        InvalidRequest,
        StorageFailed,
        Superseded,
    ),
)
async def change_run(run: RunName, body: RunPatchBody, server: Server, key: Key = None) -> RunInfo:
    """Change the decay of one average from the next update on. The change is kept in the run's timeline."""
    if server.host:
        return await server.host.adjust(run, Adjustment("decay", body.decay, body.average), key)
    changed = await server.steer(run, partial(server.registry.set_decay, run, body.decay, body.average, key))
    return changed.info()


@router.post(
    "/{run}/reset-num-updates",
    summary="Begin the warm-up anew",
    responses=problem_responses(RunNotFound, AwaitingWeights, RunDegraded, InvalidRequest, StorageFailed, Superseded),
)
async def reset_num_updates(run: RunName, server: Server, key: Key = None) -> RunInfo:
    """Set num_updates to 0; where use_num_updates is off, it stays -1."""
    if server.host:
        return await server.host.adjust(run, Adjustment("reset"), key)
    return (await server.steer(run, partial(server.registry.reset_num_updates, run, key))).info()


@router.post(
    "/{run}/writers",
    status_code=201,
    summary="Attach a trainer",
    responses=problem_responses(RunNotFound, InvalidRequest, StorageFailed, Superseded),
)
async def attach_writer(run: RunName, server: Server, key: Key = None) -> Writer:
    """Give a trainer a number to send with each push (``Ema-Writer``).

    From now on pushes with an earlier number, and without a number, are refused: a trainer that was replaced cannot
    push.
    """
    if server.host:
        return await server.host.attach(run, key)
    return await server.steer(run, partial(server.registry.attach, run, key))


@router.delete(
    "/{run}/writers/{writer}",
    summary="Say that a training is over",
    responses=problem_responses(RunNotFound, InvalidRequest, Superseded),
)
async def detach_writer(
    run: RunName,
    writer: Annotated[Number, Path(ge=1, le=MAX_STEP, description="What attaching gave this trainer")],
    server: Server,
) -> RunInfo:
    """The trainer with this number sends no more updates: nobody need wait for them (``ended_at``).

    Nothing is refused for that. The next trainer that attaches, and the next update, take it back; the number of a
    trainer that was replaced changes nothing. A host of a cluster notes it for itself alone: send it to each.
    """
    return (await server.steer(run, partial(server.registry.detach, run, writer))).info()


@router.post(
    "/{run}/rewind",
    summary="Go back to a snapshot",
    openapi_extra=takes_json(CHANGE_BYTES),
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
async def rewind_run(
    run: RunName,
    request: Request,
    body: RewindBody,
    server: Server,
    key: Key = None,
    created_at: CreatedAt = None,
) -> RunInfo:
    """Make the snapshot's weights, step, counter and decays the current ones, in a new epoch.

    For a trainer that resumed from an older checkpoint. With another run's snapshot: branch from that run; the run may
    have no weights yet. Without a snapshot: let a degraded run go on with the version that is there.
    """
    registry, snapshot, source = server.registry, body.snapshot, body.run
    if source is not None:
        if snapshot is None:
            raise InvalidRequest(f"run: {source!r} was given without a snapshot of it")
        access_of(request).check("pull", source)
    if server.host:
        if snapshot is None:
            return await server.host.accept(run, key, created_at=created_at)
        return await server.host.rewind(run, snapshot, key, source=source, created_at=created_at)
    go = (
        partial(registry.accept, run, key, created_at=created_at)
        if snapshot is None
        else partial(registry.rewind, run, snapshot, key, source=source, created_at=created_at)
    )
    return (await server.file(run, go)).info()


@router.delete(
    "/{run}",
    status_code=204,
    summary="Delete a run",
    responses=problem_responses(RunNotFound, InvalidRequest, StorageFailed, Superseded),
)
async def delete_run(run: RunName, server: Server, created_at: CreatedAt = None) -> None:
    """Delete the run with its weights and all its snapshots. There is no way back."""
    if server.host:
        await server.host.delete(run, created_at)
    else:
        await server.file(run, partial(server.registry.delete, run, created_at))
