"""The hosts of a cluster as a gateway reaches them: where each is, and requests to it.

The coordinator has the map. A map that was told once is used on while the coordinator is away: reads need no decision.

What a request says of its sender goes on to each host, which checks it as if the sender had come there: the token, and
from which page and by which name a browser came. A gateway itself lets nobody in that a host would not.

Knows HTTP, and which faults mean that a host is away. Does not know runs or routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2

from ema_client.errors import (
    PROBLEM_JSON,
    EmaError,
    Forbidden,
    InternalError,
    Overloaded,
    ProtocolError,
    RunDegraded,
    RunNotFound,
    SnapshotDamaged,
    Stopping,
    StorageFailed,
    Unauthorized,
    error_from_problem,
)
from ema_client.protocol import API, HEADER_KEY, HEADER_PUSH, HEADER_WRITER, from_json, runs_path
from ema_service.cluster.counting import GatewayMetrics
from ema_service.cluster.gateway.twins import HostAddress, Twins
from ema_service.cluster.messages import DIRECTORY
from ema_service.cluster.reaching import client_of
from ema_service.cluster.token import ClusterToken
from ema_service.cluster.whereabouts import NoCoordinator, coordinator_url
from ema_service.tls import may_be_tls, why_no_tls

__all__ = ["SILENCE", "HostAddress", "Hosts", "all_of", "parsed", "passed_on"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds for a connection to be there, for a coordinator to answer, and for anybody to say or take anything.
_CONNECT, _MAP, SILENCE = 5.0, 2.0, 60.0
#: Seconds after which a host that takes none of a body is held for gone: it may have to wait for its processors.
_UNREAD = 15.0
#: Seconds after which the map is asked for again, although every host answered.
_MAP_AGE = 2.0
#: Seconds after a gateway's start in which it is no fault that hosts have not come yet.
_STARTING = 20.0
#: What of a request's head is a host's to judge.
_PASSED = ("authorization", "host", "origin", "sec-fetch-site", HEADER_KEY, HEADER_PUSH, HEADER_WRITER)
#: Errors that are about the host, not about the run or the request: the text then says which host.
_OF_A_HOST = (InternalError, Overloaded, RunDegraded, SnapshotDamaged, Stopping, StorageFailed)


def passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """Of a request's headers those that go on to the hosts."""
    return {name: headers[name] for name in _PASSED if name in headers}


