"""The application of a gateway: a server's routes, for whole runs.

    GET  /v1/runs, /v1/runs/{run}, .../layout      the shards' answers, as of one run
    GET  /v1/runs/{run}/weights                    the hosts' data, put together while it is sent
    GET  /v1/runs/{run}/events                     one stream a host for all who watch
    GET  /v1/runs/{run}/history, ...               what the hosts noted, as of one run
    PUT  /v1/runs/{run}/weights, .../updates/{n}   cut into the hosts' slices while it comes in; .../parts/{i} too
    POST, PATCH, DELETE                            handed to one host, which has all hosts do it or none

What a gateway does not do for a run on several hosts is refused by name. Nothing is kept, on no disk: gateways are
started and ended at will, and any number may serve one cluster.

Knows which answers there are. Does not know what they are made of (routes, asking), or the process (serving).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI, Request
from fastapi.responses import Response

from ema_client.errors import InvalidRequest, RouteNotFound
from ema_service.cluster.gateway.asking import Asking
from ema_service.cluster.gateway.counted import Counted
from ema_service.cluster.gateway.hosts import Hosts
from ema_service.cluster.gateway.routes.noted import NotedRoutes
from ema_service.cluster.gateway.routes.own import OwnRoutes
from ema_service.cluster.gateway.routes.paths import RUN
from ema_service.cluster.gateway.routes.runs import RunRoutes
from ema_service.cluster.gateway.routes.snapshots import SnapshotRoutes
from ema_service.cluster.gateway.routes.updates import UpdateRoutes
from ema_service.cluster.gateway.routes.weights import WeightsRoutes
from ema_service.cluster.gateway.watching import Watches
from ema_service.cluster.problems import answer_with_problems
from ema_service.descriptors import connections_within, raise_limit

__all__ = ["create_gateway"]

#: Requests that wait for something to happen to a run, each with a connection of its own: ten thousand take 60 MB.
_MOST_WAITING = 10_000
#: Words in paths of a run that a server answers and a gateway does not, and what is said of them.
_NOT_OFFERED = {
    "stretches": "an update comes over one connection",
    "version": "each host tells that of its shard",
}


def create_gateway(hosts: Hosts, pages: Callable[[FastAPI], None] = lambda _: None) -> FastAPI:
    """The application of one gateway. hosts: closed with it. pages: adds those for a browser."""

    watches = Watches(hosts, connections_within(raise_limit(), _MOST_WAITING))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            watches.end()
            await hosts.close()

    app = FastAPI(title="ema-service gateway", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.watches = watches
    app.add_middleware(Counted, metrics=hosts.metrics)
    answer_with_problems(app, "a gateway")
    asking = Asking(hosts)
    for group in (
        OwnRoutes(asking, watches),
        RunRoutes(asking),
        WeightsRoutes(asking, watches),
        SnapshotRoutes(asking),
        UpdateRoutes(asking),
        NotedRoutes(asking),
    ):
        for method, path, answer in group.routes:
            app.add_api_route(path, answer, methods=[method], response_model=None)
    pages(app)
    app.add_api_route(f"{RUN}/{{rest:path}}", _refuse, methods=["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH"])
    return app


async def _refuse(request: Request) -> Response:
    """Raises InvalidRequest for what a run on several hosts cannot do."""
    words = str(request.path_params["rest"]).split("/")
    told = next((_NOT_OFFERED[word] for word in words if word in _NOT_OFFERED), None)
    if told is None:
        raise RouteNotFound(f"a gateway has no route {request.url.path}")
    raise InvalidRequest(
        f"{request.method} {request.url.path} is not possible at a gateway, for a run on several hosts: {told}",
        hint="the README says under 'When one host is too small' what is",
    )
