"""Routes that receive weights: the initial shadow, and updates.

The order is that of the data: admit, take staging, receive and average at once, commit (pushes). Until the commit
nothing of the run has changed.

Knows that order and the answers. Does not know bytes, or whether an update counts (runs).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from ema_client.errors import (
    AwaitingWeights,
    BodyTooLarge,
    DigestMismatch,
    EmaError,
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
    DIGEST_FOLLOWS,
    HEADER_DIGEST,
    HEADER_LAYOUT,
    HEADER_PUSH,
    HEADER_SEGMENT,
    MAX_PARTS,
    MAX_STEP,
    SECRET_BYTES,
    RunInfo,
    UpdateResult,
    UpdateStatus,
    to_json,
)
from ema_service.api.context import Context
from ema_service.api.errors import problem_responses
from ema_service.api.pushes import PartialPush, Push, StretchPush
from ema_service.api.routes.direct import DirectUpdates
from ema_service.api.routes.parameters import (
    CreatedAt,
    Number,
    PushKey,
    Replaces,
    RunName,
    Server,
    Step,
    WriterNumber,
)
from ema_service.runs import Run, Terms
from ema_service.runs.gathering import Key, PartStretch
from ema_service.runs.parts import Outcome
from ema_service.runs.stretches import check_bounds, check_part_bounds

if TYPE_CHECKING:
    from ema_service.cluster.hosting.host import Host
    from ema_service.cluster.hosting.shard_run import ShardRun

__all__ = ["DIRECT", "router"]

router = APIRouter(prefix="/v1/runs/{run}", tags=["updates"])

# For the API's documentation alone: FastAPI does not check the header, as a bad one has an answer of its own
# (segment_unusable).
_SEGMENT_HEADER: dict[str, Any] = {
    "name": HEADER_SEGMENT,
    "in": "header",
    "required": False,
    "description": "In place of a body, on the server's host: where it lies in shared memory (PROTOCOL.md)",
    "schema": {"type": "string"},
    "example": f"pid=4242, fd=7, offset=4096, length=1073745920, secret={bytes(SECRET_BYTES).hex()}",
}
_DIGEST_HEADER: dict[str, Any] = {
    "name": HEADER_DIGEST,
    "in": "header",
    "required": False,
    "description": "Whether a digest of 16 bytes follows the body's data (PROTOCOL.md)",
    "schema": {"type": "string", "enum": [DIGEST_FOLLOWS]},
}
_SAFETENSORS_BODY: dict[str, Any] = {
    "parameters": [_SEGMENT_HEADER, _DIGEST_HEADER],
    "requestBody": {
        "required": True,
        "description": "The run's tensors as one safetensors stream, as safetensors.torch.save_file writes them",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
}
_PART_BODY: dict[str, Any] = {
    "parameters": [_SEGMENT_HEADER, _DIGEST_HEADER],
    "requestBody": {
        "required": True,
        "description": "Slices of the run's tensors as one safetensors stream; its metadata `ema.slices` says which: "
        '{"w": [[[0, 512], [0, 1024]]]}. A tensor not named there is whole',
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
}
_STRETCH_BODY: dict[str, Any] = {
    "parameters": [_DIGEST_HEADER],
    "requestBody": {
        "required": True,
        "description": "Bytes of the run's parameters as they lie one behind the other in the layout's order",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
}
_PART_STRETCH_BODY: dict[str, Any] = {
    "parameters": [_DIGEST_HEADER],
    "requestBody": {
        "required": True,
        "description": "A part of these bytes alone: the slices that bytes `start` to `stop` of the part's data are",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
}
_STAGED: dict[int | str, dict[str, Any]] = {202: {"model": UpdateStatus, "description": "Kept until the others come"}}

PartIndex = Annotated[Number, Path(ge=0, le=MAX_PARTS - 1, description="Which part, from 0")]
PartCount = Annotated[Number, Query(ge=1, le=MAX_PARTS, description="How many parts there are")]
PartGroup = Annotated[
    str, Query(max_length=128, description="Parts of one group only are put together: one start of one trainer")
]

StretchStart = Annotated[Number, Path(ge=0, le=MAX_STEP, description="The stretch's first byte, of a whole block")]
StretchAttempt = Annotated[
    Number,
    Query(ge=0, le=MAX_STEP, description="Higher at each attempt at a stretch: an earlier one ends no later one"),
]
PartSize = Annotated[Number, Query(ge=1, le=MAX_STEP, description="Bytes of the part's tensors in all its stretches")]
StretchStop = Annotated[Number, Path(ge=1, le=MAX_STEP, description="The byte behind the stretch's last")]
StretchGroup = Annotated[
    str, Query(min_length=1, max_length=128, description="Stretches of one group only are put together: one try")
]
StretchLayout = Annotated[
    str | None, Header(alias=HEADER_LAYOUT, description="The digest that the run's layout tells, of what is sent")
]

#: What became of a piece of an update, or of initial weights; where it was the last one, the result as well.
_Pushed = tuple[Outcome, UpdateResult | RunInfo | None]

_BODY_ERRORS = (
    RunNotFound,
    RequestTimeout,
    BodyTooLarge,
    InvalidRequest,
    MalformedBody,
    DigestMismatch,
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
    responses=problem_responses(*_BODY_ERRORS, AwaitingWeights, Fenced, WeightsExist, Superseded),
)
async def put_weights(
    run: RunName,
    request: Request,
    server: Server,
    num_updates: Annotated[Number | None, Query(ge=0, le=MAX_STEP, description="Counter to carry on from")] = None,
    step: Annotated[Number | None, Query(ge=0, le=MAX_STEP, description="The trainer's step of these weights")] = None,
    created_at: CreatedAt = None,
    replaces: Replaces = None,
    writer: WriterNumber = None,
    push_key: PushKey = None,
) -> RunInfo:
    """Make the body the first shadow of every average, as LitEma's constructor clones the parameters."""
    found = server.registry.get(run, created_at)
    key = _checked(push_key) if server.host else ""
    if replaces is not None:
        _check_anew(num_updates, step)
        found.ledger.admit_anew(writer)
    if server.host:
        terms = Terms(None, "", num_updates, step, writer, replaces)
        return await _put_first_slice(request, server, server.host, found, key, terms)
    with found.links.begun():
        async with Push(request, server, found) as push:
            first = await server.allocate(found, partial(found.begin_first, push.staged))
            await push.receive(first.preparation)
            if replaces is None:
                await push.decide(partial(found.initialise, first, num_updates=num_updates, step=step))
            else:
                await push.decide(partial(found.initialise_anew, first, replaces, writer))
    return found.info()