class Hosts:
    """The cluster's hosts. On one event loop; to be closed.

    Requests raise the host's error as it stands, with the host's name where the error is the host's own; Overloaded
    where a host does not answer. metrics: of the gateway.

    More than twenty methods, the steps of one way: a map that is asked for, a request, and what its answer means.
    """

    def __init__(self, coordinators: Sequence[str], token: ClusterToken, *, guarded: bool = False) -> None:
        """coordinators: their URLs, asked in turn. guarded: nobody is answered for a host that asks for no tokens."""
        self._coordinators = tuple(coordinators)
        self._token = token
        self._guarded = guarded
        self._client = client_of(unheard=_UNREAD, timeout=httpx2.Timeout(SILENCE, connect=_CONNECT))
        self._map: tuple[HostAddress, ...] = ()
        self._twins: Twins | None = None
        self._told = float("-inf")
        self._logged: tuple[int, str] | None = None
        self._began = time.monotonic()
        self._asking = asyncio.Lock()
        #: By place: how often a holder was chosen.
        self._turns: Counter[int] = Counter()
        self.metrics = GatewayMetrics()

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def all(self) -> tuple[HostAddress, ...]:
        """The hosts, by place. Raises Overloaded where not all are known; Forbidden where they are to ask for tokens,
        and one does not."""
        if self._is_old():
            async with self._asking:  # many who come at once make one question
                if self._is_old():
                    await self._look()
        return self._map

    async def both(self, run: str) -> tuple[tuple[HostAddress, ...], ...]:
        """By shard, the hosts that have to hear what is written to a run: one, or two of twins. Raises as all()."""
        hosts = await self.all()
        return tuple((host,) for host in hosts) if self._twins is None else self._twins.both(run)

    async def every(self) -> tuple[HostAddress, ...]:
        """All hosts, by their own places, also those that are left behind. Raises as all()."""
        hosts = await self.all()
        return hosts if self._twins is None else self._twins.every

    @property
    def has_twins(self) -> bool:
        """Whether each shard has two hosts, by the latest map."""
        return self._twins is not None

    def _is_old(self) -> bool:
        return time.monotonic() - self._told > _MAP_AGE

    async def _look(self) -> None:
        """Take in the coordinator's map. Raises as all()."""
        try:
            found, twins = await self._asked_map()
        except Overloaded as fault:
            self.metrics.unmapped.inc()
            self._log_once(fault.detail)
            if not self._map:
                raise
        else:
            self._log_once("")
            if self._guarded and found != self._map:
                # These very hosts: by the map that is about to go, another one of twins may have the shard.
                await all_of([self._check_guarded(host._replace(chosen=True)) for host in found])
            self._map = found
            self._twins = twins
            self.metrics.hosts.set(len(found))
        self._told = time.monotonic()

    def _log_once(self, fault: str) -> None:
        """Log why there is no map, where that is new, or is a fault by now; empty: there is one."""
        level = logging.INFO if time.monotonic() - self._began < _STARTING else logging.WARNING
        said = (level, fault) if fault else None
        if said and said != self._logged:
            _log.log(level, "%s", fault)
        self._logged = said

    async def _check_guarded(self, host: HostAddress) -> None:
        """Raises Forbidden where a host answers without a token."""
        with contextlib.suppress(Unauthorized):
            await self.send(host, "GET", runs_path(), {}, params={"limit": 1})
            raise Forbidden(
                f"{host} asks for no tokens, and this gateway can be reached by others: anyone could write every run",
                hint="start the hosts with --token-file, or the gateway with --insecure-no-auth",
            )

    async def each(self, ask: Callable[[HostAddress], Awaitable[T]]) -> list[T]:
        """What ``ask`` returns for each host, by place, asked at once. Raises the first error, once nobody is asked any
        more; one that no retry would mend before others."""
        return await all_of([ask(host) for host in await self.all()])

    async def json(
        self, host: HostAddress, method: str, path: str, kind: type[T], headers: Mapping[str, str], **more: Any
    ) -> T:
        """A host's answer to a request, as a dataclass of the protocol. more: as for send()."""
        return parsed(host, await self.send(host, method, path, headers, **more), kind)

    async def send(
        self, host: HostAddress, method: str, path: str, headers: Mapping[str, str], **more: Any
    ) -> httpx2.Response:
        """A host's answer to a request, read whole. more: params, content, timeout, as httpx2 has them."""
        async with self.open(host, method, path, headers, **more) as answer:
            with self._faults(host):
                await answer.aread()
            return answer

    @contextlib.asynccontextmanager
    async def open(
        self, host: HostAddress, method: str, path: str, headers: Mapping[str, str], **more: Any
    ) -> AsyncIterator[httpx2.Response]:
        """A host's answer to a request, whose body is yet to be read."""
        given = {"accept-encoding": "identity", **headers}
        host = host if self._twins is None else self._twins.serving(host, path)
        request = self._client.build_request(method, host.address + path, headers=given, **more)
        with self._faults(host):
            answer = await self._answer(host, request)
        if not host.is_replica:
            self.metrics.away.labels(str(host.place)).set(0)
        try:
            if answer.status_code >= 400:
                with self._faults(host):
                    fault = _error_of(host, answer, await answer.aread())
                raise await self._weighed(fault, host, path)
            yield answer
        finally:
            await answer.aclose()

    async def check_directory(self) -> None:
        """Raises Overloaded where a host's disk is an older copy, or empty, so that it knows other runs than there
        are: what hosts say of runs that they do not have counts for nothing then."""
        why = (await self.talk(DIRECTORY) or {}).get("fault")
        if why:
            raise Overloaded(
                f"which runs there are is not known: {why}",
                hint="put the data dir back that the host had: ema_service/OPERATIONS.md, A cluster",
                retry_after=1.0,
            )

    async def _weighed(self, fault: EmaError, host: HostAddress, path: str) -> EmaError:
        """A host's error, or Overloaded in its place: where there may well be the run that the host does not know; of
        twins where the host does not count by a map that is asked for now, and says what follows from an older
        version."""
        if isinstance(fault, RunNotFound) and not host.is_replica:
            try:
                await self.check_directory()
            except Overloaded as doubt:
                return doubt
        if self._twins is None or host.is_replica:
            return fault
        self._told = float("-inf")  # the twin may have come back, or the host been left behind
        if not fault.retryable:
            with contextlib.suppress(Overloaded):
                _, twins = await self._asked_map()
                if twins and not twins.counts(host, path):
                    return Overloaded(f"{host} was left behind, and answers with what it had", retry_after=0.1)
        return fault

    async def _answer(self, host: HostAddress, request: httpx2.Request) -> httpx2.Response:
        """The head of a host's answer. Given up where the host is elsewhere by now: its former machine may be gone, and
        end no connection. Raises httpx2.HTTPError."""
        asking = asyncio.ensure_future(self._client.send(request, stream=True))
        try:
            while not (await asyncio.wait({asking}, timeout=_MAP_AGE))[0]:
                with contextlib.suppress(Overloaded, Forbidden):
                    hosts = await self.all()
                    known = hosts if self._twins is None else self._twins.every
                    if host.address not in [each.address for one in known for each in one.holders]:
                        raise httpx2.ReadError("the host is elsewhere by now", request=request)
            return asking.result()
        finally:
            asking.cancel()

    async def chunks(self, host: HostAddress, answer: httpx2.Response) -> AsyncIterator[bytes]:
        """The body of an answer that open() gave, as it comes."""
        with self._faults(host):
            async for chunk in answer.aiter_raw():
                yield chunk

    def next_holder(self, host: HostAddress) -> HostAddress:
        """The host itself or one of its replicas, in turn."""
        self._turns[host.place] += 1
        return host.holders[self._turns[host.place] % len(host.holders)]

    async def talk(self, talk: str) -> dict[str, Any] | None:
        """What the first coordinator that answers says of a talk and its shards; None where none does."""
        for url in self._coordinators:
            with contextlib.suppress(httpx2.HTTPError, ValueError, NoCoordinator, Overloaded):
                found = await self._ask_coordinator(url, talk)
                if isinstance(found, dict):
                    return found
        return None

    # --- the map ----------------------------------------------------------------------------------------------------

    async def _asked_map(self) -> tuple[tuple[HostAddress, ...], Twins | None]:
        """The map, from the first coordinator that has it. Raises Overloaded."""
        faults = []
        for url in self._coordinators:
            try:
                told = await self._ask_coordinator(url)
                twins = Twins(told) if told.get("twins") else None
                return (_hosts_of(told) if twins is None else twins.hosts), twins
            except (httpx2.HTTPError, ValueError, NoCoordinator) as fault:
                ended = isinstance(fault, (httpx2.RemoteProtocolError, httpx2.ReadError))
                why = f"{type(fault).__name__}: {fault}{may_be_tls(url) if ended else ''}"
                faults.append(f"{url}: {why_no_tls(fault) or why}")
            except Overloaded as fault:
                faults.append(f"{url}: {fault.detail}")
        raise Overloaded(
            f"where the hosts are is not known: {'; '.join(faults)}",
            hint="is the coordinator up, and has every host been started?",
            retry_after=1.0,
        )

    async def _ask_coordinator(self, url: str, talk: str = DIRECTORY) -> Any:
        """A coordinator's map of a talk as JSON. Raises HTTPError of httpx2, ValueError, NoCoordinator, Overloaded."""
        path = f"{coordinator_url(url)}{API}/runs/{quote(talk)}/shards"
        answer = await self._client.get(path, headers={"Authorization": self._token.header}, timeout=_MAP)
        if answer.status_code == 404:
            raise Overloaded("no host has come to the coordinator yet")
        if answer.status_code != 200:
            raise ValueError(f"the coordinator answered {answer.status_code}: {answer.text[:200]}")
        return answer.json()

    @contextlib.contextmanager
    def _faults(self, host: HostAddress) -> Iterator[None]:
        """Turn a fault of httpx2 into an error that names the host, which may be elsewhere by now."""
        try:
            yield
        except httpx2.HTTPError as fault:
            self._told = float("-inf")
            if not host.is_replica:
                self.metrics.away.labels(str(host.place)).set(1)
                self.metrics.failures.labels(str(host.place)).inc()
            raise Overloaded(
                f"{host} does not answer: {why_no_tls(fault) or type(fault).__name__}",
                hint="nothing is decided without every host: start it again, or wait until it is there",
                retry_after=1.0,
            ) from fault


