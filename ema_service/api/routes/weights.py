"""Routes that send weights: the current EMA, and the weights of a snapshot.

Knows HTTP's conditional and range requests, and how to stream a source to a socket. Does not know which bytes a body
has (WeightsStream) or what a version is made of.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ema_client.errors import (
    AverageNotFound,
    AwaitingWeights,
    EmaError,
    InvalidRequest,
    Overloaded,
    RangeNotSatisfiable,
    RunDegraded,
    RunNotFound,
    SnapshotDamaged,
    SnapshotNotFound,
    StepNotReached,
    StorageDisabled,
    StorageFailed,
    Superseded,
    SynthesisRefused,
    VersionGone,
)
from ema_client.protocol import (
    HEADER_AMPLIFICATION,
    HEADER_AVERAGE,
    HEADER_DECAY,
    HEADER_DIGEST,
    HEADER_NUM_UPDATES,
    HEADER_PROFILE_ERROR,
    HEADER_RECIPE,
    HEADER_RUN,
    HEADER_STEP,
    HEADER_TARGETS,
    HEADER_VERSION,
    MAX_STEP,
    MAX_WAIT,
    NAME_PATTERN,
    SWEEP_PIECE_BYTES,
    ProfileInfo,
    WeightsInfo,
    is_name,
)
from ema_service.api.answers import CONDITION, is_known
from ema_service.api.context import Context
from ema_service.api.errors import problem_response, problem_responses
from ema_service.api.reading import Reading
from ema_service.api.routes.parameters import CreatedAt, Decimal, Number, RunName, Server, SnapshotName
from ema_service.api.synthesis import Asked, AskedFor, stored, work_out
from ema_service.api.transfer.connection import on_lost
from ema_service.api.transfer.pouring import pour
from ema_service.averaging import TargetRefused
from ema_service.averaging import soup as soup_of
from ema_service.bodies import WeightsStream
from ema_service.bodies.mixing import Ingredient, Mixture, interleaved
from ema_service.bodies.outgoing import ReadBytes
from ema_service.runs import Run
from ema_service.runs.recipes import Recipe, text_of
from ema_service.shadows import State

__all__ = ["router"]

_log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/runs/{run}", tags=["weights"])

_OCTETS = "application/octet-stream"
_WEIGHT = re.compile(r"[+-]?([0-9]{1,18}(\.[0-9]{0,18})?|\.[0-9]{1,18})([eE][+-]?[0-9]{1,2})?\Z", re.ASCII)
#: Each is an open file.
_MOST_IN_SOUP = 64
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})\Z", re.ASCII)

AverageName = Annotated[str | None, Query(pattern=NAME_PATTERN, description="Which average; none: the first")]
Dtype = Annotated[str | None, Query(description="Cast to F64, F32, BF16 or F16; none: as the shadows are kept")]
Prefix = Annotated[str | None, Query(description="Only the tensors whose name begins so")]


def _header(kind: str, description: str, *, required: bool = True) -> dict[str, Any]:
    return {"description": description, "required": required, "schema": {"type": kind}}


#: For the API's documentation, which these headers of WeightsInfo.to_headers() and _answer() are described to alone.
_HEADERS = {
    HEADER_RUN: _header("string", "The run"),
    HEADER_AVERAGE: _header("string", "The average"),
    HEADER_VERSION: _header("string", "The version: epoch.n"),
    HEADER_STEP: _header("integer", "The trainer's step; absent before the first step is known", required=False),
    HEADER_NUM_UPDATES: _header("integer", "LitEma's counter; -1 where the counter is off"),
    HEADER_DECAY: _header("number", "The largest decay"),
    HEADER_PROFILE_ERROR: _header("number", "Of an average worked out: how far from the wished one", required=False),
    HEADER_AMPLIFICATION: _header("number", "Of an average worked out: the norm of its weights", required=False),
    HEADER_DIGEST: _header("string", "The digest of the data, of whole weights that are kept by it", required=False),
    "ETag": _header("string", "Names these very bytes, for If-None-Match and If-Range"),
    "Accept-Ranges": _header("string", "bytes"),
}
_CONTENT_RANGE = {"Content-Range": _header("string", "Which bytes of how many")}
_BODY = {_OCTETS: {"schema": {"type": "string", "format": "binary"}}}
_OK: dict[int | str, dict[str, Any]] = {
    200: {"description": "One version, whole, as a safetensors stream", "content": _BODY, "headers": _HEADERS},
    206: {"description": "The part asked for by Range", "content": _BODY, "headers": {**_HEADERS, **_CONTENT_RANGE}},
    304: {"description": "The version named by If-None-Match is still the current one", "headers": _HEADERS},
}
_SWEPT: dict[str, Any] = {
    "description": "The averages, interleaved",
    "content": _BODY,
    "headers": {HEADER_TARGETS: _header("integer", "How many averages the body has")},
}
# What a request may ask for by headers that the routes read themselves.
_PART = [
    {
        "name": "Range",
        "in": "header",
        "required": False,
        "description": "bytes=START-STOP: a part of the body, both ends included",
        "schema": {"type": "string"},
    },
    {
        "name": "If-Range",
        "in": "header",
        "required": False,
        "description": "The ETag of the part before: where the version has moved on, the new body comes, whole",
        "schema": {"type": "string"},
    },
]
_GET = {"parameters": [CONDITION, *_PART]}
_HEAD = {"parameters": [CONDITION]}


def _documented(*errors: type[EmaError], method: str) -> dict[str, Any]:
    """What is documented alike of both routes: the answers to GET, and those of them that HEAD has."""
    if method == "HEAD":
        answers = {status: answer for status, answer in _OK.items() if status != 206}
        errors = tuple(error for error in errors if error is not RangeNotSatisfiable)
        return {"responses": {**answers, **problem_responses(*errors)}, "openapi_extra": _HEAD}
    problems = problem_responses(*errors)
    problems[416]["headers"] = _CONTENT_RANGE
    return {"responses": {**_OK, **problems}, "openapi_extra": _GET}


_CURRENT_ERRORS = (
    RunNotFound,
    AverageNotFound,
    SnapshotNotFound,
    SnapshotDamaged,
    StorageDisabled,
    StorageFailed,
    AwaitingWeights,
    StepNotReached,
    RangeNotSatisfiable,
    InvalidRequest,
    SynthesisRefused,
    Overloaded,
    Superseded,
    VersionGone,
)
_SYNTHESIS_ERRORS = (
    RunNotFound,
    SnapshotDamaged,
    StorageDisabled,
    StorageFailed,
    AwaitingWeights,
    RunDegraded,
    InvalidRequest,
    SynthesisRefused,
    Superseded,
    VersionGone,
)
_SNAPSHOT_ERRORS = (
    RunNotFound,
    SnapshotNotFound,
    AverageNotFound,
    SnapshotDamaged,
    StorageDisabled,
    StorageFailed,
    RangeNotSatisfiable,
    InvalidRequest,
    Overloaded,
)


@router.get(
    "/weights",
    summary="Read the current EMA weights",
    response_class=Response,
    **_documented(*_CURRENT_ERRORS, method="GET"),
)
@router.head(
    "/weights",
    name="head_weights",
    summary="Ask about the current EMA weights",
    response_class=Response,
    **_documented(*_CURRENT_ERRORS, method="HEAD"),
)
async def get_weights(
    run: RunName,
    request: Request,
    server: Server,
    average: AverageName = None,
    dtype: Dtype = None,
    prefix: Prefix = None,
    min_step: Annotated[Number | None, Query(ge=0, le=MAX_STEP, description="Wait for this step")] = None,
    wait: Annotated[Decimal, Query(ge=0, le=MAX_WAIT, description="How many seconds to wait for min_step")] = 0.0,
    soup: Annotated[
        str | None, Query(description="Of snapshots, NAME:WEIGHT,NAME:WEIGHT: their sum. The weights sum to 1")
    ] = None,
    created_at: CreatedAt = None,
    *,
    asked: AskedFor,
) -> Response:
    """The EMA of one version, whole, while updates go on. Range is answered for the version named by If-Range.

    With ``soup`` the weighted sum of snapshots, in place of a version. With ``sigma_rel``, ``decay``, ``half_life`` or
    ``window`` an average that the run did not track, worked out of its ring while it is sent.
    """
    if asked.targets:
        if (average, min_step, soup) != (None, None, None):
            raise InvalidRequest("average, min_step, soup: don't go with sigma_rel, decay, half_life or window")
        return await _get_synthesised(run, asked, request, server, dtype, prefix)
    if soup is not None:
        if min_step is not None:
            raise InvalidRequest("soup: snapshots are of the past, and no step is waited for: leave min_step out")
        return await _get_soup(run, _weights_of(soup), request, server, average, dtype, prefix)
    found = server.registry.get(run, created_at)
    if min_step is not None:
        await _reach(server, request, found, min_step, wait)
    reading = server.readings.find(found, _pinned(request))
    if reading is None:
        reading = await _current(server, found, average, dtype, prefix)
    stream, arena = reading.stream, reading.arena
    untouched = dtype is None and prefix is None and request.url.scheme == "http"

    async def open_source(stack: ExitStack) -> ReadBytes:
        await server.hold(request, arena)
        release = partial(server.registry.frozen.release, arena)
        stack.callback(server.readings.begin(found, reading, release, _range(request, stream)))
        data = await server.workers.block(partial(server.registry.frozen.data, arena))
        return lambda start, stop: data[start:stop]

    with ExitStack() as source:
        digest = arena.digest if untouched else None
        return await _answer(request, server, stream, source, open_source, on_disk=False, digest=digest)


async def _current(server: Context, found: Run, average: str | None, dtype: str | None, prefix: str | None) -> Reading:
    """The newest version of an average. Raises AwaitingWeights, AverageNotFound; InvalidRequest as WeightsStream."""
    state = found.ready_state()
    succession = found.ledger.succession
    member = succession.member(average)
    kept = state.at(member)
    if kept is None:
        raise succession.awaiting(member)
    chosen, arena = kept
    info, lineage = state.version.weights_info(found.config, chosen), state.version.lineage
    stream = await server.workers.block(
        partial(WeightsStream, found.layout.shadows, info, lineage=lineage, dtype=dtype, prefix=prefix)
    )
    return Reading(stream, arena)


def _pinned(request: Request) -> str | None:
    """The ETag of the version that a request with a Range is about."""
    return request.headers.get("if-range") if "range" in request.headers else None


async def _get_synthesised(
    run: str, asked: Asked, request: Request, server: Context, dtype: str | None, prefix: str | None
) -> Response:
    """An average that is worked out of stored weights while it is sent."""
    asked.one()
    found = server.registry.get(run)
    with ExitStack() as source:
        [recipe], mixture = await work_out(request, server, found, asked, source)
        info, lineage = recipe.info, recipe.identity
        stream = await server.workers.block(
            partial(WeightsStream, found.layout.shadows, info, lineage=lineage, dtype=dtype, prefix=prefix)
        )

        async def open_source(stack: ExitStack) -> ReadBytes:
            if found.shard:
                await _stay(server, request, found, stream, recipe.state, stack)
            return mixture.read

        more = _recipe_told(found, [recipe])
        return await _answer(request, server, stream, source, open_source, on_disk=True, more=more)


async def _stay(
    server: Context, request: Request, run: Run, stream: WeightsStream, state: State, stack: ExitStack
) -> None:
    """Have a version stay that a body is worked out of, as long as some of the body is sent, and a moment more: its
    other stretches name the version. Raises Overloaded, ClientDisconnect."""
    await server.hold(request, *state.arenas)

    def release() -> None:
        for arena in state.arenas:
            server.registry.frozen.release(arena)

    reading = Reading(stream, state.arenas[0], state)
    stack.callback(server.readings.begin(run, reading, release, _range(request, stream)))


def _recipe_told(run: Run, recipes: Sequence[Recipe]) -> dict[str, str]:
    """The header of an answer by which other hosts of the run work the same out."""
    return {HEADER_RECIPE: text_of(recipes)} if run.shard else {}


@router.get(
    "/profiles",
    summary="Ask how an average would be worked out",
    responses=problem_responses(*_SYNTHESIS_ERRORS),
)
async def get_profiles(run: RunName, server: Server, asked: AskedFor) -> ProfileInfo:
    """Of which stored weights the average that is asked for would be a sum, and how far its profile is from the wish.

    ``refused`` says why ``GET weights`` would not send it, and what it would send.
    """
    synthesiser, target = await stored(server, server.registry.get(run)), asked.one()
    return await server.workers.block(partial(synthesiser.dry_run, target, asked.at, asked.max_error))


@router.get(
    "/sweep",
    summary="Read several averages in one",
    response_class=Response,
    responses={200: _SWEPT, **problem_responses(*_SYNTHESIS_ERRORS, Overloaded)},
)
async def get_sweep(run: RunName, request: Request, server: Server, asked: AskedFor, dtype: Dtype = None) -> Response:
    """Averages of several lengths, worked out in one reading of the stored weights, interleaved.

    The heads of all safetensors streams come first, one behind the other; then their data, a mebibyte of each in turn.
    """
    if not asked.targets:
        asked.one()
    found = server.registry.get(run)
    with ExitStack() as source:
        recipes, mixture = await work_out(request, server, found, asked, source)
        streams = await server.workers.block(
            lambda: [WeightsStream(found.layout.shadows, each.info, dtype=dtype) for each in recipes]
        )
        length = sum(stream.length for stream in streams)
        headers = {HEADER_TARGETS: str(len(streams)), "Content-Length": str(length), **_recipe_told(found, recipes)}
        body = _from_disk(server, interleaved(streams, mixture, SWEEP_PIECE_BYTES))
        return _Streaming(source.pop_all(), server, body, status_code=200, headers=headers)


async def _get_soup(
    run: str,
    weights: Mapping[str, float],
    request: Request,
    server: Context,
    average: str | None,
    dtype: str | None,
    prefix: str | None,
) -> Response:
    """The weighted sum of snapshots, worked out while it is sent."""
    snapshots = server.registry.snapshots(run)
    with ExitStack() as source:
        files, infos = [], []
        for name in weights:
            file, info = await server.read(partial(snapshots.open, name, average))
            source.callback(file.close)
            files.append(file)
            infos.append(info)
        said = ",".join(f"{name}:{weight!r}" for name, weight in weights.items())
        info = replace(max(infos, key=_age), snapshot=None, soup=said)
        entries = files[0].header.entries
        ingredients = [Ingredient(f.read, entries, (w,)) for f, w in zip(files, weights.values(), strict=True)]
        mixture = Mixture(entries, ingredients, server.workers.helpers)
        lineage = ",".join(file.identity for file in files)
        stream = await server.workers.block(
            partial(WeightsStream, entries, info, lineage=lineage, dtype=dtype, prefix=prefix)
        )

        async def open_source(_: ExitStack) -> ReadBytes:
            return mixture.read

        return await _answer(request, server, stream, source, open_source, on_disk=True)


def _weights_of(said: str) -> dict[str, float]:
    """The weight of each snapshot of a soup. Raises InvalidRequest."""
    weights: dict[str, float] = {}
    for part in said.split(","):
        name, colon, weight = part.partition(":")
        if not (colon and is_name(name) and _WEIGHT.match(weight)):
            raise InvalidRequest(f"soup: {part[:80]!r} is not NAME:WEIGHT, as in last:0.5,best:0.5")
        if name in weights:
            raise InvalidRequest(f"soup: the snapshot {name!r} stands there twice")
        weights[name] = float(weight)
    if len(weights) > _MOST_IN_SOUP:
        raise InvalidRequest(f"soup: {len(weights)} snapshots were given; {_MOST_IN_SOUP} are possible")
    try:
        shares = soup_of(list(weights.values())).weights
    except TargetRefused as refused:
        raise InvalidRequest(f"soup: {refused}") from None
    return dict(zip(weights, shares.tolist(), strict=True))


def _age(info: WeightsInfo) -> tuple[int, ...]:
    return tuple(int(part) for part in info.version.split("."))


@router.get(
    "/snapshots/{name}/weights",
    summary="Download a snapshot",
    response_class=Response,
    **_documented(*_SNAPSHOT_ERRORS, method="GET"),
)
@router.head(
    "/snapshots/{name}/weights",
    name="head_snapshot_weights",
    summary="Ask about a snapshot's weights",
    response_class=Response,
    **_documented(*_SNAPSHOT_ERRORS, method="HEAD"),
)
async def get_snapshot_weights(
    run: RunName,
    name: SnapshotName,
    request: Request,
    server: Server,
    average: AverageName = None,
    dtype: Dtype = None,
    prefix: Prefix = None,
) -> Response:
    """The weights of a snapshot; with Range, a broken download goes on where it stopped."""
    snapshots = server.registry.snapshots(run)
    with ExitStack() as source:
        file, info = await server.read(partial(snapshots.open, name, average))
        source.callback(file.close)
        stream = await server.workers.block(
            partial(WeightsStream, file.header.entries, info, lineage=file.identity, dtype=dtype, prefix=prefix)
        )

        async def open_source(_: ExitStack) -> ReadBytes:
            return file.read

        return await _answer(request, server, stream, source, open_source, on_disk=True)


async def _reach(server: Context, request: Request, run: Run, step: int, wait: float) -> None:
    """Return once the run has applied ``step`` or a later one.

    Raises Overloaded where too many wait already; StepNotReached after ``wait`` seconds or when the server stops;
    RunNotFound when the run is deleted, Superseded when it is replaced; ClientDisconnect where nobody waits any more.
    """
    if _reached(run, step):
        return
    gone = asyncio.Event()
    with server.staying(watches=False), server.watching(run) as moved:

        def leave() -> None:
            gone.set()
            moved.set()

        with contextlib.suppress(TimeoutError), on_lost(request, leave):
            async with asyncio.timeout(wait):
                while not (_reached(run, step) or run.ledger.retired or server.stopping or gone.is_set()):
                    await moved.wait()
                    moved.clear()
    if gone.is_set():
        raise ClientDisconnect
    run.ledger.check_exists()
    if not _reached(run, step):
        raise StepNotReached(f"run {run.config.run!r} did not reach step {step} within {wait:g} seconds")


def _reached(run: Run, step: int) -> bool:
    state = run.state
    return state is not None and state.version.step is not None and state.version.step >= step


async def _answer(
    request: Request,
    server: Context,
    stream: WeightsStream,
    source: ExitStack,
    open_source: Callable[[ExitStack], Awaitable[ReadBytes]],
    *,
    on_disk: bool,
    digest: bytes | None = None,
    more: Mapping[str, str] = MappingProxyType({}),
) -> Response:
    """The answer to a GET or HEAD.

    A body closes ``source`` at its end; an answer without a body leaves that to the caller.

    open_source: called only where there is a body; adds to ``source`` what is to be closed. digest: of the data, where
    somebody knows it. more: headers.
    """
    headers = {**stream.info.to_headers(), **more, "ETag": stream.etag, "Accept-Ranges": "bytes"}
    if digest:
        headers[HEADER_DIGEST] = digest.hex()
    if is_known(request, stream.etag):
        return Response(status_code=304, headers=headers)
    try:
        part = _range(request, stream)
    except RangeNotSatisfiable as fault:
        server.metrics.refused(fault.code)
        return problem_response(fault, {"Content-Range": f"bytes */{stream.length}"})
    start, stop = part or (0, stream.length)
    headers["Content-Length"] = str(stop - start)
    if part:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{stream.length}"
    if request.method == "HEAD":
        return Response(status_code=200, headers=headers, media_type=_OCTETS)
    chunks = stream.chunks(await open_source(source), start, stop)
    body = _from_disk(server, chunks) if on_disk else _from_memory(request, server, chunks)
    return _Streaming(source.pop_all(), server, body, status_code=206 if part else 200, headers=headers)


class _BrokenOff(Exception):
    """The rest of a body cannot be read."""


class _Streaming(StreamingResponse):
    """Sends the chunks, counts their bytes and, however the sending ends, closes the source.

    Where the source fails in the middle, a disk or an object store, the connection ends before the body does.
    """

    media_type = _OCTETS

    def __init__(
        self,
        source: ExitStack,
        server: Context,
        body: AsyncIterator[memoryview],
        *,
        status_code: int,
        headers: dict[str, str],
    ):
        super().__init__(self._counted(body, server), status_code=status_code, headers=headers)
        self._source = source
        self._metrics = server.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._source, self._metrics.pull("send"):
            try:
                await super().__call__(scope, receive, send)
            except _BrokenOff as fault:
                _log.warning("%s was broken off: %s", scope["path"], fault)

    @staticmethod
    async def _counted(body: AsyncIterator[memoryview], server: Context) -> AsyncIterator[memoryview]:
        try:
            async for chunk in body:
                yield chunk
                server.metrics.sent.inc(len(chunk))
        except OSError as fault:
            raise _BrokenOff(str(fault)) from fault


async def _from_memory(request: Request, server: Context, chunks: Iterator[memoryview]) -> AsyncIterator[memoryview]:
    """The chunks that a thread does not send: pour() sends what the reader takes at once.

    The event loop has a turn before each chunk, and learns of a reader that left: else asyncio would be given all the
    chunks that are left, and log a line for each.
    """
    for chunk in chunks:
        sent, left = await pour(request, chunk, chunks, server.workers.senders)
        server.metrics.sent.inc(sent)
        if left:
            await asyncio.sleep(0)
            yield left


async def _from_disk(server: Context, chunks: Iterator[memoryview]) -> AsyncIterator[memoryview]:
    """The chunks of a snapshot's body, read from a disk, or the object store, off the event loop."""
    while (chunk := await server.read(partial(next, chunks, None))) is not None:
        yield chunk


def _range(request: Request, stream: WeightsStream) -> tuple[int, int] | None:
    """The bytes [start, stop) of the body that the request's Range asks for; None for the whole body.

    The whole is sent without a Range, for several ranges, another unit, or a version other than If-Range's. Raises
    RangeNotSatisfiable.
    """
    asked = _RANGE.match(request.headers.get("range", "")) if request.method == "GET" else None
    pinned = _pinned(request)
    if asked is None or asked.group() == "bytes=-" or (pinned is not None and pinned != stream.etag):
        return None
    first, last = asked.groups()
    if not first:
        start, stop = max(stream.length - int(last), 0), stream.length
    else:
        start, stop = int(first), min(int(last) + 1, stream.length) if last else stream.length
        if last and int(last) < start:
            return None
    if start >= stop:
        raise RangeNotSatisfiable(
            f"Range: {asked.group()} lies beyond the {stream.length} bytes of version {stream.info.version}"
        )
    return start, stop
