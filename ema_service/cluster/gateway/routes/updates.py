"""What trainers send: updates and initial weights, whole or in parts.

Knows which host is sent which slice. Does not know how a body is cut (pushes), or who decides.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from functools import partial
from typing import cast

import httpx2
from fastapi import Request
from fastapi.responses import Response

from ema_client.errors import SegmentUnusable
from ema_client.protocol import (
    DIGEST_FOLLOWS,
    HEADER_COPIES,
    HEADER_DIGEST,
    HEADER_PUSH,
    HEADER_SEGMENT,
    UpdateResult,
    UpdateStatus,
    part_path,
    update_path,
    weights_path,
)
from ema_service.cluster.gateway.asking import Asking, json_answer, together
from ema_service.cluster.gateway.hosts import SILENCE, HostAddress, all_of, parsed, passed_on
from ema_service.cluster.gateway.pushes import PartSplitting, Slice, Splitting
from ema_service.cluster.gateway.routes.paths import RUN, STEP, Route, RunName
from ema_service.cluster.gateway.whole import slice_digests, whole_part, whole_result, whole_status

__all__ = ["UpdateRoutes"]

#: Seconds for the answer to a slice: the hosts whose slices come first wait for the last.
_PUSH_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class UpdateRoutes:
    """The answers to updates and initial weights."""

    asking: Asking

    @property
    def routes(self) -> tuple[Route, ...]:
        """Method, path and answer."""
        return (
            ("PUT", f"{RUN}/weights", self.initialise),
            ("GET", RUN + STEP, self.status),
            ("PUT", RUN + STEP, self.push),
            ("PUT", f"{RUN}/weights/parts/{{part:int}}", self.initialise_part),
            ("PUT", f"{RUN}{STEP}/parts/{{part:int}}", self.push_part),
        )

    async def initialise(self, run: RunName, request: Request) -> Response:
        """Give the initial weights."""
        await self._push(run, request, weights_path(run), Splitting)
        return json_answer(await self.asking.info(request, run))

    async def initialise_part(self, run: RunName, part: int, request: Request) -> Response:
        """Give one part of the initial weights."""
        answers = await self._push(run, request, part_path(run, None, part), PartSplitting)
        if any(answer.status_code == 200 for _, answer in answers):
            return json_answer(await self.asking.info(request, run))
        return json_answer(whole_status([parsed(host, answer, UpdateStatus) for host, answer in answers]), 202)

    async def push(self, run: RunName, step: int, request: Request) -> Response:
        """Apply one update on all hosts, or none."""
        answers = await self._push(run, request, update_path(run, step), Splitting)
        results = [parsed(host, answer, UpdateResult) for host, answer in answers]
        return json_answer(together(partial(whole_result, results)))

    async def push_part(self, run: RunName, step: int, part: int, request: Request) -> Response:
        """Take one part of an update, which is applied on all hosts, or none, once all parts are there."""
        answers = await self._push(run, request, part_path(run, step, part), PartSplitting)
        told = together(partial(whole_part, [_part_told(*each) for each in answers]))
        return json_answer(told, 200 if isinstance(told, UpdateResult) else 202)

    async def status(self, run: RunName, step: int, request: Request) -> Response:
        """What is known of a step."""
        query = dict(request.query_params)
        ask = partial(self.asking.ask, request, update_path(run, step), UpdateStatus, params=query)
        told = await all_of([all_of([ask(host) for host in each]) for each in await self.asking.hosts.both(run)])
        firsts = [each[0] for each in told]
        known = all(each.digest for each in firsts)
        digests = slice_digests(firsts, await self.asking.map(request, run)) if known else ()
        return json_answer(whole_status([status for each in told for status in each], digests))

    async def _push(
        self, run: str, request: Request, path: str, splitting: type[Splitting]
    ) -> list[tuple[HostAddress, httpx2.Response]]:
        """Send the hosts their slices of a body, and return what they answered."""
        if HEADER_SEGMENT in request.headers:
            raise SegmentUnusable("a gateway has no shared memory with its clients: the bytes go to other hosts")
        headers = {HEADER_PUSH: secrets.token_hex(16), **passed_on(request.headers)}
        hosts = await self.asking.hosts.both(run)

        async def send(part: Slice) -> list[tuple[HostAddress, httpx2.Response]]:
            # At the first fault the other copy goes as well: neither host is sent more than the slower one takes.
            async with asyncio.TaskGroup() as group:
                sending = [group.create_task(send_to(host, part, at)) for at, host in enumerate(hosts[part.place])]
            return [each.result() for each in sending]

        async def send_to(host: HostAddress, part: Slice, at: int) -> tuple[HostAddress, httpx2.Response]:
            extra = {HEADER_DIGEST: DIGEST_FOLLOWS} if part.digested else {}
            if self.asking.hosts.has_twins:
                extra[HEADER_COPIES] = str(len(hosts[part.place]))
            head = {**headers, **extra, "content-length": str(part.length), "content-type": "application/octet-stream"}
            timeout = httpx2.Timeout(SILENCE, read=_PUSH_SECONDS)
            query = dict(request.query_params)
            body = part.body(at)
            answer = await self.asking.hosts.send(host, "PUT", path, head, content=body, params=query, timeout=timeout)
            return host, answer

        length = request.headers.get("content-length")
        cutting = splitting(
            await self.asking.map(request, run),
            send,
            int(length) if length else None,
            request.headers.get(HEADER_DIGEST),
            copies=tuple(map(len, hosts)),
        )
        answers = cast("list[list[tuple[HostAddress, httpx2.Response]]]", await cutting.run(request.stream()))
        return [answer for each in answers for answer in each]


def _part_told(host: HostAddress, answer: httpx2.Response) -> UpdateResult | UpdateStatus:
    """What a host answered to a part of an update."""
    return parsed(host, answer, UpdateResult) if answer.status_code == 200 else parsed(host, answer, UpdateStatus)