def parsed(host: HostAddress, answer: httpx2.Response, kind: type[T]) -> T:
    """A host's answer as a dataclass of the protocol. Raises Overloaded for what is none."""
    try:
        return from_json(kind, json.loads(answer.content))
    except ValueError as fault:
        raise Overloaded(f"{host} answered {answer.url.path} with what no ema-service says: {fault}") from None


def _hosts_of(told: Any) -> tuple[HostAddress, ...]:
    """The hosts in a coordinator's map. Raises Overloaded where one never came; ValueError for what is no map."""
    try:
        seats = {int(seat["place"]): seat["address"] for seat in told["shards"]}
        away = [place for place in range(len(seats)) if not seats[place]]
        replicas: dict[int, tuple[str, ...]] = dict.fromkeys(seats, ())
        for each in told.get("replicas", ()):
            replicas[int(each["place"])] += (_plain(each["address"]),)
    except (KeyError, TypeError) as fault:
        raise ValueError(f"no map: {type(fault).__name__}") from None
    if away or not seats:
        raise Overloaded(f"host {', '.join(map(str, away))} has not come to the coordinator yet")
    return tuple(HostAddress(place, _plain(seats[place]), replicas=replicas[place]) for place in range(len(seats)))


def _plain(address: object) -> str:
    return str(address).rstrip("/")