@router.put(
    "/updates/{step}",
    summary="Push one update",
    openapi_extra=_SAFETENSORS_BODY,
    responses=problem_responses(*_BODY_ERRORS, AwaitingWeights, Fenced, StaleStep, StepConflict, Superseded),
)
async def put_update(
    run: RunName,
    step: Step,
    request: Request,
    server: Server,
    writer: WriterNumber = None,
    push_key: PushKey = None,
) -> UpdateResult:
    """Apply the parameters as of ``step``, exactly once and all or nothing.

    The same bytes at the run's latest step again answer ``applied: false``; other bytes at that step are a conflict.
    """
    found = server.registry.get(run)
    if server.host:
        return await _put_slice(request, server, server.host, found, step, writer, _checked(push_key))
    found.ledger.admit(step, writer)
    async with Push(request, server, found, averages=len(found.config.averages)) as push:
        update = await server.allocate(found, partial(found.begin, step, push.staged, writer))
        await push.receive(update.preparation)
        result = await push.decide(server.metrics.timed(partial(found.commit, update)), quick=found.quick)
    server.metrics.updates.labels("applied" if result.applied else "repeated").inc()
    return result


#: The same, past FastAPI.
DIRECT = DirectUpdates("/v1/runs/{run}/updates/{step}", put_update)


