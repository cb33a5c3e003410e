"""Who the hosts of a cluster are and how each stands: for people, so what one of them does not say is told as unknown.

    coordinator  who listens, since when; each shard's revision
    each host    what it is, what it takes; how its shard of a run stands

Knows what coordinator and hosts tell, and that one of them may be away. Does not know routes, or pages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ema_client.errors import EmaError, Overloaded, RunNotFound, Unauthorized
from ema_client.protocol import RunInfo, ServerInfo, run_path, server_path
from ema_service.cluster.gateway.hosts import HostAddress, Hosts
from ema_service.cluster.layout_map import LayoutMap, ShardLayout
from ema_service.cluster.messages import DIRECTORY, talk_of

__all__ = ["HostNow", "Overview", "ReplicaNow", "RunOverview", "ShardNow", "overview_of", "run_overview_of"]

T = TypeVar("T")

#: Seconds for a host to answer: a page waits for the slowest, and for ten at most.
_PATIENCE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class ReplicaNow:
    """One replica of a host. since: when a coordinator heard it first, Unix seconds. server, fault: as of HostNow."""

    address: str
    since: float
    server: ServerInfo | None
    fault: str | None


@dataclass(frozen=True, slots=True)
class HostNow:
    """One host. address: None where it never came. listens: to the coordinator, None where no coordinator tells; since:
    when that began, Unix seconds. server: what the host says of itself. fault: why it does not, or takes no writes.
    replicas: those that a coordinator hears."""

    place: int
    address: str | None
    listens: bool | None
    since: float | None
    server: ServerInfo | None
    fault: str | None
    replicas: tuple[ReplicaNow, ...] = ()


@dataclass(frozen=True, slots=True)
class Overview:
    """All hosts, by place. term: the coordinator's number, which grows with each that takes over; None where none
    answers, or has claimed none yet."""

    term: int | None
    hosts: tuple[HostNow, ...]


@dataclass(frozen=True, slots=True)
class ShardNow:
    """One host's shard of a run. first, last: the tensor and the row that it begins and ends with. start, stop: its
    stretch of the bytes of all shadows of one average. revision: how many writes all hosts decided, by its latest word
    to the coordinator. info: how the host says that its shard stands; fault: why it does not."""

    place: int
    tensors: int | None
    first: tuple[str, int] | None
    last: tuple[str, int] | None
    start: int | None
    stop: int | None
    revision: int | None
    info: RunInfo | None
    fault: str | None


@dataclass(frozen=True, slots=True)
class RunOverview:
    """All shards of a run, by place. term: as in Overview, of the talk about the run. fault: why nothing is decided."""

    run: str
    term: int | None
    fault: str | None
    shards: tuple[ShardNow, ...]


#: Of a host without which the others go on.
_LEFT_BEHIND = "left behind: its twin has its shard alone until it is filled again"


async def overview_of(hosts: Hosts, headers: Mapping[str, str]) -> Overview:
    """The hosts, for whoever asks with these headers. Raises Unauthorized, Forbidden as they do; Overloaded where
    neither a coordinator nor a host answers."""
    told = await hosts.talk(DIRECTORY)
    seats: Sequence[Mapping[str, Any]] = told["shards"] if told else [each._asdict() for each in await hosts.all()]
    replicas: Sequence[Mapping[str, Any]] = told.get("replicas", ()) if told else ()
    found = list(await asyncio.gather(*(_host(hosts, seat, replicas, headers) for seat in seats)))
    for place in {place for places in (told or {}).get("absent", {}).values() for place in places}:
        said = found[place].fault
        found[place] = replace(found[place], fault=f"{_LEFT_BEHIND}; {said}" if said else _LEFT_BEHIND)
    known = [each.server for each in found if each.server]
    if not known:
        raise Overloaded("no host of the cluster answers", retry_after=1.0)
    if not any(each.scopes for each in known):
        raise Unauthorized("the hosts of this cluster want a bearer token")
    return Overview(_term(told), tuple(found))


async def run_overview_of(run: str, hosts: Hosts, headers: Mapping[str, str], shards: LayoutMap | None) -> RunOverview:
    """The shards of a run. shards: its map, None where that is not known. Raises Unauthorized, Forbidden, RunNotFound;
    Overloaded where no host answers."""
    there = await hosts.every()
    more = {"timeout": _PATIENCE_SECONDS}
    asked = await asyncio.gather(
        *(_asked(hosts.json(each, "GET", run_path(run), RunInfo, headers, **more)) for each in there)
    )
    infos = [info for info, _ in asked if info]
    if not infos:
        raise next(fault for _, fault in asked if fault)
    birth = next((info.shard.birth for info in infos if info.shard), None)
    told = await hosts.talk(talk_of(run, birth)) if birth is not None else None
    seats = told["shards"] if told else [{}] * len(there)
    layouts: Sequence[ShardLayout | None] = shards.shards if shards else [None] * len(there)
    layouts = [*layouts, *layouts][: len(there)]  # of twins the later half has the same shards once more
    found = [
        _shard(host.place, info, fault, seat, layout)
        for host, (info, fault), seat, layout in zip(there, asked, seats, layouts, strict=True)
    ]
    return RunOverview(run, _term(told), told["fault"] if told else None, tuple(found))


async def _host(
    hosts: Hosts, seat: Mapping[str, Any], replicas: Sequence[Mapping[str, Any]], headers: Mapping[str, str]
) -> HostNow:
    """How one host stands, and those among the ``replicas`` that are its own. Raises Unauthorized, Forbidden."""
    place, address = int(seat["place"]), seat["address"]
    listens, since = seat.get("listens"), seat.get("since")
    if address is None:
        return HostNow(place, None, listens, since, None, "has not come to the coordinator yet")
    own = [each for each in replicas if int(each["place"]) == place]
    (server, fault), *others = await asyncio.gather(
        _server(hosts, HostAddress(place, address, chosen=True), headers),
        *(_server(hosts, HostAddress(place, str(each["address"]), is_replica=True), headers) for each in own),
    )
    told = (
        ReplicaNow(str(each["address"]), float(each["since"]), *said) for each, said in zip(own, others, strict=True)
    )
    return HostNow(place, address, listens, since, server, fault, tuple(told))


async def _server(hosts: Hosts, host: HostAddress, headers: Mapping[str, str]) -> tuple[ServerInfo | None, str | None]:
    """What a host or a replica says of itself, and why it does not, or is not ready. Raises Unauthorized, Forbidden."""
    more = {"timeout": _PATIENCE_SECONDS}
    server, fault = await _asked(hosts.json(host, "GET", server_path(), ServerInfo, headers, **more))
    if server:
        _, fault = await _asked(hosts.send(host, "GET", "/readyz", headers, **more))
    return server, fault.detail if fault else None


async def _asked(answer: Awaitable[T]) -> tuple[T | None, EmaError | None]:
    """What is answered, or the error of a host that is away or unwell. Raises errors that are about who asks."""
    try:
        return await answer, None
    except EmaError as fault:
        if fault.retryable or isinstance(fault, RunNotFound):
            return None, fault
        raise


def _shard(
    place: int, info: RunInfo | None, fault: EmaError | None, seat: Mapping[str, Any], layout: ShardLayout | None
) -> ShardNow:
    names = list(layout.boxes) if layout else []
    first = (names[0], _rows(layout, names[0])[0]) if layout and names else None
    last = (names[-1], max(_rows(layout, names[-1])[1] - 1, 0)) if layout and names else None
    return ShardNow(
        place=place,
        tensors=len(names) if layout else None,
        first=first,
        last=last,
        start=layout.shadows.start if layout else None,
        stop=layout.shadows.stop if layout else None,
        revision=seat.get("revision"),
        info=info,
        fault=fault.detail if fault else None,
    )


def _rows(layout: ShardLayout, name: str) -> tuple[int, int]:
    """Which rows of a tensor a shard has."""
    box = layout.boxes[name]
    return (box[0][0], box[0][1]) if box else (0, 1)


def _term(told: Mapping[str, Any] | None) -> int | None:
    return (told["term"] or None) if told else None
