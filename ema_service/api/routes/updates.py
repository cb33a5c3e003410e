"""Routes that take weights in: the initial shadow, and updates.

The order is that of the data: admit, reserve staging, receive and average as it comes, commit. Until the last, nothing
of the run has changed.
Knows that order and the answers. Does not know bytes (filling, UpdateBody) or what an update computes (run).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar, cast

from fastapi import APIRouter, Path, Query, Request, Response

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
    SegmentUnusable,
    StaleStep,
    StepConflict,
    StorageFailed,
    Superseded,
    WeightsExist,
)
from ema_client.protocol import (
    HEADER_SEGMENT,
    MAX_PARTS,
    MAX_STEP,
    SECRET_BYTES,
    RunInfo,
    Segment,
    UpdateResult,
    UpdateStatus,
)
from ema_service.api.context import Context, Number, RunName, Server, Step, WriterNumber
from ema_service.api.errors import problem_responses
from ema_service.api.transfer import filling, lending
from ema_service.api.transfer.segments import named, take_over
from ema_service.bodies import Body, UpdateBody
from ema_service.memory import Staged
from ema_service.runs import Part, Parts, Run, Terms, Update
from ema_service.runs.parts import Outcome

__all__ = ["router"]

router = APIRouter(prefix="/v1/runs/{run}", tags=["updates"])

T = TypeVar("T")

# For the API page alone: FastAPI does not look at the header, as a bad one has an answer of its own (segment_unusable).
_SEGMENT_HEADER: dict[str, Any] = {
    "name": HEADER_SEGMENT,
    "in": "header",
    "required": False,
    "description": "In place of a body, on the server's host: where it lies in shared memory (PROTOCOL.md)",
    "schema": {"type": "string"},
    "example": f"pid=4242, fd=7, offset=4096, length=1073745920, secret={bytes(SECRET_BYTES).hex()}",
}
_SAFETENSORS_BODY: dict[str, Any] = {
    "parameters": [_SEGMENT_HEADER],
    "requestBody": {
        "required": True,
        "description": "The run's tensors as one safetensors stream, as safetensors.torch.save_file writes them",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
}
_PART_BODY: dict[str, Any] = {
    "parameters": [_SEGMENT_HEADER],
    "requestBody": {
        "required": True,
        "description": "Slices of the run's tensors as one safetensors stream; its metadata `ema.slices` says which: "
        '{"w": [[[0, 512], [0, 1024]]]}. A tensor not named there is whole',
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
}
_STAGED: dict[int | str, dict[str, Any]] = {202: {"description": "Kept until the other parts come"}}

PartIndex = Annotated[int, Path(ge=0, lt=MAX_PARTS, description="Which part, from 0")]
PartCount = Annotated[int, Query(ge=1, le=MAX_PARTS, description="How many parts there are")]
PartGroup = Annotated[
    str, Query(max_length=128, description="Parts of one group only are put together: one start of one trainer")
]

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
    SegmentUnusable,
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
    num_updates: Annotated[Number | None, Query(ge=0, le=MAX_STEP, description="Counter to carry on from")] = None,
    step: Annotated[Number | None, Query(ge=0, le=MAX_STEP, description="The trainer's step of these weights")] = None,
) -> RunInfo:
    """Make the body the first shadow of every average, as LitEma's constructor clones the parameters."""
    found = server.registry.get(run)
    staged = await server.stage(request, found.layout)
    await _receive(request, server, found, staged)
    await server.compute(
        partial(_release_after, staged, partial(found.initialise, staged, num_updates=num_updates, step=step))
    )
    _note_link(request, server, found)
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
    staged = await server.stage(request, found.layout, len(found.config.averages))
    update = found.begin(step, staged, writer)
    await _receive(request, server, found, staged, server.background(update.work.advance))
    commit = partial(_release_after, staged, partial(_commit, server, found, update))
    result = commit() if found.quick else await server.compute(commit)
    server.metrics.updates.labels("applied" if result.applied else "repeated").inc()
    _note_link(request, server, found)
    return result


@router.put(
    "/weights/parts/{part}",
    summary="Give one part of the initial weights",
    openapi_extra=_PART_BODY,
    responses={**_STAGED, **problem_responses(*_BODY_ERRORS, WeightsExist, StepConflict, Superseded)},
)
async def put_weights_part(
    run: RunName,
    part: PartIndex,
    of: PartCount,
    request: Request,
    response: Response,
    server: Server,
    group: PartGroup = "",
    num_updates: Annotated[Number | None, Query(ge=0, le=MAX_STEP, description="Counter to carry on from")] = None,
    step: Annotated[Number | None, Query(ge=0, le=MAX_STEP, description="The trainer's step of these weights")] = None,
) -> RunInfo | UpdateStatus:
    """One of ``of`` parts. The one that completes them makes them the first shadow; the others answer 202."""
    found = server.registry.get(run)
    outcome, result = await _receive_part(request, server, run, None, part, Terms(of, group, num_updates, step))
    if outcome != "staged":
        return found.info() if result is None else cast(RunInfo, result)
    response.status_code = 202
    return UpdateStatus(step or 0, "staged", server.registry.parts(run).staged(None) or ())