@router.put(
    "/weights/parts/{part}",
    summary="Give one part of the initial weights",
    response_model=RunInfo,
    openapi_extra=_PART_BODY,
    responses={
        **_STAGED,
        **problem_responses(*_BODY_ERRORS, AwaitingWeights, Fenced, WeightsExist, StepConflict, Superseded),
    },
)
async def put_weights_part(
    run: RunName,
    part: PartIndex,
    of: PartCount,
    request: Request,
    server: Server,
    group: PartGroup = "",
    num_updates: Annotated[Number | None, Query(ge=0, le=MAX_STEP, description="Counter to carry on from")] = None,
    step: Annotated[Number | None, Query(ge=0, le=MAX_STEP, description="The trainer's step of these weights")] = None,
    created_at: CreatedAt = None,
    replaces: Replaces = None,
    writer: WriterNumber = None,
) -> RunInfo | Response:
    """Take one of ``of`` parts of the initial weights; answered 202 while others are missing.

    The part that completes the set makes it the first shadow of every average.
    """
    found = server.registry.get(run, created_at)
    if replaces is not None:
        _check_anew(num_updates, step)
        terms = Terms(of, group, writer=writer, replaces=replaces)
    else:
        terms = Terms(of, group, num_updates, step)
    with found.links.begun():
        outcome, result = await _push_part(request, server, found, None, part, terms)
    if outcome != "staged":
        return found.info() if result is None else cast(RunInfo, result)
    return _staged(UpdateStatus(step or 0, "staged", server.registry.parts(run).staged(None) or ()))


@router.put(
    "/updates/{step}/parts/{part}",
    summary="Push one part of an update",
    response_model=UpdateResult,
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
    server: Server,
    group: PartGroup = "",
    writer: WriterNumber = None,
) -> UpdateResult | Response:
    """Take one of ``of`` parts of a step; answered 202 while others are missing.

    The part that completes the set applies the update, as one. A part sent again with the same bytes changes nothing;
    with other bytes it is a conflict.
    """
    found = server.registry.get(run)
    push = await _push_part(request, server, found, step, part, Terms(of, group, writer=writer))
    return _answer(server, found, step, writer, push)


@router.put(
    "/updates/{step}/stretches/{start}-{stop}",
    summary="Push one stretch of an update",
    response_model=UpdateResult,
    openapi_extra=_STRETCH_BODY,
    responses={
        **_STAGED,
        **problem_responses(*_BODY_ERRORS, AwaitingWeights, Fenced, StaleStep, StepConflict, Superseded),
    },
)
async def put_update_stretch(
    run: RunName,
    step: Step,
    start: StretchStart,
    stop: StretchStop,
    request: Request,
    server: Server,
    group: StretchGroup,
    attempt: StretchAttempt = 0,
    layout: StretchLayout = None,
    writer: WriterNumber = None,
    push_key: PushKey = None,
) -> UpdateResult | Response:
    """Take bytes ``start`` to ``stop`` of a step's parameters, one of several connections that bring them; answered 202
    while others are missing.

    The stretch that completes the step applies the update, as one.
    """
    found = server.registry.get(run)
    with _counting_failures(server):
        terms = Terms(None, group, writer=writer, push=_checked(push_key) if server.host else "")
        found.ledger.admit(step, writer)
        _check_layout(found, layout)
        check_bounds(found.layout, start, stop)
        push = await _push_stretch(request, server, found, step, (start, stop), terms, attempt)
    return _answer(server, found, step, writer, push)


@router.put(
    "/updates/{step}/parts/{part}/stretches/{start}-{stop}",
    summary="Push one stretch of a part of an update",
    response_model=UpdateResult,
    openapi_extra=_PART_STRETCH_BODY,
    responses={
        **_STAGED,
        **problem_responses(*_BODY_ERRORS, AwaitingWeights, Fenced, StaleStep, StepConflict, Superseded),
    },
)
async def put_update_part_stretch(
    run: RunName,
    step: Step,
    part: PartIndex,
    start: StretchStart,
    stop: StretchStop,
    of: PartCount,
    size: PartSize,
    request: Request,
    server: Server,
    group: PartGroup = "",
    attempt: StretchAttempt = 0,
    writer: WriterNumber = None,
) -> UpdateResult | Response:
    """Take bytes ``start`` to ``stop`` of a part of a step, one of several connections that bring the part; answered
    202 while others are missing.

    The stretch that completes the last part applies the update, as one.
    """
    found, key = server.registry.get(run), PartStretch(part, start, stop, size)
    with _counting_failures(server):
        if server.host:
            _check_group(group)
        found.ledger.admit(step, writer)
        check_part_bounds(found.layout, key)
        push = await _push_stretch(request, server, found, step, key, Terms(of, group, writer=writer), attempt)
    return _answer(server, found, step, writer, push)


