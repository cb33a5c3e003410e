"""Which runs there are, how each stands, and what is done to one on all hosts or on none.

Knows whom a write is handed to. Does not know who decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from ema_client.errors import EmaError
from ema_client.protocol import (
    RunInfo,
    RunList,
    RunShards,
    average_path,
    averages_path,
    reset_path,
    rewind_path,
    run_path,
    runs_path,
    writer_path,
    writers_path,
)
from ema_service.cluster.gateway.asking import LONG_SECONDS, Asking, json_answer, object_of
from ema_service.cluster.gateway.hosts import passed_on
from ema_service.cluster.gateway.overview import run_overview_of
from ema_service.cluster.gateway.routes.paths import RUN, AverageName, Route, RunName
from ema_service.cluster.gateway.whole import Apart, layout_of, shards_of

__all__ = ["RunRoutes"]


@dataclass(frozen=True, slots=True)
class RunRoutes:
    """The answers about runs."""

    asking: Asking

    @property
    def routes(self) -> tuple[Route, ...]:
        """Method, path and answer."""
        return (
            ("GET", runs_path(), self.runs),
            ("POST", runs_path(), self.create),
            ("GET", RUN, self.run),
            ("PATCH", RUN, self.change),
            ("DELETE", RUN, self.delete),
            ("GET", f"{RUN}/layout", self.layout),
            ("GET", f"{RUN}/shards", self.shards),
            ("GET", f"{RUN}/hosts", self.run_overview),
            ("POST", f"{RUN}/rewind", self.rewind),
            ("POST", f"{RUN}/reset-num-updates", self.reset),
            ("POST", f"{RUN}/averages", self.add_average),
            ("DELETE", f"{RUN}/averages/{{average}}", self.remove_average),
            ("GET", f"{RUN}/config", self.config),
            ("POST", f"{RUN}/writers", self.attach),
            ("DELETE", f"{RUN}/writers/{{writer:int}}", self.detach),
        )

    async def runs(self, request: Request) -> Response:
        """All runs that are on all hosts, with the query of one server. Hosts are asked for all their runs at once, and
        again while some run is not at one place: a request for each of hundreds of runs would take seconds."""
        query = dict(request.query_params)
        await self.asking.hosts.check_directory()
        ask_host = partial(self.asking.ask, request, runs_path(), RunList, params=query)
        found: dict[str, RunInfo] = {}

        async def ask() -> RunList:
            infos = [{each.run: each for each in told.runs} for told in await self.asking.hosts.each(ask_host)]
            names = [name for name in infos[0] if all(name in each for each in infos)]
            apart = ""
            for name in names:
                try:
                    found[name] = found.get(name) or await self.asking.whole([each[name] for each in infos])
                except Apart as fault:
                    apart = str(fault)
            if apart:
                raise Apart(apart)
            return RunList(tuple(found[name] for name in names))

        return json_answer(await self.asking.agreed(ask))

    async def create(self, request: Request) -> Response:
        """Create a run on all hosts, or none."""
        told = await self.asking.hand_over(request, runs_path())
        run = str(object_of(told)["run"])
        return json_answer(await self.asking.info(request, run), told.status_code)

    async def run(self, run: RunName, request: Request) -> Response:
        """The whole run as it stands."""
        return json_answer(await self.asking.info(request, run))

    async def layout(self, run: RunName, request: Request) -> Response:
        """The tensors of the whole run."""
        return json_answer(layout_of(run, await self.asking.map(request, run)))

    async def shards(self, run: RunName, request: Request) -> Response:
        """Where each shard of the run is, for clients that reach the hosts."""

        async def ask() -> RunShards:
            infos = await self.asking.each(request, run_path(run), RunInfo)
            shards, hosts = await self.asking.map_of(infos[0], request), await self.asking.hosts.both(run)
            return shards_of(infos, shards, hosts, twins=self.asking.hosts.has_twins)

        return json_answer(await self.asking.agreed(ask))

    async def run_overview(self, run: RunName, request: Request) -> Response:
        """Which part of the run each host has, and how it stands, as far as that is known while one is away."""
        shards = self.asking.known_map(run)
        try:
            shards = await self.asking.map(request, run)
        except EmaError as fault:
            if not fault.retryable:
                raise
        return json_answer(await run_overview_of(run, self.asking.hosts, passed_on(request.headers), shards))

    async def change(self, run: RunName, request: Request) -> Response:
        """A decay changed on all hosts or none."""
        await self.asking.hand_over(request, run_path(run))
        return json_answer(await self.asking.info(request, run))

    async def reset(self, run: RunName, request: Request) -> Response:
        """The counters set to 0 on all hosts or none."""
        await self.asking.hand_over(request, reset_path(run))
        return json_answer(await self.asking.info(request, run))

    async def rewind(self, run: RunName, request: Request) -> Response:
        """Back to a snapshot on all hosts, or none."""
        await self.asking.hand_over(request, rewind_path(run), seconds=LONG_SECONDS)
        return json_answer(await self.asking.info(request, run))

    async def add_average(self, run: RunName, request: Request) -> Response:
        """One more average on all hosts, or none."""
        told = await self.asking.hand_over(request, averages_path(run))
        return json_answer(await self.asking.info(request, run), told.status_code)

    async def remove_average(self, run: RunName, average: AverageName, request: Request) -> Response:
        """One average less on all hosts, or none."""
        await self.asking.hand_over(request, average_path(run, average), seconds=LONG_SECONDS)
        return Response(status_code=204)

    async def attach(self, run: RunName, request: Request) -> Response:
        """A trainer's number, the same on all hosts."""
        told = await self.asking.hand_over(request, writers_path(run))
        return JSONResponse(object_of(told), told.status_code)

    async def detach(self, run: RunName, writer: int, request: Request) -> Response:
        """The end of a training, which each host notes by itself."""
        hosts, path, headers = self.asking.hosts, writer_path(run, writer), passed_on(request.headers)
        await hosts.each(lambda host: hosts.send(host, "DELETE", path, headers))
        return json_answer(await self.asking.info(request, run))

    async def config(self, run: RunName, request: Request) -> Response:
        """With which configuration the whole run was created: every host has it."""
        host, *_ = await self.asking.hosts.all()
        told = await self.asking.hosts.send(host, "GET", f"{run_path(run)}/config", passed_on(request.headers))
        return Response(told.content, media_type="application/json")

    async def delete(self, run: RunName, request: Request) -> Response:
        """Delete the run on all hosts, or none."""
        await self.asking.hand_over(request, run_path(run))
        return Response(status_code=204)
