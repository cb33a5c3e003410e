"""What a host lends its twin, which lost everything or was left behind: which runs there are, and one version of each.

    GET /v1/twin/directory?key=         the runs, as this host has them
    GET /v1/twin/runs/{run}?key=        a line of JSON, with the version's facts; then each average's bytes and digest
    GET /v1/twin/runs/{run}/averages?key=   which averages the run has
    GET /v1/twin/runs/{run}/snapshots   which there are; and the file of each average, behind /{name}/{average}
    GET /v1/twin/runs/{run}/ring        the same of the ring's, by their versions

A run is lent while this host holds its vote for the return of its twin, which the key names: so nothing of the run
moves on meanwhile. Whoever asks shows the cluster's token.

Knows HTTP. Does not know what a run consists of (shard_run, directory), or when a twin may return.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ema_client.errors import EmaError, Unauthorized
from ema_service.averaging.digest import Digest
from ema_service.cluster.problems import problem

if TYPE_CHECKING:
    from ema_service.cluster.hosting.host import Host
    from ema_service.cluster.hosting.shard_snapshots import ShardSnapshots
    from ema_service.cluster.token import ClusterToken
    from ema_service.storage import TensorFile

__all__ = ["LENDING", "lending_app"]

Answering: TypeAlias = Callable[[Request], Awaitable[Response]]

#: Where the routes are mounted.
LENDING = "/v1/twin"
#: Bytes that are sent at once.
_PIECE = 4 << 20


def lending_app(host: Host, token: ClusterToken) -> Starlette:
    """The application that lends what a host has."""

    async def directory(request: Request) -> Response:
        return JSONResponse({"runs": host.lend_runs(request.query_params.get("key"))})

    async def run(request: Request) -> Response:
        key, name = request.query_params.get("key", ""), request.path_params["run"]
        head, arenas = await run_in_threadpool(host.lend_version, name, key)
        return StreamingResponse(_pieces(head, arenas), media_type="application/octet-stream")

    async def averages(request: Request) -> Response:
        key, name = request.query_params.get("key", ""), request.path_params["run"]
        return JSONResponse({"averages": await run_in_threadpool(host.lend_averages, name, key)})

    async def snapshots(request: Request) -> Response:
        shard = host.lending(request.path_params["run"])
        return JSONResponse({"snapshots": await run_in_threadpool(shard.lent)})

    async def snapshot(request: Request) -> Response:
        told = request.path_params
        pieces = await run_in_threadpool(_begun, host.lending(told["run"]), told["name"], told["average"])
        return StreamingResponse(pieces, media_type="application/octet-stream")

    async def ring(request: Request) -> Response:
        there = host.lending_ring(request.path_params["run"])
        return JSONResponse({"ring": await run_in_threadpool(there.lent)})

    async def ring_file(request: Request) -> Response:
        told = request.path_params
        return FileResponse(host.lending_ring(told["run"]).shelf.file(told["version"], told["name"]))

    paths = {
        "/directory": directory,
        "/runs/{run}": run,
        "/runs/{run}/averages": averages,
        "/runs/{run}/snapshots": snapshots,
        "/runs/{run}/snapshots/{name}/{average}": snapshot,
        "/runs/{run}/ring": ring,
        "/runs/{run}/ring/{version}/{name}": ring_file,
    }
    return Starlette(routes=[Route(path, partial(_guarded, token, answer)) for path, answer in paths.items()])


async def _guarded(token: ClusterToken, answer: Answering, request: Request) -> Response:
    values = request.headers.getlist("authorization")
    if len(values) != 1 or not token.fits(values[0].encode()):
        return problem(Unauthorized("a host lends what it has to its twin, which has the cluster's token"))
    try:
        return await answer(request)
    except EmaError as fault:
        return problem(fault)


def _begun(snapshots: ShardSnapshots, name: str, average: str) -> Iterator[bytes]:
    """All bytes of a snapshot's file, which may lie in the object store. The first are read already, so the file is
    closed also where nobody asks for more. Raises as ShardSnapshots.open()."""
    pieces = _whole(snapshots.open(name, average))
    return chain([next(pieces)], pieces)


def _whole(file: TensorFile) -> Iterator[bytes]:
    """All bytes of a file; closed after the last one."""
    with contextlib.closing(file):
        for piece in file.pieces():
            yield bytes(piece)


def _pieces(head: dict[str, Any], arenas: list[memoryview]) -> Iterator[bytes | memoryview]:
    """The body: the head with the sizes of the averages, on a line; then each one's bytes, and their digest."""
    yield json.dumps({**head, "averages": [len(data) for data in arenas]}).encode() + b"\n"
    for data in arenas:
        digest = Digest()
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            digest.update(piece)
            yield bytes(piece)
        yield digest.digest()