def _error_of(host: HostAddress, answer: httpx2.Response, body: bytes) -> EmaError:
    """The error that a host answered."""
    with contextlib.suppress(ValueError):
        told = json.loads(body)
        if answer.headers.get("content-type", "").startswith(PROBLEM_JSON) and isinstance(told, dict):
            error = error_from_problem(told, answer.status_code, retry_after=_seconds(answer))
            if isinstance(error, _OF_A_HOST):
                return type(error)(f"{host}: {error.detail}", hint=error.hint, retry_after=error.retry_after)
            if not isinstance(error, ProtocolError):
                return error
    return Overloaded(f"{host} answered {answer.status_code}, and not as an ema-service does", retry_after=1.0)


def _seconds(answer: httpx2.Response) -> float | None:
    """What a host says of when to come again."""
    try:
        return float(answer.headers["retry-after"])
    except (KeyError, ValueError):
        return None


async def all_of(asked: Sequence[Awaitable[T]]) -> list[T]:
    """What all return, in order. Raises the first error, one that no retry would mend before others; at an error of the
    latter kind the rest is given up."""
    tasks = [asyncio.ensure_future(each) for each in asked]
    try:
        pending = set(tasks)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_EXCEPTION)
            _check_final(done)
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _check_final(done: set[asyncio.Task[T]] | set[asyncio.Future[T]]) -> None:
    """Raises an error of one of these that no retry would mend."""
    for each in done:
        fault = each.exception()
        if fault is not None and not (isinstance(fault, EmaError) and fault.retryable):
            try:
                raise fault
            finally:
                del fault  # an error that knows its own frame is a cycle
