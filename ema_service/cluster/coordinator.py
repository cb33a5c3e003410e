"""The coordinator as a program: a small application over HTTP, and the process that serves it.

    POST /v1/runs/{run}/shards/{place}/link      a shard's Arrival; the answer is a stream of messages for the shard
    POST /v1/runs/{run}/shards/{place}/reports   a shard's Report, Refusal or Arrival
    POST /v1/runs/{run}/changes                  a Change; answered with an Answer
    GET  /v1/runs/{run}/shards                   who holds what; of all hosts, their replicas too
    POST /v1/replicas                            a replica's Arrival, each second; answered with where its host is
    GET  /healthz, /metrics                      for whoever runs the cluster: they name no run

Shards open all connections: a coordinator has to be reached, and needs to reach nobody. It keeps nothing, on no disk;
one that starts learns everything from the shards that come to it. Where it hears that another one has taken over it
ends for good.

Knows HTTP, and the clock. Does not know what is decided (conversation, decisions).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from functools import partial
from typing import TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp, Receive, Scope, Send

from ema_client.errors import BodyTooLarge, InvalidRequest, Unauthorized
from ema_service.cluster.conversation import Conversation, Conversations, Listening
from ema_service.cluster.counting import CoordinatorMetrics
from ema_service.cluster.encoding import MalformedMessage, decode, encode
from ema_service.cluster.messages import DIRECTORY, Arrival, Change, Message, Refusal, Report
from ema_service.cluster.problems import answer_with_problems, problem
from ema_service.cluster.replicas import Replicas, original_of
from ema_service.cluster.serving import serving_config
from ema_service.cluster.token import HEADER_NUMBER, ClusterToken
from ema_service.tls import Certificate

__all__ = ["create_coordinator", "serve"]

_log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

#: Seconds between two questions to all shards: a lost message costs as much.
AGAIN_SECONDS = 1.0
#: Seconds that a request for a change waits for the shards.
_CHANGE_SECONDS = 30.0
#: Most bytes of a message: a report names three proposals at most, and a proposal to create a run has its layout.
_MOST_BYTES = 128 << 20
#: What is answered without a token.
_OPEN = frozenset({"/healthz", "/metrics"})


def create_coordinator(token: ClusterToken, ended: Callable[[], None]) -> FastAPI:
    """The application of one coordinator. ended: called where another coordinator has taken over."""
    metrics = CoordinatorMetrics()
    talks, replicas = Conversations(partial(secrets.token_hex, 8), metrics), Replicas()
    _watch(metrics, talks, replicas)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        asking = asyncio.create_task(_ask_again(talks))
        try:
            yield
        finally:
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking

    app = FastAPI(title="ema-service coordinator", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.talks = talks
    app.add_middleware(_Guard, token=token)
    answer_with_problems(app, "a coordinator")

    @app.post("/v1/runs/{run}/shards/{place}/link")
    async def link(run: str, place: str, request: Request) -> StreamingResponse:
        _admit(talks, place, request)
        arrival = await _message(request, Arrival)
        _check_place(place, arrival.shard)
        conversation, listening = talks.arrive(run, arrival)
        return StreamingResponse(_lines(conversation, arrival.shard, listening), media_type="application/x-ndjson")

    async def report(request: Request) -> Response:
        run, place = request.path_params["run"], request.path_params["place"]
        _admit(talks, place, request)
        message: Arrival | Refusal | Report = await _message(request, Arrival, Refusal, Report)
        _check_place(place, message.shard)
        talks.find(run).hear(message)
        if talks.deposed:
            _log.warning("run %s: another coordinator has taken over; this one ends", run)
            talks.end()
            ended()
        return Response(status_code=204)

    # A plain route: one of FastAPI's takes 0.15 ms of the coordinator's core more, for each vote.
    app.add_route("/v1/runs/{run}/shards/{place}/reports", report, methods=["POST"])

    @app.post("/v1/runs/{run}/changes")
    async def change(run: str, request: Request) -> Response:
        asked = await _message(request, Change)
        return Response(encode(await talks.find(run).change(asked, _CHANGE_SECONDS)), media_type="application/json")

    @app.get("/v1/runs/{run}/shards")
    async def shards(run: str) -> JSONResponse:
        talk = talks.find(run)
        seats = [asdict(seat) for seat in talk.seats()]
        told = {"run": run, "term": talk.core.term.number, "fault": talk.core.fault, "shards": seats}
        more = {"replicas": list(map(asdict, replicas.now(time.time())))} if run == DIRECTORY else {}
        twins = {"twins": talk.twins, "absent": talks.absent()} if talk.twins else {}
        return JSONResponse({**told, **more, **twins})

    app.add_route("/v1/replicas", partial(_replica, talks, replicas), methods=["POST"])

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def told() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _watch(metrics: CoordinatorMetrics, talks: Conversations, replicas: Replicas) -> None:
    """Add the gauges whose values the talks know, and how many replicas are heard."""

    def seats(*, listening: bool) -> int:
        return sum(seat.listens is listening for talk in talks.all() for seat in talk.seats())

    metrics.watch("ema_coordinator_talks", "Talks: one a run, and one of all hosts.", lambda: len(talks.all()))
    metrics.watch("ema_coordinator_listening", "Shards that listen, of all talks.", lambda: seats(listening=True))
    metrics.watch("ema_coordinator_shards_away", "Shards that do not.", lambda: seats(listening=False))
    metrics.watch("ema_coordinator_replicas", "Replicas of hosts.", lambda: len(replicas.now(time.time())))
    metrics.watch(
        "ema_coordinator_without_twin",
        "Shards, of all talks, that lie on one of their two hosts alone.",
        lambda: sum(len(talk.core.seating.absent) for talk in talks.all()),
    )
    metrics.watch(
        "ema_coordinator_faults",
        "Talks in which nothing is decided, for a shard lacks what the others have.",
        lambda: sum(talk.core.fault is not None for talk in talks.all()),
    )


async def _replica(talks: Conversations, replicas: Replicas, request: Request) -> JSONResponse:
    """Hear a replica, and tell it where its host is. Raises InvalidRequest for a place that there is not; RunNotFound
    before the first host has come."""
    arrival = await _message(request, Arrival)
    seats = {seat.place: seat for seat in talks.find(DIRECTORY).seats()}
    if arrival.shards != len(seats) or arrival.shard not in seats:
        raise InvalidRequest(
            f"a replica of host {arrival.shard} of {arrival.shards}: there are {len(seats)} hosts, counted from 0"
        )
    replicas.hear(arrival, time.time())
    twins = talks.find(DIRECTORY).twins
    left = {place for places in talks.absent().values() for place in places}
    return JSONResponse({"original": original_of(arrival.shard, seats, left, twins=twins)})


async def _ask_again(talks: Conversations) -> None:
    while True:
        await asyncio.sleep(AGAIN_SECONDS)
        talks.ask_again()


async def _lines(conversation: Conversation, place: int, listening: Listening) -> AsyncIterator[str]:
    """What a shard is told, a line each, until somebody ends it."""
    try:
        while (message := await listening.get()) is not None:
            yield encode(message) + "\n"
    finally:
        conversation.leave(place, listening)


async def _message(request: Request, *kinds: type[M]) -> M:
    """The message in a request's body. Raises BodyTooLarge, InvalidRequest."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MOST_BYTES:
            raise BodyTooLarge(f"a message has at most {_MOST_BYTES} bytes")
    try:
        return decode(bytes(body), *kinds)
    except MalformedMessage as fault:
        raise InvalidRequest(str(fault)) from None


