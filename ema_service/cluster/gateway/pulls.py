"""Weights of the whole run, put together while they are sent: one header, then the hosts' data in turn.

    each host     bytes=0-65535      its ETag and header: the version stays there for a second, whatever is applied
    compare       one version?       else those that are behind are asked again, three times in all
    each in turn  bytes=N-, If-Range its data, of the host or a replica that holds the version; those whose turn is not
                                     over are asked for a byte now and then, which has the version stay

So no host has a connection on which nothing moves, and a gateway has no more of a body than it is sending. The ETag is
made of the hosts' ETags: a request with If-Range brings them back, and each host is asked for the version it names. A
gateway that was started anew, and another gateway, go on with a body that was begun.

Knows HTTP's ranges and conditions, and safetensors' headers. Does not know routes, layouts of runs, or who decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, groupby

import httpx2
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from ema_client.errors import EmaError, InvalidRequest, Overloaded, RangeNotSatisfiable, RunNotFound
from ema_client.protocol import (
    HEADER_SHARDS,
    RunInfo,
    TensorSpec,
    WeightsInfo,
    run_path,
    snapshot_weights_path,
    weights_path,
)
from ema_client.wire import LENGTH_BYTES, Entry, Header, build_header, parse_header, parse_length, place
from ema_service.cluster.gateway.hosts import SILENCE, HostAddress, Hosts, all_of, passed_on
from ema_service.cluster.layout_map import MergedBody
from ema_service.cluster.problems import problem

__all__ = [
    "HOLD_SECONDS",
    "PAUSE",
    "TRIES",
    "Asked",
    "Moved",
    "ShardBody",
    "Streaming",
    "Whole",
    "answer",
    "is_known",
    "send_weights",
]

_log = logging.getLogger(__name__)

#: Bytes of the first request to each host: the headers of most shards, and the whole of small ones.
_LEAD_BYTES = 64 << 10
#: Parsing a header longer than this takes more than 30 ms, so it is parsed off the event loop.
_LONG_HEADER_BYTES = 256 << 10
#: How often hosts are asked for one version, and the seconds between two times: a decision reaches the last host some
#: milliseconds after the first.
TRIES, PAUSE = 3, 0.02
#: Seconds between two requests that have a version stay at a host: without one it stays for a second (LINGER_SECONDS).
HOLD_SECONDS = 0.3
_ETAG = re.compile(r'"([0-9]{1,19}\.[0-9]{1,19})-([0-9a-f]+)"\Z', re.ASCII)
#: Digits of a host's ETag behind the version.
_DIGITS = 16
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})\Z", re.ASCII)
#: What of a query each host answers for its shard.
_QUERY = frozenset({"average", "soup", "dtype", "prefix", "min_step", "wait"})
_OF_A_SNAPSHOT = frozenset({"average", "dtype", "prefix"})


#: Seconds for a replica to be there: the host itself is asked then.
_REPLICA_CONNECT = 1.0


class Moved(Exception):
    """A host has another version by now than the one that was asked for."""


@dataclass(frozen=True, slots=True)
class ShardBody:
    """One host's part of a version. lead: the body's first bytes; head_bytes: of the header with its length."""

    host: HostAddress
    etag: str
    length: int
    lead: bytes
    head_bytes: int = 0
    header: Header = field(default_factory=lambda: Header(()))

    @property
    def version(self) -> str:
        return self.header.metadata.get("ema_version", "")


async def send_weights(run: str, request: Request, hosts: Hosts, snapshot: str | None = None) -> Response:
    """The answer to GET or HEAD of the current weights, or of a snapshot's. Raises the hosts' errors; Overloaded where
    they were never at one version; InvalidRequest for a query that no host knows."""
    if others := sorted(set(request.query_params) - (_OF_A_SNAPSHOT if snapshot else _QUERY)):
        raise InvalidRequest(
            f"{others[0]}: is no part of a request for weights of a run on several hosts",
            hint=f"there are {', '.join(sorted(_OF_A_SNAPSHOT if snapshot else _QUERY))}",
        )
    try:
        whole = await _open(run, request, hosts, snapshot)
    except RunNotFound:
        whole = await _open(run, request, hosts, snapshot)  # of the run that was made anew meanwhile, if there is one
    return answer(request, whole)


def answer(request: Request, whole: Whole) -> Response:
    """The answer to GET or HEAD of weights."""
    if is_known(request, whole.etag):
        return Response(status_code=304, headers=whole.headers)
    try:
        part = _part(request, whole)
    except RangeNotSatisfiable as fault:
        return problem(fault, {"Content-Range": f"bytes */{whole.body.length}"})
    start, stop = part or (0, whole.body.length)
    headers = {**whole.headers, "Content-Length": str(stop - start)}
    if part:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{whole.body.length}"
    if request.method == "HEAD":
        return Response(status_code=200, headers=headers, media_type=Streaming.media_type)
    return Streaming(whole.chunks(start, stop), status_code=206 if part else 200, headers=headers)


async def _open(run: str, request: Request, hosts: Hosts, snapshot: str | None) -> Whole:
    """One version of the run that there is now. Raises RunNotFound, also where the run was deleted meanwhile."""
    headers, query = passed_on(request.headers), dict(request.query_params)
    host, *_ = await hosts.all()
    told = await hosts.json(host, "GET", run_path(run), RunInfo, headers)
    if told.shard and snapshot is None:  # else each host has a run of its own, or a snapshot, which never changes
        # Two runs of one name may have versions of one name.
        query["created_at"] = repr(told.created_at)
    path = weights_path(run) if snapshot is None else snapshot_weights_path(run, snapshot)
    asked = Asked(hosts, path, query, headers)
    return Whole(asked, await asked.one_version(request.headers.get("if-range") if _ranged(request) else None))


# --- one version on all hosts ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """One reader's request for weights, as it goes to the hosts. headers: of the reader."""

    hosts: Hosts
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]

    async def one_version(self, etag: str | None) -> list[ShardBody]:
        """The hosts' shards of one version, by place, without hosts that have none of the tensors asked for.

        etag: of the version that is wished for, if it is still there. Raises Overloaded.
        """
        hosts = await self.hosts.all()
        if pins := _pins(etag, len(hosts)):
            with contextlib.suppress(Moved):
                found = await all_of([self._lead(host, pin) for host, pin in zip(hosts, pins, strict=True)])
                return self._present(found)
        there: dict[int, ShardBody | EmaError] = {}
        for number in range(TRIES):
            if number:
                await asyncio.sleep(PAUSE)
            missing = [host for host in hosts if host.place not in there]
            there.update(zip([host.place for host in missing], await self._leads(missing), strict=True))
            shards = self._present([there[host.place] for host in hosts])
            newest = max((each for each in shards), key=_age)
            if all(each.header.metadata == newest.header.metadata for each in shards):
                return shards
            there = {each.host.place: each for each in shards if each.header.metadata == newest.header.metadata}
            self.hosts.metrics.apart.inc()
        self.hosts.metrics.disagreed.inc()
        raise Overloaded(
            "the hosts were not at one version: updates come faster than they can be read",
            hint="nothing is wrong; ask again",
            retry_after=0.0,
        )

    async def _leads(self, hosts: Sequence[HostAddress]) -> list[ShardBody | EmaError]:
        """Each host's shard of its current version."""
        return await all_of([self._lead(host, None) for host in hosts])

    def _present(self, found: Sequence[ShardBody | EmaError]) -> list[ShardBody]:
        """The shards among what hosts have answered. Raises what all have answered where none has a shard."""
        shards = [each for each in found if isinstance(each, ShardBody)]
        if not shards and isinstance(found[0], EmaError):
            raise found[0]
        return shards

    async def _lead(self, host: HostAddress, etag: str | None) -> ShardBody | EmaError:
        """A host's shard. etag: of the version asked for. An InvalidRequest is returned where a prefix is asked for:
        the tensors that begin so may be those of other hosts. Raises Moved."""
        try:
            shard = await self._first(host, etag)
        except InvalidRequest as fault:
            if "prefix" in self.query:
                return fault
            raise
        head_bytes = LENGTH_BYTES + parse_length(shard.lead[:LENGTH_BYTES])
        lead = shard.lead
        if len(lead) < head_bytes:
            lead += await self._read(shard, len(lead), head_bytes)
        raw = memoryview(lead)[LENGTH_BYTES:head_bytes]
        header = await asyncio.to_thread(parse_header, raw) if len(raw) > _LONG_HEADER_BYTES else parse_header(raw)
        return replace(shard, lead=lead, head_bytes=head_bytes, header=header)

    async def _first(self, host: HostAddress, etag: str | None) -> ShardBody:
        """The first bytes of a host's body. Raises Moved."""
        async with self._open(host, 0, _LEAD_BYTES, etag, self.query) as answer:
            lead = b"".join([chunk async for chunk in self.hosts.chunks(host, answer)])
            length = int(answer.headers["content-range"].rpartition("/")[2])
            return ShardBody(host, answer.headers["etag"], length, lead)

    async def _read(self, shard: ShardBody, start: int, stop: int) -> bytes:
        """Some bytes of a shard's body. Raises Moved."""
        return b"".join([chunk async for chunk in self.chunks(shard, start, stop)])

    async def chunks(self, shard: ShardBody, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """Bytes of a shard's body as they come. Raises Moved."""
        # Without min_step: the version is there.
        query = {name: value for name, value in self.query.items() if name not in ("min_step", "wait")}
        async with self._open(shard.host, start, stop, shard.etag, query) as answer:
            async for chunk in self.hosts.chunks(shard.host, answer):
                yield chunk

    async def hold(self, shard: ShardBody) -> None:
        """Have a version stay at its host. Raises Moved."""
        async with contextlib.aclosing(self.chunks(shard, 0, 1)) as chunks:
            async for _ in chunks:
                pass

    @contextlib.asynccontextmanager
    async def _open(
        self, host: HostAddress, start: int, stop: int, etag: str | None, query: dict[str, str]
    ) -> AsyncIterator[httpx2.Response]:
        """A host's answer with bytes [start, stop) of its body. Raises Moved where etag names another version."""
        headers = {**self.headers, "Range": f"bytes={start}-{stop - 1}"}
        if etag:
            headers["If-Range"] = etag
        # Who waits for a step waits in silence.
        patience = _REPLICA_CONNECT if host.is_replica else SILENCE
        timeout = httpx2.Timeout(SILENCE + self.work_seconds + _seconds(query.get("wait")), connect=patience)
        async with self.hosts.open(host, "GET", self.path, headers, params=query, timeout=timeout) as answer:
            if answer.status_code != 206:
                raise Moved
            yield answer

    @property
    def work_seconds(self) -> float:
        """Seconds that a host may work before it answers."""
        return 0.0


class Whole:
    """A version of the whole run. body: which of its bytes are whose; headers: of any answer about it."""

    def __init__(self, asked: Asked, shards: Sequence[ShardBody]) -> None:
        self._asked = asked
        self._shards = shards
        metadata = shards[0].header.metadata
        entries = place(_specs(shards), sort=False)
        bounds = (0, *accumulate(each.length - each.head_bytes for each in shards))
        self.body = MergedBody(build_header(entries, metadata), bounds)
        version = shards[0].version
        self.etag = f'"{version}-{"".join(each.etag.strip(chr(34)).rpartition("-")[2] for each in shards)}"'
        info = WeightsInfo.from_metadata(dict(metadata))
        self.headers = {
            **info.to_headers(),
            "ETag": self.etag,
            "Accept-Ranges": "bytes",
            HEADER_SHARDS: str(len(shards)),
        }

    async def chunks(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """Bytes [start, stop) of the body. Raises Moved, and a host's error, in the middle."""
        spans = list(self.body.spans(start, stop))
        later = [self._shards[span.shard] for span in spans if span.shard is not None]
        holding = asyncio.create_task(self._hold(later))
        try:
            for span in spans:
                if span.shard is None:
                    yield self.body.header[span.start : span.stop]
                    continue
                shard = later[0]
                if not shard.host.replicas:  # else the version stays here as well, should a replica break off
                    del later[0]
                async for chunk in self._data(shard, span.start, span.stop):
                    yield chunk
                if shard.host.replicas:
                    del later[0]
        finally:
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)

    async def _data(self, shard: ShardBody, start: int, stop: int) -> AsyncIterator[bytes]:
        """Bytes [start, stop) of a shard's data, from whoever holds the version: a replica that is chosen in turn may
        lack it, or break off, and the host has the rest."""
        start, stop = start + shard.head_bytes, stop + shard.head_bytes
        if lead := shard.lead[start:stop]:
            yield lead
        at = start + len(lead)
        for holder in dict.fromkeys((self._asked.hosts.next_holder(shard.host), shard.host)):
            if at == stop:
                return
            try:
                async with contextlib.aclosing(self._asked.chunks(replace(shard, host=holder), at, stop)) as chunks:
                    async for chunk in chunks:
                        at += len(chunk)
                        yield chunk
            except (Moved, EmaError):
                if holder is shard.host:
                    raise

    async def _hold(self, later: list[ShardBody]) -> None:
        """Have the version stay at the hosts whose turn is not over. later: shortened as their turns end."""
        while True:
            await asyncio.sleep(HOLD_SECONDS)
            # A host that fails here is told of when its turn comes.
            await asyncio.gather(*(self._asked.hold(shard) for shard in tuple(later)), return_exceptions=True)


def _specs(shards: Sequence[ShardBody]) -> Iterator[TensorSpec]:
    """The tensors of the whole run: one that was cut has rows at the end of one shard and the beginning of the next."""
    entries = (entry for each in shards for entry in each.header.entries)
    for name, group in groupby(entries, key=lambda entry: entry.name):
        parts: list[Entry] = list(group)
        first = parts[0]
        shape = (sum(part.shape[0] for part in parts), *first.shape[1:]) if len(parts) > 1 else first.shape
        yield TensorSpec(name, shape, first.dtype)


def _pins(etag: str | None, count: int) -> list[str] | None:
    """The hosts' ETags of which a whole one is made; None where that is none of so many hosts."""
    found = _ETAG.match(etag or "")
    if not found or len(found[2]) != count * _DIGITS:
        return None
    return [f'"{found[1]}-{found[2][at : at + _DIGITS]}"' for at in range(0, count * _DIGITS, _DIGITS)]


def _age(shard: ShardBody) -> tuple[int, ...]:
    return tuple(int(part) for part in shard.version.split("."))


def _seconds(wait: str | None) -> float:
    try:
        return float(wait or 0.0)
    except ValueError:
        return 0.0  # the hosts say what is wrong with it


# --- conditions and ranges -------------------------------------------------------------------------------------------


def _ranged(request: Request) -> bool:
    return request.method == "GET" and "range" in request.headers


def is_known(request: Request, tag: str) -> bool:
    """Whether If-None-Match names the version."""
    tags = [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]
    return tag in tags or tags == ["*"]


def _part(request: Request, whole: Whole) -> tuple[int, int] | None:
    """The bytes [start, stop) of the body that Range asks for; None for the whole body, as a server has it (several
    ranges, another unit, another version than If-Range's). Raises RangeNotSatisfiable."""
    asked = _RANGE.match(request.headers.get("range", "")) if request.method == "GET" else None
    if asked is None or asked.group() == "bytes=-" or request.headers.get("if-range", whole.etag) != whole.etag:
        return None
    first, last = asked.groups()
    length = whole.body.length
    if not first:
        start, stop = max(length - int(last), 0), length
    else:
        start, stop = int(first), min(int(last) + 1, length) if last else length
        if last and int(last) < start:
            return None
    if start >= stop:
        raise RangeNotSatisfiable(f"Range: {asked.group()} lies beyond the {length} bytes of this version")
    return start, stop


class _Stalled(Exception):
    """The reader takes nothing any more."""


class Streaming(StreamingResponse):
    """Sends the chunks. Where a host fails in the middle the connection ends before the body does, and the reader asks
    for the rest. A reader that takes nothing is left, for its version stays at the hosts until then."""

    media_type = "application/octet-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], *, status_code: int, headers: dict[str, str]) -> None:
        super().__init__(chunks, status_code=status_code, headers=headers)
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._chunks):
            try:
                await super().__call__(scope, receive, partial(_within_silence, send))
            except (Moved, _Stalled, EmaError) as fault:
                said = {Moved: "the version is gone", _Stalled: "the reader takes nothing"}
                _log.warning("%s was broken off: %s", scope["path"], said.get(type(fault), fault))


async def _within_silence(send: Send, message: Message) -> None:
    """Send a part of an answer. Raises _Stalled where the reader has not taken the parts before for too long."""
    try:
        async with asyncio.timeout(SILENCE):
            await send(message)
    except TimeoutError:
        raise _Stalled from None