@router.get(
    "/updates/{step}",
    summary="Ask about one update",
    responses=problem_responses(RunNotFound, InvalidRequest),
)
async def get_update(
    run: RunName,
    step: Step,
    server: Server,
    first: Annotated[str | None, Query(max_length=128, description="Of the initial weights: of this group")] = None,
) -> UpdateStatus:
    """Whether the step was applied, or which of its parts have arrived; else unknown.

    The server remembers the latest 1024 steps that it applied.
    """
    if first is not None:
        return server.registry.parts(run).status_of_first(step, first)
    status = server.registry.get(run).ledger.status_of(step)
    staged = None if status.state == "applied" else server.registry.parts(run).staged(step)
    return status if staged is None else UpdateStatus(step, "staged", staged)


def _check_anew(num_updates: int | None, step: int | None) -> None:
    """Raises InvalidRequest where initial weights given anew would bring a counter or a step of their own."""
    if num_updates is not None or step is not None:
        raise InvalidRequest("num_updates or step is given with replaces: counter and step stay those of the run")


def _checked(push_key: str | None) -> str:
    """The key of a push to this host, which has a slice of the run. Raises InvalidRequest without one."""
    if push_key is None:
        raise InvalidRequest(
            f"{HEADER_PUSH}: this host has one shard of the run, and a slice comes with the key of its push",
            hint="send whole pushes to the cluster's gateway, or each host its slice under one key",
        )
    return push_key


@contextlib.asynccontextmanager
async def _refusing(server: Context, shard: ShardRun, step: int | None, key: str) -> AsyncIterator[None]:
    """Within the block a slice is received; where it will never be right the other hosts need not wait for it."""
    try:
        yield
    except EmaError as fault:
        if not fault.retryable:
            await server.workers.block(partial(shard.refuse, step, key, fault))
        raise


async def _put_slice(
    request: Request, server: Context, host: Host, run: Run, step: int, writer: int | None, key: str
) -> UpdateResult:
    """Receive this host's slice of an update and vote for it; the answer is that of all hosts."""
    shard = host.shard(run)
    run.ledger.admit(step, writer)  # every host says the same, so none has to be told
    push = Push(request, server, run, averages=len(run.config.averages))
    async with _refusing(server, shard, step, key), push:
        update = await server.allocate(run, partial(run.begin, step, push.staged, writer))
        await push.receive(update.preparation)
        host.check_copies(shard, request.headers)
        decision = await push.decide(server.metrics.timed(partial(shard.push, update, key)))
    # Without the staging, which other pushes may need while a host is away.
    result = await host.decided(decision)
    server.metrics.updates.labels("applied" if result.applied else "repeated").inc()
    return result


async def _put_first_slice(request: Request, server: Context, host: Host, run: Run, key: str, terms: Terms) -> RunInfo:
    """As _put_slice(), of initial weights, or of such given anew."""
    shard = host.shard(run)
    with run.links.begun():
        async with _refusing(server, shard, None, key), Push(request, server, run) as push:
            first = await server.allocate(run, partial(run.begin_first, push.staged))
            await push.receive(first.preparation)
            host.check_copies(shard, request.headers)
            if terms.replaces is None:
                vote = partial(shard.initialise, first, key, num_updates=terms.num_updates, step=terms.step)
            else:
                vote = partial(shard.initialise_anew, first, key, terms.replaces, terms.writer)
            decision = await push.decide(vote)
        return await host.decided(decision)


def _staged(status: UpdateStatus) -> JSONResponse:
    """The answer 202. As a response: what a route returns otherwise has the schema of its 200."""
    return JSONResponse(to_json(status), status_code=202)


def _check_layout(run: Run, digest: str | None) -> None:
    """Raises LayoutMismatch where a stretch is not of the run's layout, by the digest that came with the stretch."""
    if digest != run.layout.digest:
        raise LayoutMismatch(
            f"{HEADER_LAYOUT}: {(digest or 'none')[:64]} is not the layout of run {run.config.run!r}, "
            f"{run.layout.digest}",
            hint=f"ask for the run's layout, and send its digest as {HEADER_LAYOUT}",
        )