def _admit(talks: Conversations, place: str, request: Request) -> None:
    """Raises Fenced where a later process is the host that sends a request; InvalidRequest for no number."""
    said = request.headers.get(HEADER_NUMBER)
    if said is None:
        return  # a shard without a data dir
    if not re.fullmatch(r"[0-9]{1,18}", said):
        raise InvalidRequest(f"{HEADER_NUMBER}: {said[:40]!r} is no number")
    talks.admit(place, int(said))


def _check_place(place: str, shard: int) -> None:
    """Raises InvalidRequest where a message is of another shard than the path names."""
    if str(shard) != place:
        raise InvalidRequest(f"the path names shard {place}, the message shard {shard}")


class _Guard:
    """ASGI middleware: without the cluster's token a request is answered 401, before its body is read."""

    def __init__(self, app: ASGIApp, token: ClusterToken) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN or self._fits(scope):
            await self._app(scope, receive, send)
            return
        error = Unauthorized(
            "this coordinator wants the cluster's token", hint="start coordinator and shards with the same token"
        )
        await problem(error)(scope, receive, send)

    def _fits(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(values) == 1 and self._token.fits(values[0])


# --- the process -----------------------------------------------------------------------------------------------------


def serve(token: ClusterToken, sock: socket.socket, tls: Certificate | None = None) -> None:
    """Serve until SIGINT or SIGTERM, or until another coordinator has taken over. tls: as for serving_config()."""
    app = create_coordinator(token, lambda: setattr(server, "should_exit", True))
    config = serving_config(app, tls, stop_seconds=1)
    server = _Server(config, app.state.talks)
    server.run([sock])


class _Server(uvicorn.Server):
    """A server that lets nobody listen any more before it waits for connections to end."""

    def __init__(self, config: uvicorn.Config, talks: Conversations) -> None:
        super().__init__(config)
        self._talks = talks

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._talks.end()
        await super().shutdown(sockets)
