"""Averages of any length of the whole run: each host sums its own rows, all by the recipe that one of them has found.

    each host     GET version?hold=true               one version, whose weights stay from here on
    host 0        GET weights?sigma_rel=...           the recipe: which snapshots of the ring, with which weights
    each host     the same, with version and recipe   its slice; 409 where it lacks one of the snapshots
    then          as any weights are put together (pulls)

So no sum is of different snapshots on different hosts. Where a host lacks one, since a decision is on its way there,
all of it is asked for anew; where that goes on the reader is told which host and which snapshot.

Knows which requests go to the hosts. Does not know how a recipe is found, or what it says.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from fastapi import Request
from fastapi.responses import Response

from ema_client.errors import EmaError, InvalidRequest, Overloaded, Superseded, VersionGone
from ema_client.protocol import HEADER_RECIPE, RunVersion, version_path, weights_path
from ema_service.cluster.gateway.hosts import HostAddress, Hosts, all_of, passed_on
from ema_service.cluster.gateway.pulls import HOLD_SECONDS, PAUSE, TRIES, Asked, Moved, ShardBody, Whole, answer

__all__ = ["WORK_SECONDS", "Pinned", "agreed", "is_worked_out", "send_worked_out"]

T = TypeVar("T")

#: What of a query says which average is wished for, one of them, and what may come with it.
_WISHES = frozenset({"sigma_rel", "decay", "half_life", "window"})
_QUERY = _WISHES | {"at", "max_error", "dtype", "prefix"}
#: Seconds for the first bytes of a host.
WORK_SECONDS = 60.0


def is_worked_out(query: Mapping[str, str]) -> bool:
    """Whether a request for weights wishes for an average that the run did not track."""
    return not _WISHES.isdisjoint(query)


async def send_worked_out(run: str, request: Request, hosts: Hosts) -> Response:
    """The answer to GET or HEAD of such weights. Raises the hosts' errors; Overloaded where they were never at one
    version, or do not have the same ring; InvalidRequest."""
    if others := sorted(set(request.query_params) - _QUERY):
        raise InvalidRequest(f"{others[0]}: does not go with sigma_rel, decay, half_life or window")
    return answer(request, await agreed(hosts, lambda: _open(run, request, hosts)))


async def agreed(hosts: Hosts, ask: Callable[[], Awaitable[T]]) -> T:
    """What ``ask`` returns, which is called again where the hosts do not have the same. Raises Overloaded where that
    goes on."""
    for left in reversed(range(TRIES)):
        try:
            return await ask()
        except (Moved, Superseded, VersionGone) as fault:
            hosts.metrics.apart.inc()
            if not left:
                hosts.metrics.disagreed.inc()
                raise _apart(fault) from None
        await asyncio.sleep(PAUSE)
    raise RuntimeError("the last try returns or raises")


def _apart(fault: Moved | EmaError) -> Overloaded:
    why = fault.detail if isinstance(fault, EmaError) else "updates come faster than they can be read"
    return Overloaded(f"the hosts do not have the same: {why}", hint="ask again", retry_after=0.5)


async def _open(run: str, request: Request, hosts: Hosts) -> Whole:
    """One average on all hosts. Raises Moved, Superseded, and the hosts' errors."""
    headers, query = passed_on(request.headers), dict(request.query_params)
    places = await hosts.all()
    pinned = Pinned(hosts, run, headers)
    version = await pinned.one_version(places)
    async with pinned.staying(places, version):
        asked = _AskedWorkedOut(hosts, weights_path(run), {**query, "version": version}, headers, pinned)
        recipe = await asked.recipe(places[0])
        asked = replace(asked, query={**asked.query, "recipe": recipe})
        whole = Whole(asked, await asked.bodies(places))
        whole.headers[HEADER_RECIPE] = recipe  # for who asks the hosts as well
        return whole


@dataclass(frozen=True, slots=True)
class Pinned:
    """A version of a run that stays at its hosts. headers: of the reader."""

    hosts: Hosts
    run: str
    headers: Mapping[str, str]

    async def one_version(self, places: tuple[HostAddress, ...]) -> str:
        """A version that all hosts have, and that stays there for a second. Raises Moved."""
        there: dict[int, str] = {}
        for number in range(TRIES):
            if number:
                await asyncio.sleep(PAUSE)
            missing = [host for host in places if host.place not in there]
            found = await all_of([self._hold(host, None) for host in missing])
            there.update(zip([host.place for host in missing], found, strict=True))
            newest = max(there.values(), key=_age)
            there = {place: version for place, version in there.items() if version == newest}
            if len(there) == len(places):
                return newest
        raise Moved

    @contextlib.asynccontextmanager
    async def staying(self, places: tuple[HostAddress, ...], version: str) -> AsyncIterator[None]:
        """Within the block, and for a second more, the version stays."""
        holding = asyncio.create_task(self._keep(places, version))
        try:
            yield
        finally:
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)

    async def hold(self, host: HostAddress, version: str) -> None:
        """Have the version stay at one host. Raises VersionGone where it is gone."""
        await self._hold(host, version)

    async def _keep(self, places: tuple[HostAddress, ...], version: str) -> None:
        while True:
            await asyncio.sleep(HOLD_SECONDS)
            # A host that fails here is told of when its slice is asked for.
            await asyncio.gather(*(self.hold(host, version) for host in places), return_exceptions=True)

    async def _hold(self, host: HostAddress, version: str | None) -> str:
        query = {"hold": "true"} if version is None else {"hold": "true", "version": version}
        told = await self.hosts.json(host, "GET", version_path(self.run), RunVersion, self.headers, params=query)
        if told.version is None:
            raise Superseded(f"{host} has no weights of run {self.run!r}", retry_after=0.1)
        return told.version


@dataclass(frozen=True, slots=True)
class _AskedWorkedOut(Asked):
    """One reader's request for an average that is worked out, as it goes to the hosts."""

    pinned: Pinned

    async def recipe(self, host: HostAddress) -> str:
        """How the average is worked out. Raises Moved."""
        query = {name: value for name, value in self.query.items() if name not in ("prefix", "dtype")}
        async with self._open(host, 0, 1, None, query) as told:
            return str(told.headers[HEADER_RECIPE])

    async def bodies(self, places: tuple[HostAddress, ...]) -> list[ShardBody]:
        """Each host's slice, without hosts that have none of the tensors asked for. Raises Moved, Superseded."""
        # Replicas have no ring.
        found = await all_of([self._lead(host._replace(replicas=()), None) for host in places])
        shards = self._present(found)
        if any(each.header.metadata != shards[0].header.metadata for each in shards):
            raise Superseded("the hosts' answers are of different averages", retry_after=0.0)
        return shards

    async def hold(self, shard: ShardBody) -> None:
        """Have the version stay at its host that the average is worked out of."""
        await self.pinned.hold(shard.host, self.query["version"])

    @property
    def work_seconds(self) -> float:
        """Seconds in which a host waits for its ring, and finds weights."""
        return WORK_SECONDS


def _age(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