@contextlib.contextmanager
def _counting_failures(server: Context) -> Iterator[None]:
    """Within the block a stretch is received; one that does not come is counted."""
    try:
        yield
    except EmaError:
        server.metrics.stretches.labels("refused").inc()
        raise
    except ClientDisconnect:
        server.metrics.stretches.labels("broken off").inc()
        raise


async def _push_stretch(
    request: Request, server: Context, run: Run, step: int, key: Key, terms: Terms, attempt: int
) -> _Pushed:
    """Receive a stretch; where it is the last one missing, have the run apply the update, and return the result as
    well."""
    if HEADER_SEGMENT in request.headers:
        raise InvalidRequest(f"a stretch comes as a body, not in shared memory ({HEADER_SEGMENT}): send the whole push")
    pushing = StretchPush(request, server, run, step, key, terms, attempt=attempt)
    if server.host and isinstance(key, PartStretch):
        return await _push_part_of_shard(request, server, server.host, run, step, terms, pushing)
    if server.host:
        return await _push_stretch_of_shard(request, server.host, run, pushing)
    async with pushing as push:
        outcome = await push.receive()
        result = await push.decide() if outcome == "complete" else None
        push.tell()
    return outcome, result


async def _push_stretch_of_shard(request: Request, host: Host, run: Run, pushing: PartialPush) -> _Pushed:
    """As _push_stretch(), of this host's rows: the stretch that completes them has them voted for, and answers once all
    hosts have decided; so does a stretch that comes again meanwhile, for the answer to the first may be lost."""
    shard = host.shard(run)
    host.check_copies(shard, request.headers)
    # What is wrong with one stretch is no vote against the push: the stretch may be a late one of an earlier try, which
    # was given up, and the next try may be right. What is wrong with all of them the shard refuses by itself.
    async with pushing as push:
        outcome = await push.receive()
        push.tell()
        vote = await push.vote(shard) if outcome == "complete" else push.verdict
    # Without a lane, which the same stretch waits for where it comes again.
    return (outcome, None) if vote is None else ("complete", await host.decided(vote))


def _answer(server: Context, run: Run, step: int, writer: int | None, push: _Pushed) -> UpdateResult | Response:
    """The answer to a piece of an update: 202 while others are missing, else the result. Raises as Run.repeated()."""
    outcome, result = push
    if outcome == "staged":
        return _staged(UpdateStatus(step, "staged", server.registry.parts(run.config.run).staged(step) or ()))
    answer = run.repeated(step, writer) if result is None else cast(UpdateResult, result)
    server.metrics.updates.labels("applied" if answer.applied else "repeated").inc()
    return answer


async def _push_part(
    request: Request, server: Context, run: Run, step: int | None, index: int, terms: Terms
) -> _Pushed:
    """Receive a part; where it is the last one missing, have the run apply the set, and return the result as well."""
    pushing = PartialPush(request, server, run, step, index, terms)
    if server.host:
        _check_group(terms.group)
        return await _push_part_of_shard(request, server, server.host, run, step, terms, pushing)
    async with pushing as push:
        outcome = await push.receive()
        result = await push.decide() if outcome == "complete" else None
        push.tell()
    return outcome, result


async def _push_part_of_shard(
    request: Request, server: Context, host: Host, run: Run, step: int | None, terms: Terms, pushing: PartialPush
) -> _Pushed:
    """As _push_part(), or as _push_stretch() of a part, of this host's rows: the complete set is voted for, and applied
    on all hosts or on none. Staged also where all hosts have not decided soon."""
    if step is not None:
        run.ledger.admit(step, terms.writer)  # every host says the same, so none has to be told
    elif terms.replaces is not None:
        run.ledger.admit_anew(terms.writer)
    shard = host.shard(run)
    host.check_copies(shard, request.headers)
    async with _refusing(server, shard, step, terms.push_key(step)), pushing as push:
        outcome = await push.receive()
        push.tell()
        if outcome != "complete":
            return outcome, None
        result = await host.decided_soon(push.vote(shard))
    return ("complete" if result else "staged"), result


def _check_group(group: str) -> None:
    """Raises InvalidRequest for a part that this host, which has a slice of the run, cannot take."""
    if not group:
        raise InvalidRequest(
            "group: this host has one shard of the run, and a part comes with the group of its trainer's start",
            hint="send all parts to all hosts under one group, drawn anew at each start of the trainer",
        )
