"""What is asked of a cluster's hosts for one answer, and how their answers become one.

Knows what is asked of each host, of one, or again until all are at one place. Does not know routes, or who decides.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import httpx2
from fastapi import Request
from fastapi.responses import JSONResponse

from ema_client.errors import BodyTooLarge, Overloaded, Superseded
from ema_client.protocol import RunInfo, RunLayout, layout_path, run_path, to_json
from ema_service.cluster.gateway.hosts import HostAddress, Hosts, passed_on
from ema_service.cluster.gateway.whole import Apart, degraded_info, map_of, whole_info
from ema_service.cluster.layout_map import LayoutMap
from ema_service.cluster.messages import talk_of

__all__ = ["LONG_SECONDS", "Asking", "body_of", "json_answer", "object_of", "together"]

T = TypeVar("T")

#: Most bytes of a request that is no push: a layout of 200,000 tensors takes about 20 MB.
_CONTROL_BYTES = 32 << 20
#: Seconds for which hosts are asked again that are not at the same place, and the pause between: a decision reaches the
#: last host some milliseconds after the first, and a second later where a message was lost.
_APART_SECONDS, _APART_PAUSE = 3.0, 0.02
#: Seconds that a host may work before it answers a write: a decision takes 30 at the most.
_DECISION_SECONDS = 90.0
#: Seconds that a host may work before it answers a write for which all hosts read or write files.
LONG_SECONDS = 900.0
#: Tensors whose places on the hosts are remembered, of all runs together.
_MOST_TENSORS = 200_000


class Asking:
    """What a gateway's answers are made of. hosts: of the cluster."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        #: run -> when it was created, and the hosts' shares of its tensors; the run that was asked for last is last.
        self._maps: dict[str, tuple[float, LayoutMap]] = {}

    async def each(self, request: Request, path: str, kind: type[T]) -> list[T]:
        """What each host answers to a GET."""
        return await self.hosts.each(partial(self.ask, request, path, kind))

    async def ask(self, request: Request, path: str, kind: type[T], host: HostAddress, **more: Any) -> T:
        """What one host answers to a GET. more: as of Hosts.json()."""
        return await self.hosts.json(host, "GET", path, kind, passed_on(request.headers), **more)

    async def hand_over(self, request: Request, path: str, *, seconds: float = _DECISION_SECONDS) -> httpx2.Response:
        """What a host answers to a write that came, which all hosts make or none. seconds: for the answer."""
        content = await body_of(request)
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

    async def info(self, request: Request, run: str) -> RunInfo:
        """The whole run, once all hosts are at one place. Raises Overloaded where they are not."""

        async def ask() -> RunInfo:
            return await self.whole(await self.each(request, run_path(run), RunInfo))

        return await self.agreed(ask)

    async def whole(self, infos: Sequence[RunInfo]) -> RunInfo:
        """The whole run of which the hosts tell so, degraded where nothing is decided for it. Raises Apart."""
        try:
            return whole_info(infos)
        except Apart:
            fault = await self._fault_of(infos[0])
            if not fault:
                raise
            return degraded_info(infos, fault)

    async def _fault_of(self, info: RunInfo) -> str:
        """Why nothing is decided for a run, by the coordinator's word; empty where that is not known, or all is well.
        info: of the run, at any host."""
        told = await self.hosts.talk(talk_of(info.run, info.shard.birth)) if info.shard else None
        return str((told or {}).get("fault") or "")

    async def map(self, request: Request, run: str) -> LayoutMap:
        """The hosts' shares of a run."""

        async def ask() -> LayoutMap:
            host, *_ = await self.hosts.all()
            return await self.map_of(await self.ask(request, run_path(run), RunInfo, host), request)

        return await self.agreed(ask)

    def known_map(self, run: str) -> LayoutMap | None:
        """The hosts' shares of a run, as far as they were asked for before."""
        return self._maps[run][1] if run in self._maps else None

    async def map_of(self, told: RunInfo, request: Request) -> LayoutMap:
        """The hosts' shares of the run that was created when one of them tells. Raises Apart."""
        created_at, found = self._maps.pop(told.run, (None, None))
        if found is None or created_at != told.created_at:
            found = await asyncio.to_thread(map_of, await self.each(request, layout_path(told.run), RunLayout))
            self._make_room(len(found.layout))
        self._maps[told.run] = told.created_at, found
        return found

    def _make_room(self, tensors: int) -> None:
        """Forget the runs that were not asked for longest, as far as so many tensors more ask for it."""
        known = sum(len(shares.layout) for _, shares in self._maps.values())
        while self._maps and known + tensors > _MOST_TENSORS:
            _, shares = self._maps.pop(next(iter(self._maps)))
            known -= len(shares.layout)

    async def agreed(self, ask: Callable[[], Awaitable[T]]) -> T:
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


def together(make: Callable[[], T]) -> T:
    """What answers to one write make. Raises Overloaded where they are of several."""
    try:
        return make()
    except Apart as fault:
        raise Overloaded(f"the hosts do not agree: {fault}", retry_after=1.0) from None


def json_answer(body: Any, status: int = 200) -> JSONResponse:
    """An answer with a body of the protocol."""
    return JSONResponse(to_json(body), status)


def object_of(answer: httpx2.Response) -> dict[str, Any]:
    """The JSON object of a host's answer. Raises Overloaded."""
    with contextlib.suppress(ValueError):
        found = answer.json()
        if isinstance(found, dict) and "run" in found:
            return found
    raise Overloaded(f"{answer.url} answered with what no ema-service says")


async def body_of(request: Request) -> bytes:
    """The body of a request that is no push. Raises BodyTooLarge."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _CONTROL_BYTES:
            raise BodyTooLarge(f"the body has more than {_CONTROL_BYTES} bytes")
    return bytes(body)