@router.put(
    "/updates/{step}/parts/{part}",
    summary="Push one part of an update",
    openapi_extra=_PART_BODY,
    responses={
        **_STAGED,
        **problem_responses(*_BODY_ERRORS, AwaitingWeights, Fenced, StaleStep, StepConflict, Superseded),
    },
)
async def put_update_part(
    run: RunName,
    step: Step,
    part: PartIndex,
    of: PartCount,
    request: Request,
    response: Response,
    server: Server,
    group: PartGroup = "",
    writer: WriterNumber = None,
) -> UpdateResult | UpdateStatus:
    """One of ``of`` parts of one step. The one that completes them applies the update, as one; the others answer 202.

    The same part with the same bytes again changes nothing; with other bytes it is a conflict.
    """
    found = server.registry.get(run)
    outcome, result = await _receive_part(request, server, run, step, part, Terms(of, group, writer=writer))
    if outcome == "staged":
        response.status_code = 202
        return UpdateStatus(step, "staged", server.registry.parts(run).staged(step) or ())
    answer = found.repeated(step, writer) if result is None else cast(UpdateResult, result)
    server.metrics.updates.labels("applied" if answer.applied else "repeated").inc()
    return answer


@router.get(
    "/updates/{step}",
    summary="Ask about one update",
    responses=problem_responses(RunNotFound, InvalidRequest),
)
async def get_update(run: RunName, step: Step, server: Server) -> UpdateStatus:
    """Whether the step was applied, among the latest 1024 steps of this server's life, or which of its parts are there;
    otherwise it is unknown."""
    status = server.registry.get(run).status_of(step)
    staged = None if status.state == "applied" else server.registry.parts(run).staged(step)
    return status if staged is None else UpdateStatus(step, "staged", staged)


async def _receive_part(
    request: Request, server: Context, run: str, step: int | None, index: int, terms: Terms
) -> tuple[Outcome, UpdateResult | RunInfo | None]:
    """Receive a part and, where it is the last one missing, have the whole applied: then there is a result."""
    found, parts = server.registry.get(run), server.registry.parts(run)
    averages = 1 if step is None else len(found.config.averages)
    reserve = partial(server.registry.staging.reserve, found.layout, averages)
    begin = partial(parts.begin, step, index, terms, reserve)
    if parts.admit(step, index, terms):
        server.registry.staging.needed(found.layout, averages)
        part = await server.pushers.take(request, begin)
    else:
        # It has its staging, and may be what those who wait for room wait for.
        part = begin()
    header = request.headers.get(HEADER_SEGMENT)
    try:
        if header is None:
            part.announce(filling.content_length(request))
            await filling.receive(request, part, server.receivers, silence=server.settings.body_timeout)
        else:
            segment = _segment(request, found, header)
            part.announce(segment.length)
            await _take_over(server, found, segment, part)
        outcome = parts.complete(part)
    except BaseException:
        parts.give_up(part)
        raise
    server.metrics.received.inc(part.received)
    result = await server.compute(partial(_apply, server, parts, part)) if outcome == "complete" else None
    _note_link(request, server, found)
    return outcome, result


async def _receive(
    request: Request, server: Context, run: Run, staged: Staged, on_data: Callable[[int], None] | None = None
) -> None:
    header = request.headers.get(HEADER_SEGMENT)
    try:
        if header is None:
            body = UpdateBody(staged, filling.content_length(request), on_data=on_data)
            await filling.receive(request, body, server.receivers, silence=server.settings.body_timeout)
        else:
            segment = _segment(request, run, header)
            await _take_over(server, run, segment, UpdateBody(staged, segment.length, on_data=on_data))
    except BaseException:
        staged.release()
        raise
    server.metrics.received.inc(staged.layout.param_bytes)


def _segment(request: Request, run: Run, header: str) -> Segment:
    """The shared memory that a request names in place of a body."""
    if filling.content_length(request) or "transfer-encoding" in request.headers:
        raise InvalidRequest(f"a request with {HEADER_SEGMENT} has a body as well; it is one or the other")
    try:
        return named(header, same_host=lending.link_of(request) != "TCP")
    except SegmentUnusable as fault:
        run.unshared = fault.detail
        raise


async def _take_over(server: Context, run: Run, segment: Segment, body: Body) -> None:
    try:
        await server.block(partial(take_over, segment, body, server.helpers, server.mappings))
    except SegmentUnusable as fault:
        run.unshared = fault.detail
        raise


def _note_link(request: Request, server: Context, run: Run) -> None:
    """Say how the push came, now that nothing was wrong with it."""
    shared = HEADER_SEGMENT in request.headers
    link = "shared memory" if shared else lending.link_of(request)
    server.metrics.pushes.labels(link).inc()
    if shared:
        run.unshared = None
    run.link = link + (f"; shared memory was refused: {run.unshared}" if run.unshared else "")


def _commit(server: Context, run: Run, update: Update) -> UpdateResult:
    with server.metrics.commit_seconds.time():
        return run.commit(update)


def _apply(server: Context, parts: Parts, part: Part) -> UpdateResult | RunInfo:
    with server.metrics.commit_seconds.time():
        return parts.apply(part)


def _release_after(staged: Staged, work: Callable[[], T]) -> T:
    try:
        return work()
    finally:
        staged.release()
