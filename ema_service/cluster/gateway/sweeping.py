"""Several averages of the whole run in one body, their data in turns: of the hosts' bodies, one after the other.

    host 0    a0 b0 a0 b0 a0 b0   host 1    a1 b1 a1 b1      a mebibyte each, the last of each host shorter
    the body  a0 b0 a0 b0 a0+a1 b0+b1 a1 b1                  a mebibyte each, over the bounds of hosts

Of each average less than two pieces are in memory. Knows the body of a sweep. Does not know how hosts come to have one
version, and one recipe (worked_out).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

import httpx2
from fastapi import Request

from ema_client.errors import InvalidRequest, Overloaded, Superseded
from ema_client.protocol import (
    HEADER_RECIPE,
    HEADER_SHARDS,
    HEADER_TARGETS,
    SWEEP_PIECE_BYTES,
    TensorSpec,
    sweep_path,
)
from ema_client.wire import LENGTH_BYTES, Header, build_header, parse_header, parse_length, place
from ema_service.cluster.gateway.hosts import SILENCE, HostAddress, Hosts, all_of, passed_on
from ema_service.cluster.gateway.pulls import Streaming
from ema_service.cluster.gateway.worked_out import WORK_SECONDS, Pinned, agreed
from ema_service.cluster.layout_map import LayoutMap

__all__ = ["send_sweep"]

_QUERY = frozenset({"sigma_rel", "decay", "half_life", "window", "at", "max_error", "dtype"})


async def send_sweep(run: str, request: Request, hosts: Hosts, shards: LayoutMap) -> Streaming:
    """The answer to a sweep. shards: the hosts' shares of the run. Raises as send_worked_out()."""
    if others := sorted(set(request.query_params) - _QUERY):
        raise InvalidRequest(f"{others[0]}: does not go with a sweep")
    asked = _Asked(hosts, run, dict(request.query_params), passed_on(request.headers), shards)
    body = await agreed(hosts, asked.opened)
    headers = {
        HEADER_TARGETS: str(len(body.heads)),
        HEADER_SHARDS: str(len(shards.shards)),
        "Content-Length": str(body.length),
    }
    return Streaming(body.chunks(), status_code=200, headers=headers)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One reader's request for a sweep. query, headers: of the reader. shards: the hosts' shares of the run."""

    hosts: Hosts
    run: str
    query: dict[str, str]
    headers: Mapping[str, str]
    shards: LayoutMap

    async def opened(self) -> _Body:
        """The sweep, which all hosts would send. Raises Moved, Superseded, and the hosts' errors."""
        first, *others = places = await self.hosts.all()
        pinned = Pinned(self.hosts, self.run, self.headers)
        version = await pinned.one_version(places)
        async with pinned.staying(places, version):
            query = {**self.query, "version": version}
            async with self.answer(first, query) as stream:
                query["recipe"] = stream.recipe
                heads = [await stream.head() for _ in range(stream.targets)]
            await all_of([self._tried(host, query) for host in others])
        return _Body(self, pinned, places, query, heads)

    async def _tried(self, host: HostAddress, query: Mapping[str, str]) -> None:
        async with self.answer(host, query):
            pass

    @contextlib.asynccontextmanager
    async def answer(self, host: HostAddress, query: Mapping[str, str]) -> AsyncIterator[_Stream]:
        """A host's answer."""
        timeout = httpx2.Timeout(SILENCE + WORK_SECONDS, connect=SILENCE)
        path = sweep_path(self.run)
        async with self.hosts.open(host, "GET", path, self.headers, params=dict(query), timeout=timeout) as answer:
            chunks = self.hosts.chunks(host, answer)
            yield _Stream(answer.headers[HEADER_RECIPE], int(answer.headers[HEADER_TARGETS]), chunks)

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """The head of one average of the whole run."""
        dtype = self.query.get("dtype")
        specs = (TensorSpec(each.name, each.shape, dtype or each.dtype) for each in self.shards.layout.shadows)
        return build_header(place(specs, sort=False), metadata)


class _Stream:
    """A host's body, as many bytes at a time as are asked for. recipe, targets: of the answer."""

    def __init__(self, recipe: str, targets: int, chunks: AsyncIterator[bytes]) -> None:
        self.recipe, self.targets = recipe, targets
        self._chunks = chunks
        self._rest = bytearray()

    async def take(self, count: int) -> bytes:
        """The next bytes. Raises Overloaded where the host has sent fewer."""
        while len(self._rest) < count:
            chunk = await anext(self._chunks, b"")
            if not chunk:
                raise Overloaded("a host has ended a sweep too early", retry_after=0.0)
            self._rest += chunk
        taken = bytes(self._rest[:count])
        del self._rest[:count]
        return taken

    async def head(self) -> Header:
        """The next average's header."""
        return parse_header(memoryview(await self.take(parse_length(await self.take(LENGTH_BYTES)))))


class _Body:
    """The body of a sweep. heads: of each average's head, as the first host has it."""

    def __init__(
        self,
        asked: _Asked,
        pinned: Pinned,
        places: Sequence[HostAddress],
        query: Mapping[str, str],
        heads: Sequence[Header],
    ) -> None:
        self._asked, self._pinned, self._places, self._query = asked, pinned, places, query
        self.heads = heads
        self._headers = [asked.header(each.metadata) for each in heads]
        data = parse_header(memoryview(self._headers[0])[LENGTH_BYTES:]).data_bytes
        self.length = sum(map(len, self._headers)) + len(heads) * data

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body. Raises, in the middle, what a host answers, and Superseded where that is another average."""
        async with self._pinned.staying(tuple(self._places), self._query["version"]):
            for header in self._headers:
                yield header
            held = [bytearray() for _ in self.heads]
            for host in self._places:
                async with self._asked.answer(host, self._query) as stream:
                    left = await self._begun(stream)
                    while left:
                        size = min(SWEEP_PIECE_BYTES, left)
                        for each in held:
                            each += await stream.take(size)
                            if len(each) >= SWEEP_PIECE_BYTES:
                                yield bytes(each[:SWEEP_PIECE_BYTES])
                                del each[:SWEEP_PIECE_BYTES]
                        left -= size
            for each in held:
                yield bytes(each)

    async def _begun(self, stream: _Stream) -> int:
        """Bytes of each average's data at a host whose heads come next. Raises Superseded."""
        heads = [await stream.head() for _ in self.heads]
        if [each.metadata for each in heads] != [each.metadata for each in self.heads]:
            raise Superseded("a host has sent other averages", retry_after=0.0)
        return heads[0].data_bytes
