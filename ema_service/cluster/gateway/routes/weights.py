"""Weights that are read: of a version, of snapshots, worked out, of a sweep; and when there are new ones.

Knows which of them is asked for. Does not know how a body is put together (pulls, worked_out, sweeping).
"""

from __future__ import annotations

import secrets
from collections.abc import Set
from dataclasses import dataclass

from fastapi import Request
from fastapi.responses import Response

from ema_client.protocol import (
    HEADER_KEY,
    ProfileInfo,
    SnapshotList,
    SweepList,
    profiles_path,
    snapshots_path,
    sweeps_path,
)
from ema_service.cluster.gateway.asking import Asking, body_of, json_answer
from ema_service.cluster.gateway.hosts import passed_on
from ema_service.cluster.gateway.pulls import send_weights
from ema_service.cluster.gateway.routes.paths import RUN, Route, RunName, SnapshotName
from ema_service.cluster.gateway.sweeping import send_sweep
from ema_service.cluster.gateway.waiting import once_reached, send_events
from ema_service.cluster.gateway.watching import Watches
from ema_service.cluster.gateway.whole import Apart, whole_snapshots
from ema_service.cluster.gateway.worked_out import is_worked_out, send_worked_out

__all__ = ["WeightsRoutes"]


@dataclass(frozen=True, slots=True)
class WeightsRoutes:
    """The answers with weights."""

    asking: Asking
    watches: Watches

    @property
    def routes(self) -> tuple[Route, ...]:
        """Method, path and answer."""
        return (
            ("GET", f"{RUN}/weights", self.weights),
            ("HEAD", f"{RUN}/weights", self.weights),
            ("GET", f"{RUN}/profiles", self.profiles),
            ("GET", f"{RUN}/sweep", self.sweep),
            ("POST", f"{RUN}/sweeps", self.add_sweep),
            ("GET", f"{RUN}/sweeps", self.sweeps),
            ("GET", f"{RUN}/events", self.events),
            ("GET", f"{RUN}/snapshots/{{name}}/weights", self.snapshot_weights),
            ("HEAD", f"{RUN}/snapshots/{{name}}/weights", self.snapshot_weights),
        )

    async def weights(self, run: RunName, request: Request) -> Response:
        """The current weights of the whole run, of one version; once every host has the step that is waited for."""
        if is_worked_out(request.query_params):
            return await send_worked_out(run, request, self.asking.hosts)
        if soup := request.query_params.get("soup"):
            return await self._soup(run, request, {part.partition(":")[0] for part in soup.split(",")})
        await once_reached(run, request, self.watches)
        return await send_weights(run, request, self.asking.hosts)

    async def _soup(self, run: str, request: Request, names: Set[str]) -> Response:
        """A sum of snapshots, which each host works out of its rows. names: of the snapshots."""

        async def taken() -> dict[str, float]:
            found = whole_snapshots(await self.asking.each(request, snapshots_path(run), SnapshotList))
            return {each.name: each.created_at for each in found.snapshots if each.name in names}

        async def ask() -> Response:
            before = await taken()
            answer = await send_weights(run, request, self.asking.hosts)
            if await taken() != before:  # else one host may have opened another snapshot of a name than the next one
                raise Apart("a snapshot of the soup was replaced, or deleted")
            return answer

        return await self.asking.agreed(ask)

    async def sweep(self, run: RunName, request: Request) -> Response:
        """Averages of several lengths of the whole run, in one body."""
        return await send_sweep(run, request, self.asking.hosts, await self.asking.map(request, run))

    async def add_sweep(self, run: RunName, request: Request) -> Response:
        """What a sweep found, which each host notes by itself: whoever looks asks any of them."""
        hosts, content, path = self.asking.hosts, await body_of(request), sweeps_path(run)
        headers = {HEADER_KEY: secrets.token_hex(16), **passed_on(request.headers)}
        if kind := request.headers.get("content-type"):
            headers["content-type"] = kind
        first, *_ = await hosts.each(lambda host: hosts.send(host, "POST", path, headers, content=content))
        return Response(first.content, first.status_code, media_type="application/json")

    async def sweeps(self, run: RunName, request: Request) -> Response:
        """What sweeps found."""
        host, *_ = await self.asking.hosts.all()
        return json_answer(await self.asking.ask(request, sweeps_path(run), SweepList, host))

    async def profiles(self, run: RunName, request: Request) -> Response:
        """How an average would be worked out: every host has the ring, and what follows from it."""
        host, *_ = await self.asking.hosts.all()
        query = dict(request.query_params)
        return json_answer(await self.asking.ask(request, profiles_path(run), ProfileInfo, host, params=query))

    async def events(self, run: RunName, request: Request) -> Response:
        """What happens to the whole run, as a stream."""
        return await send_events(run, request, self.watches)

    async def snapshot_weights(self, run: RunName, name: SnapshotName, request: Request) -> Response:
        """The weights of a snapshot of the whole run."""
        return await send_weights(run, request, self.asking.hosts, snapshot=name)
