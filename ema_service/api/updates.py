"""Routes that take weights in: the initial shadow, and updates.

The order is that of the data: admit, reserve staging, receive and average as it comes, commit. Until the last, nothing
of the run has changed.
Knows that order and the answers. Does not know bytes (ingest, UpdateBody) or what an update computes (run).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request

from ema_client.errors import (
    AwaitingWeights,
    BodyTooLarge,
    Fenced,
    InvalidRequest,
    LayoutMismatch,
    MalformedBody,
    NonFinite,
    Overloaded,
    RequestTimeout,
    RunDegraded,
    RunNotFound,
    StaleStep,
    StepConflict,
    StorageFailed,
    Superseded,
    WeightsExist,
)
from ema_client.protocol import MAX_STEP, RunInfo, UpdateResult, UpdateStatus
from ema_service.api import ingest
from ema_service.api.context import Context, RunName, Server, Step, WriterNumber
from ema_service.api.errors import problem_responses
from ema_service.runs import Run, Staged, Update

__all__ = ["router"]

router = APIRouter(prefix="/v1/runs/{run}", tags=["updates"])

T = TypeVar("T")

_SAFETENSORS_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The run's tensors as one safetensors stream, as safetensors.torch.save_file writes them",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_BODY_ERRORS = (
    RunNotFound,
    RequestTimeout,
    BodyTooLarge,
    InvalidRequest,
    MalformedBody,
    LayoutMismatch,
    NonFinite,
    Overloaded,
    RunDegraded,
    StorageFailed,
)


@router.put(
    "/weights",
    summary="Give the initial weights",
    openapi_extra=_SAFETENSORS_BODY,
    responses=problem_responses(*_BODY_ERRORS, WeightsExist),
)
async def put_weights(
    run: RunName,
    request: Request,
    server: Server,
    num_updates: Annotated[int | None, Query(ge=0, le=MAX_STEP, description="Counter to carry on from")] = None,
    step: Annotated[int | None, Query(ge=0, le=MAX_STEP, description="The trainer's step of these weights")] = None,
) -> RunInfo:
    """Make the body the first shadow of every average, as LitEma's constructor clones the parameters."""
    found = server.registry.get(run)
    staged = server.registry.staging.reserve(found.layout)
    await _receive(request, server, staged)
    await server.compute(
        partial(_release_after, staged, partial(found.initialise, staged, num_updates=num_updates, step=step))
    )
    return found.info()


@router.put(
    "/updates/{step}",
    summary="Push one update",
    openapi_extra=_SAFETENSORS_BODY,
    responses=problem_responses(*_BODY_ERRORS, AwaitingWeights, Fenced, StaleStep, StepConflict, Superseded),
)
async def put_update(
    run: RunName, step: Step, request: Request, server: Server, writer: WriterNumber = None
) -> UpdateResult:
    """Apply the parameters as of ``step``, exactly once and all or nothing.

    The same bytes at the run's latest step again answer ``applied: false``; other bytes there are a conflict.
    """
    found = server.registry.get(run)
    found.admit(step, writer)
    staged = server.registry.staging.reserve(found.layout, len(found.config.averages))
    update = found.begin(step, staged, writer)
    await _receive(request, server, staged, server.background(update.work.advance))
    result = await server.compute(partial(_release_after, staged, partial(_commit, server, found, update)))
    server.metrics.updates.labels("applied" if result.applied else "repeated").inc()
    return result


@router.get(
    "/updates/{step}",
    summary="Ask about one update",
    responses=problem_responses(RunNotFound, InvalidRequest),
)
async def get_update(run: RunName, step: Step, server: Server) -> UpdateStatus:
    """Whether the step was applied, among the latest 1024 steps of this server's life; otherwise it is unknown."""
    return server.registry.get(run).status_of(step)


async def _receive(
    request: Request, server: Context, staged: Staged, on_data: Callable[[int], None] | None = None
) -> None:
    try:
        await ingest.receive(request, staged, silence=server.settings.body_timeout, on_data=on_data)
    except BaseException:
        staged.release()
        raise
    server.metrics.received.inc(staged.layout.param_bytes)


def _commit(server: Context, run: Run, update: Update) -> UpdateResult:
    with server.metrics.commit_seconds.time():
        return run.commit(update)


def _release_after(staged: Staged, work: Callable[[], T]) -> T:
    try:
        return work()
    finally:
        staged.release()
