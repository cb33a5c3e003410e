"""The gateway as a program: the application, with a server's routes for whole runs, and the process that serves it.

    GET  /v1/runs, /v1/runs/{run}, .../layout      the shards' answers, as of one run
    GET  /v1/runs/{run}/weights                    the hosts' data, put together while it is sent
    GET  /v1/runs/{run}/events                     one stream a host for all who watch
    GET  /v1/runs/{run}/history, ...               what the hosts noted, as of one run
    PUT  /v1/runs/{run}/weights, .../updates/{n}   cut into the hosts' slices while it comes in; .../parts/{i} too
    POST, PATCH, DELETE                            handed to one host, which has all hosts do it or none

What a run on several hosts cannot do is refused by name. Nothing is kept, on no disk: gateways are started and ended at
will, and any number may serve one cluster.

Knows the routes. Does not know how bodies are cut and put together (pushes, pulls), how streams become one (watching),
or who decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, TypeVar, cast

import httpx2
import uvicorn
from fastapi import FastAPI, Path, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from ema_client.errors import (
    BodyTooLarge,
    EmaError,
    InvalidRequest,
    Overloaded,
    RouteNotFound,
    RunNotFound,
    SegmentUnusable,
    Superseded,
)
from ema_client.protocol import (
    API,
    DIGEST_FOLLOWS,
    HEADER_COPIES,
    HEADER_DIGEST,
    HEADER_KEY,
    HEADER_PUSH,
    HEADER_SEGMENT,
    NAME_PATTERN,
    Distances,
    History,
    ProfileInfo,
    RunInfo,
    RunLayout,
    RunList,
    RunShards,
    ServerInfo,
    SnapshotInfo,
    SnapshotList,
    SweepList,
    Timeline,
    UpdateResult,
    UpdateStatus,
    average_path,
    averages_path,
    distances_path,
    history_path,
    layout_path,
    part_path,
    profiles_path,
    reset_path,
    rewind_path,
    run_path,
    runs_path,
    server_path,
    snapshot_path,
    snapshots_path,
    sweeps_path,
    timeline_path,
    to_json,
    update_path,
    weights_path,
    writer_path,
    writers_path,
)
from ema_service.cluster.gateway.counted import Counted
from ema_service.cluster.gateway.hosts import SILENCE, HostAddress, Hosts, all_of, parsed, passed_on
from ema_service.cluster.gateway.overview import overview_of, run_overview_of
from ema_service.cluster.gateway.past import asked_of_hosts, whole_distances, whole_history, whole_timeline
from ema_service.cluster.gateway.pulls import is_known, send_weights
from ema_service.cluster.gateway.pushes import PartSplitting, Slice, Splitting
from ema_service.cluster.gateway.sweeping import send_sweep
from ema_service.cluster.gateway.waiting import once_reached, send_events
from ema_service.cluster.gateway.watching import Watches
from ema_service.cluster.gateway.whole import (
    Apart,
    layout_of,
    map_of,
    shards_of,
    slice_digests,
    whole_info,
    whole_part,
    whole_result,
    whole_server,
    whole_snapshot,
    whole_snapshots,
    whole_status,
)
from ema_service.cluster.gateway.worked_out import is_worked_out, send_worked_out
from ema_service.cluster.layout_map import LayoutMap
from ema_service.cluster.problems import answer_with_problems
from ema_service.cluster.serving import serving_config
from ema_service.descriptors import connections_within, raise_limit
from ema_service.tls import Certificate

__all__ = ["create_gateway", "serve"]

T = TypeVar("T")
RunName = Annotated[str, Path(pattern=NAME_PATTERN)]
AverageName = Annotated[str, Path(pattern=NAME_PATTERN)]
SnapshotName = Annotated[str, Path(pattern=NAME_PATTERN)]

#: Most bytes of a request that is no push: a layout of 200,000 tensors takes about 20 MB.
_CONTROL_BYTES = 32 << 20
#: Seconds for which hosts are asked again that are not at the same place, and the pause between: a decision reaches the
#: last host some milliseconds after the first, and a second later where a message was lost.
_APART_SECONDS, _APART_PAUSE = 3.0, 0.02
#: Seconds that a host may work before it answers a write: a decision takes 30 at the most.
_DECISION_SECONDS = 90.0
#: Seconds that a host may work before a snapshot is answered: all hosts write theirs meanwhile.
_SNAPSHOT_SECONDS = 900.0
#: Seconds for the answer to a slice: the hosts whose slices come first wait for the last.
_PUSH_SECONDS = 3600.0
#: Runs whose layouts are remembered.
_MOST_LAYOUTS = 256
#: Requests that wait for something to happen to a run, each with a connection of its own: ten thousand take 60 MB.
_MOST_WAITING = 10_000
#: Every path of a run beside those served here, and what is said of it.
_NOT_OFFERED = {
    "stretches": "an update comes over one connection",
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
    gateway = _Gateway(hosts, watches)
    run, step = f"{API}/runs/{{run}}", "/updates/{step:int}"
    for method, path, answer in (
        ("GET", "/healthz", gateway.alive),
        ("GET", "/readyz", gateway.ready),
        ("GET", "/metrics", gateway.metrics),
        ("GET", server_path(), gateway.server),
        ("GET", f"{API}/hosts", gateway.overview),
        ("GET", runs_path(), gateway.runs),
        ("POST", runs_path(), gateway.create),
        ("GET", run, gateway.run),
        ("PATCH", run, gateway.change),
        ("DELETE", run, gateway.delete),
        ("GET", f"{run}/layout", gateway.layout),
        ("GET", f"{run}/shards", gateway.shards),
        ("GET", f"{run}/hosts", gateway.run_overview),
        ("POST", f"{run}/rewind", gateway.rewind),
        ("POST", f"{run}/reset-num-updates", gateway.reset),
        ("POST", f"{run}/averages", gateway.add_average),
        ("DELETE", f"{run}/averages/{{average}}", gateway.remove_average),
        ("GET", f"{run}/config", gateway.config),
        ("POST", f"{run}/writers", gateway.attach),
        ("DELETE", f"{run}/writers/{{writer:int}}", gateway.detach),
        ("GET", f"{run}/weights", gateway.weights),
        ("HEAD", f"{run}/weights", gateway.weights),
        ("PUT", f"{run}/weights", gateway.initialise),
        ("GET", f"{run}/profiles", gateway.profiles),
        ("GET", f"{run}/sweep", gateway.sweep),
        ("POST", f"{run}/sweeps", gateway.add_sweep),
        ("GET", f"{run}/sweeps", gateway.sweeps),
        ("GET", f"{run}/events", gateway.events),
        ("GET", f"{run}/history", gateway.history),
        ("GET", f"{run}/distances", gateway.distances),
        ("GET", f"{run}/timeline", gateway.timeline),
        ("GET", f"{run}/snapshots", gateway.snapshots),
        ("GET", f"{run}/snapshots/{{name}}", gateway.snapshot),
        ("PUT", f"{run}/snapshots/{{name}}", gateway.take_snapshot),
        ("DELETE", f"{run}/snapshots/{{name}}", gateway.delete_snapshot),
        ("GET", f"{run}/snapshots/{{name}}/weights", gateway.snapshot_weights),
        ("HEAD", f"{run}/snapshots/{{name}}/weights", gateway.snapshot_weights),
        ("GET", run + step, gateway.status),
        ("PUT", run + step, gateway.push),
        ("PUT", f"{run}/weights/parts/{{part:int}}", gateway.initialise_part),
        ("PUT", f"{run}{step}/parts/{{part:int}}", gateway.push_part),
    ):
        app.add_api_route(path, answer, methods=[method], response_model=None)
    pages(app)
    app.add_api_route(f"{run}/{{rest:path}}", _refuse, methods=["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH"])
    return app


async def _refuse(request: Request) -> Response:
    """Raises InvalidRequest for what a run on several hosts cannot do."""
    words = str(request.path_params["rest"]).split("/")
    told = next((_NOT_OFFERED[word] for word in words if word in _NOT_OFFERED), None)
    if told is None:
        raise RouteNotFound(f"a gateway has no route {request.url.path}")
    raise InvalidRequest(
        f"{request.method} {request.url.path} is not possible for a run on several hosts: {told}",
        hint="the README says under 'When one host is too small' what is",
    )


@dataclass
class _Gateway:
    """The answers of one gateway, a method a route.

    More than twenty methods: one for each route of a server that a gateway has, and what several of them do.
    """

    hosts: Hosts
    watches: Watches
    #: run -> when it was created, and the hosts' shares of its tensors.
    _maps: dict[str, tuple[float, LayoutMap]] = field(default_factory=dict)

    # --- the gateway itself -----------------------------------------------------------------------------------------

    async def alive(self) -> Response:
        """200 as long as the event loop turns."""
        return JSONResponse({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        """200 while every host takes all requests."""
        await self.hosts.each(lambda host: self.hosts.send(host, "GET", "/readyz", passed_on(request.headers)))
        return JSONResponse({"status": "ready", "hosts": len(await self.hosts.all())})

    async def metrics(self) -> Response:
        """The gateway's own, for Prometheus."""
        self.hosts.metrics.waiting.set(self.watches.waiting)
        return Response(generate_latest(self.hosts.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def server(self, request: Request) -> Response:
        """What the hosts are together."""
        return _json(whole_server(await self._each(request, server_path(), ServerInfo)))

    async def overview(self, request: Request) -> Response:
        """Who the hosts are, and how each stands."""
        return _json(await overview_of(self.hosts, passed_on(request.headers)))

    # --- runs -------------------------------------------------------------------------------------------------------

    async def runs(self, request: Request) -> Response:
        """All runs that are on all hosts, with the query of one server."""
        query = dict(request.query_params)
        ask = partial(self._ask, request, runs_path(), RunList, params=query)
        infos = [{each.run: each for each in told.runs} for told in await self.hosts.each(ask)]
        names = [name for name in infos[0] if all(name in each for each in infos)]
        found = []
        for name in names:
            try:
                found.append(await self._whole([each[name] for each in infos], request))
            except Apart:
                found.append(await self._info(request, name))
            except RunNotFound:
                continue
        return _json(RunList(tuple(found)))

    async def create(self, request: Request) -> Response:
        """Create a run on all hosts, or none."""
        told = await self._hand_over(request, runs_path())
        run = str(_object_of(told)["run"])
        return _json(await self._info(request, run), told.status_code)

    async def run(self, run: RunName, request: Request) -> Response:
        """The whole run as it stands."""
        return _json(await self._info(request, run))

    async def layout(self, run: RunName, request: Request) -> Response:
        """The tensors of the whole run."""
        return _json(layout_of(run, await self._map(request, run)))

    async def shards(self, run: RunName, request: Request) -> Response:
        """Where each shard of the run is, for clients that reach the hosts."""

        async def ask() -> RunShards:
            infos = await self._each(request, run_path(run), RunInfo)
            shards, hosts = await self._map_of(infos[0], request), await self.hosts.both(run)
            return shards_of(infos, shards, hosts, twins=self.hosts.has_twins)

        return _json(await self._agreed(ask))

    async def run_overview(self, run: RunName, request: Request) -> Response:
        """Which part of the run each host has, and how it stands, as far as that is known while one is away."""
        shards = self._maps[run][1] if run in self._maps else None
        try:
            shards = await self._map(request, run)
        except EmaError as fault:
            if not fault.retryable:
                raise
        return _json(await run_overview_of(run, self.hosts, passed_on(request.headers), shards))

    async def change(self, run: RunName, request: Request) -> Response:
        """A decay changed on all hosts or none."""
        await self._hand_over(request, run_path(run))
        return _json(await self._info(request, run))

    async def reset(self, run: RunName, request: Request) -> Response:
        """The counters set to 0 on all hosts or none."""
        await self._hand_over(request, reset_path(run))
        return _json(await self._info(request, run))

    async def rewind(self, run: RunName, request: Request) -> Response:
        """Back to a snapshot on all hosts, or none."""
        await self._hand_over(request, rewind_path(run), seconds=_SNAPSHOT_SECONDS)
        return _json(await self._info(request, run))

    async def add_average(self, run: RunName, request: Request) -> Response:
        """One more average on all hosts, or none."""
        told = await self._hand_over(request, averages_path(run))
        return _json(await self._info(request, run), told.status_code)

    async def remove_average(self, run: RunName, average: AverageName, request: Request) -> Response:
        """One average less on all hosts, or none."""
        await self._hand_over(request, average_path(run, average), seconds=_SNAPSHOT_SECONDS)
        return Response(status_code=204)

    async def attach(self, run: RunName, request: Request) -> Response:
        """A trainer's number, the same on all hosts."""
        told = await self._hand_over(request, writers_path(run))
        return JSONResponse(_object_of(told), told.status_code)

    async def detach(self, run: RunName, writer: int, request: Request) -> Response:
        """The end of a training, which each host notes by itself."""
        path, headers = writer_path(run, writer), passed_on(request.headers)
        await self.hosts.each(lambda host: self.hosts.send(host, "DELETE", path, headers))
        return _json(await self._info(request, run))

    async def config(self, run: RunName, request: Request) -> Response:
        """With which configuration the whole run was created: every host has it."""
        host, *_ = await self.hosts.all()
        told = await self.hosts.send(host, "GET", f"{run_path(run)}/config", passed_on(request.headers))
        return Response(told.content, media_type="application/json")

    async def delete(self, run: RunName, request: Request) -> Response:
        """Delete the run on all hosts, or none."""
        await self._hand_over(request, run_path(run))
        return Response(status_code=204)

    # --- weights ----------------------------------------------------------------------------------------------------

    async def weights(self, run: RunName, request: Request) -> Response:
        """The current weights of the whole run, of one version; once every host has the step that is waited for."""
        if is_worked_out(request.query_params):
            return await send_worked_out(run, request, self.hosts)
        await once_reached(run, request, self.watches)
        return await send_weights(run, request, self.hosts)

    async def sweep(self, run: RunName, request: Request) -> Response:
        """Averages of several lengths of the whole run, in one body."""
        return await send_sweep(run, request, self.hosts, await self._map(request, run))

    async def add_sweep(self, run: RunName, request: Request) -> Response:
        """What a sweep found, which each host notes by itself: whoever looks asks any of them."""
        content, path = await _body_of(request), sweeps_path(run)
        headers = {HEADER_KEY: secrets.token_hex(16), **passed_on(request.headers)}
        if kind := request.headers.get("content-type"):
            headers["content-type"] = kind
        first, *_ = await self.hosts.each(lambda host: self.hosts.send(host, "POST", path, headers, content=content))
        return Response(first.content, first.status_code, media_type="application/json")

    async def sweeps(self, run: RunName, request: Request) -> Response:
        """What sweeps found."""
        host, *_ = await self.hosts.all()
        return _json(await self._ask(request, sweeps_path(run), SweepList, host))

    async def profiles(self, run: RunName, request: Request) -> Response:
        """How an average would be worked out: every host has the ring, and what follows from it."""
        host, *_ = await self.hosts.all()
        query, headers = dict(request.query_params), passed_on(request.headers)
        return _json(await self.hosts.json(host, "GET", profiles_path(run), ProfileInfo, headers, params=query))

    async def events(self, run: RunName, request: Request) -> Response:
        """What happens to the whole run, as a stream."""
        return await send_events(run, request, self.watches)

    async def snapshot_weights(self, run: RunName, name: SnapshotName, request: Request) -> Response:
        """The weights of a snapshot of the whole run."""
        return await send_weights(run, request, self.hosts, snapshot=name)

    # --- snapshots --------------------------------------------------------------------------------------------------

    async def snapshots(self, run: RunName, request: Request) -> Response:
        """The snapshots that are on all hosts, oldest first."""

        async def ask() -> SnapshotList:
            return whole_snapshots(await self._each(request, snapshots_path(run), SnapshotList))

        return _json(await self._agreed(ask))

    async def snapshot(self, run: RunName, name: SnapshotName, request: Request) -> Response:
        """One of them."""
        return _json(await self._snapshot(request, run, name))

    async def take_snapshot(self, run: RunName, name: SnapshotName, request: Request) -> Response:
        """Take a snapshot on all hosts, or none."""
        told = await self._hand_over(request, snapshot_path(run, name), seconds=_SNAPSHOT_SECONDS)
        return _json(await self._snapshot(request, run, name), told.status_code)

    async def delete_snapshot(self, run: RunName, name: SnapshotName, request: Request) -> Response:
        """Delete a snapshot on all hosts, or none."""
        await self._hand_over(request, snapshot_path(run, name))
        return Response(status_code=204)

    async def _snapshot(self, request: Request, run: str, name: str) -> SnapshotInfo:
        async def ask() -> SnapshotInfo:
            return whole_snapshot(await self._each(request, snapshot_path(run, name), SnapshotInfo))

        return await self._agreed(ask)

    # --- pushes -----------------------------------------------------------------------------------------------------

    async def initialise(self, run: RunName, request: Request) -> Response:
        """Give the initial weights."""
        await self._push(run, request, weights_path(run), Splitting)
        return _json(await self._info(request, run))

    async def initialise_part(self, run: RunName, part: int, request: Request) -> Response:
        """Give one part of the initial weights."""
        answers = await self._push(run, request, part_path(run, None, part), PartSplitting)
        if any(answer.status_code == 200 for _, answer in answers):
            return _json(await self._info(request, run))
        return _json(whole_status([parsed(host, answer, UpdateStatus) for host, answer in answers]), 202)

    async def push(self, run: RunName, step: int, request: Request) -> Response:
        """Apply one update on all hosts, or none."""
        answers = await self._push(run, request, update_path(run, step), Splitting)
        results = [parsed(host, answer, UpdateResult) for host, answer in answers]
        return _json(_together(partial(whole_result, results)))

    async def push_part(self, run: RunName, step: int, part: int, request: Request) -> Response:
        """Take one part of an update, which is applied on all hosts, or none, once all parts are there."""
        answers = await self._push(run, request, part_path(run, step, part), PartSplitting)
        told = _together(partial(whole_part, [_part_told(*each) for each in answers]))
        return _json(told, 200 if isinstance(told, UpdateResult) else 202)

    async def status(self, run: RunName, step: int, request: Request) -> Response:
        """What is known of a step."""
        query = dict(request.query_params)
        ask = partial(self._ask, request, update_path(run, step), UpdateStatus, params=query)
        told = await all_of([all_of([ask(host) for host in each]) for each in await self.hosts.both(run)])
        firsts = [each[0] for each in told]
        known = all(each.digest for each in firsts)
        digests = slice_digests(firsts, await self._map(request, run)) if known else ()
        return _json(whole_status([status for each in told for status in each], digests))

    async def _push(
        self, run: str, request: Request, path: str, splitting: type[Splitting]
    ) -> list[tuple[HostAddress, httpx2.Response]]:
        """Send the hosts their slices of a body, and return what they answered."""
        if HEADER_SEGMENT in request.headers:
            raise SegmentUnusable("a gateway has no shared memory with its clients: the bytes go to other hosts")
        headers = {HEADER_PUSH: secrets.token_hex(16), **passed_on(request.headers)}
        hosts = await self.hosts.both(run)

        async def send(part: Slice) -> list[tuple[HostAddress, httpx2.Response]]:
            # At the first fault the other copy goes as well: neither host is sent more than the slower one takes.
            async with asyncio.TaskGroup() as group:
                sending = [group.create_task(send_to(host, part, at)) for at, host in enumerate(hosts[part.place])]
            return [each.result() for each in sending]

        async def send_to(host: HostAddress, part: Slice, at: int) -> tuple[HostAddress, httpx2.Response]:
            extra = {HEADER_DIGEST: DIGEST_FOLLOWS} if part.digested else {}
            if self.hosts.has_twins:
                extra[HEADER_COPIES] = str(len(hosts[part.place]))
            head = {**headers, **extra, "content-length": str(part.length), "content-type": "application/octet-stream"}
            timeout = httpx2.Timeout(SILENCE, read=_PUSH_SECONDS)
            query = dict(request.query_params)
            body = part.body(at)
            answer = await self.hosts.send(host, "PUT", path, head, content=body, params=query, timeout=timeout)
            return host, answer

        length = request.headers.get("content-length")
        cutting = splitting(
            await self._map(request, run),
            send,
            int(length) if length else None,
            request.headers.get(HEADER_DIGEST),
            copies=tuple(map(len, hosts)),
        )
        answers = cast("list[list[tuple[HostAddress, httpx2.Response]]]", await cutting.run(request.stream()))
        return [answer for each in answers for answer in each]

    # --- how it went ------------------------------------------------------------------------------------------------

    async def history(self, run: RunName, request: Request) -> Response:
        """What was measured of the whole run's updates."""
        return await self._past(request, history_path(run), History, whole_history)

    async def distances(self, run: RunName, request: Request) -> Response:
        """How far each tensor's shadow was from its parameters."""
        return await self._past(request, distances_path(run), Distances, whole_distances)

    async def timeline(self, run: RunName, request: Request) -> Response:
        """What was done to the run."""
        most, since, query = asked_of_hosts(request.query_params)
        merge = partial(whole_timeline, most=most, since=since)
        return await self._past(request, timeline_path(run), Timeline, merge, query)

    async def _past(
        self,
        request: Request,
        path: str,
        kind: type[T],
        merge: Callable[[Sequence[T]], T],
        query: Mapping[str, str] | None = None,
    ) -> Response:
        """What each host noted, as of one run; on a thread, for a history has thousands of numbers. query: for the
        hosts, by default the request's."""
        headers, query = passed_on(request.headers), query or dict(request.query_params)

        async def ask(host: HostAddress) -> tuple[HostAddress, httpx2.Response]:
            return host, await self.hosts.send(host, "GET", path, headers, params=query)

        told = await self.hosts.each(ask)
        body = await asyncio.to_thread(
            lambda: json.dumps(to_json(merge([parsed(host, answer, kind) for host, answer in told]))).encode()
        )
        return _tagged(request, body)

    # --- hosts ------------------------------------------------------------------------------------------------------

    async def _each(self, request: Request, path: str, kind: type[T]) -> list[T]:
        """What each host answers to a GET."""
        return await self.hosts.each(partial(self._ask, request, path, kind))

    async def _ask(self, request: Request, path: str, kind: type[T], host: HostAddress, **more: Any) -> T:
        return await self.hosts.json(host, "GET", path, kind, passed_on(request.headers), **more)

    async def _hand_over(self, request: Request, path: str, *, seconds: float = _DECISION_SECONDS) -> httpx2.Response:
        """What a host answers to a write that came, which all hosts make or none. seconds: for the answer."""
        content = await _body_of(request)
        headers = passed_on(request.headers)
        if kind := request.headers.get("content-type"):
            headers["content-type"] = kind
        host, *_ = await self.hosts.all()
        return await self.hosts.send(
            host,
            request.method,
            path,
            headers,
            content=content,
            params=dict(request.query_params),
            timeout=seconds,
        )

    async def _info(self, request: Request, run: str) -> RunInfo:
        """The whole run, once all hosts are at one place. Raises Overloaded where they are not."""

        async def ask() -> RunInfo:
            return await self._whole(await self._each(request, run_path(run), RunInfo), request)

        return await self._agreed(ask)

    async def _whole(self, infos: Sequence[RunInfo], request: Request) -> RunInfo:
        """The whole run of which the hosts tell so. Raises Apart."""
        return whole_info(infos, await self._map_of(infos[0], request))

    async def _map(self, request: Request, run: str) -> LayoutMap:
        """The hosts' shares of a run."""

        async def ask() -> LayoutMap:
            host, *_ = await self.hosts.all()
            return await self._map_of(await self._ask(request, run_path(run), RunInfo, host), request)

        return await self._agreed(ask)

    async def _map_of(self, told: RunInfo, request: Request) -> LayoutMap:
        """The hosts' shares of the run that was created when one of them tells. Raises Apart."""
        created_at, found = self._maps.get(told.run, (None, None))
        if found is None or created_at != told.created_at:
            found = await asyncio.to_thread(map_of, await self._each(request, layout_path(told.run), RunLayout))
            while len(self._maps) >= _MOST_LAYOUTS:
                del self._maps[next(iter(self._maps))]
            self._maps[told.run] = told.created_at, found
        return found

    async def _agreed(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What ``ask`` returns, which is called again while it raises Apart, or Superseded: while a run is being made
        on all hosts. Raises Overloaded where that goes on."""
        metrics = self.hosts.metrics
        clock = asyncio.get_running_loop().time
        until = clock() + _APART_SECONDS
        while True:
            try:
                return await ask()
            except (Apart, Superseded) as fault:
                metrics.apart.inc()
                if clock() > until:
                    metrics.disagreed.inc()
                    raise Overloaded(f"the hosts do not agree: {fault}", retry_after=1.0) from None
            await asyncio.sleep(_APART_PAUSE)


def _together(make: Callable[[], T]) -> T:
    """What answers to one write make. Raises Overloaded where they are of several."""
    try:
        return make()
    except Apart as fault:
        raise Overloaded(f"the hosts do not agree: {fault}", retry_after=1.0) from None


def _part_told(host: HostAddress, answer: httpx2.Response) -> UpdateResult | UpdateStatus:
    """What a host answered to a part of an update."""
    return parsed(host, answer, UpdateResult) if answer.status_code == 200 else parsed(host, answer, UpdateStatus)


def _json(body: Any, status: int = 200) -> JSONResponse:
    return JSONResponse(to_json(body), status)


def _tagged(request: Request, body: bytes) -> Response:
    """An answer of JSON, or that the reader has it already."""
    tag = f'"{hashlib.blake2b(body, digest_size=16).hexdigest()}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache", "Vary": "Authorization"}
    if is_known(request, tag):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


def _object_of(answer: httpx2.Response) -> dict[str, Any]:
    """The JSON object of a host's answer. Raises Overloaded."""
    with contextlib.suppress(ValueError):
        found = answer.json()
        if isinstance(found, dict) and "run" in found:
            return found
    raise Overloaded(f"{answer.url} answered with what no ema-service says")


async def _body_of(request: Request) -> bytes:
    """The body of a request that is no push. Raises BodyTooLarge."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _CONTROL_BYTES:
            raise BodyTooLarge(f"the body has more than {_CONTROL_BYTES} bytes")
    return bytes(body)


# --- the process -----------------------------------------------------------------------------------------------------


def serve(
    hosts: Hosts,
    sock: socket.socket,
    announce: Callable[[], None],
    pages: Callable[[FastAPI], None] = lambda _: None,
    tls: Certificate | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM. sock: from listening_socket(). announce: called once connections are accepted.
    pages: as for create_gateway(). tls: as for serving_config()."""
    app = create_gateway(hosts, pages)
    config = serving_config(app, tls, stop_seconds=20)
    server = _Server(config, announce, app.state.watches)
    server.run([sock])


class _Server(uvicorn.Server):
    """A server that says when it listens, and lets nobody wait any more before it waits for connections to end."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None], watches: Watches) -> None:
        super().__init__(config)
        self._announce = announce
        self._watches = watches

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._watches.end()
        await super().shutdown(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._announce()
