"""A push of the whole run, or a part of one, cut into the hosts' slices while it comes in.

    sender --- header, data of host 0, data of host 1, ... ---> Splitting --- header, its data ---> host 0
                                                                          \\-- header, its data ---> host 1

All slices go under one key, so that no two pushes are ever mixed; the answer comes once every host has decided. No more
of a body is here than two chunks a host: where a host is slow the sender waits. Where the sender's digest follows no
host has its slice to the end before the whole body was found to be what was sent: a host that votes, or counts a part,
never does so for bytes that were damaged on their way here. Of a part each host has what is of its rows, also where
that is nothing: parts are counted at each host.

Knows safetensors' headers, and which bytes are whose. Does not know whether an update counts, or what an answer says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from ema_client.errors import DigestMismatch, EmaError, InvalidRequest, MalformedBody, RequestTimeout
from ema_client.protocol import DIGEST_BYTES, DIGEST_FOLLOWS, TensorSpec
from ema_client.wire import (
    LENGTH_BYTES,
    Entry,
    Header,
    box_shape,
    build_header,
    cut_part,
    parse_header,
    parse_length,
    place,
)
from ema_service.averaging.digest import Digest, SizedDigest
from ema_service.cluster.gateway.hosts import SILENCE
from ema_service.cluster.layout_map import LayoutMap

__all__ = ["PartSplitting", "Slice", "Splitting"]

#: Chunks of a slice that a host has not taken yet.
_UNSENT = 2
#: A host that waits for the end of its slice, while the others' bytes come, is sent one byte after so many seconds: it
#: takes a minute of silence for the sender's end.
_SIGN_OF_LIFE = 5.0
#: Parsing a header longer than this takes more than 30 ms, so it is parsed off the event loop.
_LONG_HEADER_BYTES = 256 << 10


AnyDigest = Digest | SizedDigest


@dataclass(frozen=True, slots=True)
class _Cut:
    """How one body is cut. headers: of the slices, by place. spans: (place, bytes), in the order of the body's data.

    digests: of the slices, by place; whole: of the body. Neither has seen a byte.
    """

    headers: Sequence[bytes]
    spans: Sequence[tuple[int, int]]
    digests: Sequence[AnyDigest]
    whole: AnyDigest

    @property
    def nbytes(self) -> int:
        """Bytes of the body's data."""
        return sum(count for _, count in self.spans)


class Slice:
    """One host's slice on its way. length: of the body that the host is sent; body: what is sent, as it comes.

    digested: whether the slice's own digest follows.
    """

    def __init__(self, place: int, header: bytes, data_bytes: int, digest: AnyDigest | None, copies: int = 1) -> None:
        """digest: of the slice's data, which follows; None where none does. copies: to how many hosts the slice is
        sent."""
        self.place = place
        self.digested = digest is not None
        self.length = len(header) + data_bytes + (DIGEST_BYTES if digest else 0)
        self._header = header
        self.missing = self._data_bytes = data_bytes
        self._digest = digest
        self._chunks: list[asyncio.Queue[bytes | None]] = [asyncio.Queue(_UNSENT) for _ in range(copies)]

    async def put(self, chunk: bytes | None) -> None:
        """Have a chunk of the slice's data sent, once there is room; None behind the last."""
        if chunk is not None:
            self.missing -= len(chunk)
            if self._digest:
                self._digest.update(memoryview(chunk))
        for copy in self._chunks:
            await copy.put(chunk)

    async def body(self, copy: int = 0) -> AsyncIterator[bytes]:
        """The slice as a host is sent it: with a digest the last chunk goes once put() was told that it is the last.
        copy: for which of several hosts."""
        yield self._header
        unsent, chunks = self._data_bytes, self._chunks[copy]
        while (chunk := await chunks.get()) is not None:
            unsent -= len(chunk)
            if self._digest and not unsent:
                async for sign in _waiting(chunk, chunks):
                    yield sign
                break
            yield chunk
        if self._digest:
            yield self._digest.digest()


async def _waiting(last: bytes, end: asyncio.Queue[bytes | None]) -> AsyncIterator[bytes]:
    """The last chunk of a slice: a byte now and then until the end was put, then the rest."""
    sent = 0
    while True:
        try:
            async with asyncio.timeout(_SIGN_OF_LIFE):
                await end.get()
            break
        except TimeoutError:
            if sent + 1 < len(last):
                sent += 1
                yield last[sent - 1 : sent]
    yield last[sent:]


@dataclass(slots=True)
class Splitting:
    """Takes a whole body apart. send: sends one slice, and returns when its host has answered.

    length: of the whole body, None where that is not known. digest: the sender's, None where none follows. silence:
    seconds that the sender may say nothing. copies: by place, to how many hosts a slice is sent; empty for one each.
    """

    shards: LayoutMap
    send: Callable[[Slice], Coroutine[None, None, object]]
    length: int | None
    digest: str | None
    silence: float = SILENCE
    copies: Sequence[int] = ()
    _sending: dict[int, asyncio.Task[object]] = field(default_factory=dict)
    _unread: bytearray = field(default_factory=bytearray)

    async def run(self, body: AsyncIterator[bytes]) -> list[object]:
        """What the hosts answered, by place, once all have. Raises MalformedBody, LayoutMismatch, DigestMismatch,
        InvalidRequest, RequestTimeout, and the first error of a host; then no host is sent any more."""
        if self.digest not in (None, DIGEST_FOLLOWS):
            raise InvalidRequest(f"Ema-Digest: {self.digest[:40]!r} is not {DIGEST_FOLLOWS!r}")
        try:
            async with asyncio.TaskGroup() as group:
                await self._feed(body, await self._read_header(body), group)
        except BaseExceptionGroup as faults:
            self._raise(faults)
        return [self._sending[place].result() for place in sorted(self._sending)]

    def _raise(self, faults: BaseExceptionGroup[BaseException]) -> NoReturn:
        """Raises one of the faults that came at once: one that no retry would mend before others."""
        fault = min(_single(faults), key=lambda each: isinstance(each, EmaError) and each.retryable)
        try:
            raise fault
        finally:
            del fault, faults  # an error that knows its own frame is a cycle

    # --- the header -------------------------------------------------------------------------------------------------

    async def _read_header(self, body: AsyncIterator[bytes]) -> _Cut:
        """How the body is cut, by its header."""
        count = parse_length(await self._take(body, LENGTH_BYTES), limit=self._longest_header)
        if self.length is not None and LENGTH_BYTES + count > self.length:
            raise MalformedBody(f"the header claims {count} bytes, the whole body has {self.length}")
        raw = await self._take(body, count)
        found = await asyncio.to_thread(self._cut_of, raw) if count > _LONG_HEADER_BYTES else self._cut_of(raw)
        whole = LENGTH_BYTES + count + found.nbytes + (DIGEST_BYTES if self.digest else 0)
        if self.length is not None and self.length != whole:
            fault = "longer" if self.length > whole else "shorter"
            raise MalformedBody(f"the body has {self.length} bytes, {fault} than its header says ({whole})")
        return found

    @property
    def _longest_header(self) -> int:
        """Most bytes of the header."""
        return self.shards.layout.max_header_bytes

    def _cut_of(self, raw: bytes) -> _Cut:
        """The cut of a body, whose tensors may come in another order, or with metadata."""
        if raw == self.shards.layout.header[LENGTH_BYTES:]:
            return _canonical(self.shards)
        entries = parse_header(raw).entries
        self.shards.layout.targets(entries)  # whether they are the run's
        return _cut(self.shards, entries)

    async def _take(self, body: AsyncIterator[bytes], count: int) -> bytes:
        """The next bytes of the body. Raises MalformedBody where it ends."""
        while len(self._unread) < count:
            self._unread += await self._next(body)
        taken = bytes(self._unread[:count])
        del self._unread[:count]
        return taken

    # --- the data ---------------------------------------------------------------------------------------------------

    async def _feed(self, body: AsyncIterator[bytes], cut: _Cut, group: asyncio.TaskGroup) -> None:
        """Hand each byte of the data to its slice. A slice is begun with its first byte: no host waits in silence for
        the bytes of others."""
        sizes = [0] * len(cut.headers)
        for place_, count in cut.spans:
            sizes[place_] += count
        digests = cut.digests if self.digest else [None] * len(sizes)
        copies = self.copies or [1] * len(sizes)
        slices = [Slice(at, cut.headers[at], sizes[at], digests[at], copies[at]) for at in range(len(sizes))]
        ended = set[int]()
        for at, (place_, count) in enumerate(cut.spans):
            each = slices[place_]
            self._begin(each, group)
            await self._feed_one(body, each, count, cut.whole)
            if not (each.missing or self.digest) and at + 1 < len(cut.spans):
                await each.put(None)
                ended.add(place_)
        await self._check_end(body, cut.whole)
        # The last one to have bytes, those that have none, and with a digest all.
        for each in slices:
            if each.place not in ended:
                self._begin(each, group)
                await each.put(None)

    def _begin(self, each: Slice, group: asyncio.TaskGroup) -> None:
        if each.place not in self._sending:
            self._sending[each.place] = group.create_task(self.send(each))

    async def _feed_one(self, body: AsyncIterator[bytes], each: Slice, count: int, whole: AnyDigest) -> None:
        """The next bytes of the data, which are one slice's."""
        while count:
            chunk = bytes(self._unread) if self._unread else await self._next(body)
            self._unread.clear()
            self._unread += chunk[count:]
            chunk = chunk[:count]
            count -= len(chunk)
            if self.digest:
                whole.update(memoryview(chunk))
            await each.put(chunk)

    async def _check_end(self, body: AsyncIterator[bytes], whole: AnyDigest) -> None:
        """Raises MalformedBody where more follows than the digest; DigestMismatch."""
        if self.digest:
            said, found = await self._take(body, DIGEST_BYTES), whole.digest()
            if said != found:
                raise DigestMismatch(f"the data's digest is {found.hex()}, the sender's {said.hex()}")
        async for chunk in body:
            self._unread += chunk
            if self._unread:
                break
        if self._unread:
            raise MalformedBody("the body is longer than its header says")

    async def _next(self, body: AsyncIterator[bytes]) -> bytes:
        """The next chunk of a body that is not over. Raises MalformedBody where it is; RequestTimeout."""
        try:
            async with asyncio.timeout(self.silence):
                async for chunk in body:
                    if chunk:
                        return chunk
        except TimeoutError:
            raise RequestTimeout(f"no byte of the body came for {self.silence:g} seconds") from None
        raise MalformedBody("the body ends before its header says")


def _single(faults: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The faults of a group, and of groups in it: of a slice that goes to two hosts."""
    found: list[BaseException] = []
    for each in faults.exceptions:
        found += _single(each) if isinstance(each, BaseExceptionGroup) else [each]
    return found


class PartSplitting(Splitting):
    """As Splitting, of a part: slices of tensors, in an order of its own."""

    @property
    def _longest_header(self) -> int:
        # As runs.Parts: each tensor is named once more, in the metadata.
        return 2 * self.shards.layout.max_header_bytes

    def _cut_of(self, raw: bytes) -> _Cut:
        return _cut_of_part(self.shards, parse_header(raw))


def _cut_of_part(shards: LayoutMap, header: Header) -> _Cut:
    cuts = cut_part(header, [{name: box[0] if box else None for name, box in s.boxes.items()} for s in shards.shards])
    begun = sorted((start, stop, at) for at, each in enumerate(cuts) for start, stop in each.spans)
    spans = [(at, stop - start) for start, stop, at in begun]
    whole = SizedDigest(entry.end - entry.begin for entry in header.entries if entry.end > entry.begin)
    return _Cut([each.header for each in cuts], spans, [SizedDigest(each.sizes) for each in cuts], whole)


def _canonical(shards: LayoutMap) -> _Cut:
    """The cut of a body in the layout's own order: one stretch a host."""
    found = shards.shards
    spans = [(each.place, each.params.stop - each.params.start) for each in found]
    return _Cut([each.layout.header for each in found], spans, [Digest() for _ in found], Digest())


def _cut(shards: LayoutMap, entries: Sequence[Entry]) -> _Cut:
    """The cut of a body whose tensors come in this order."""
    specs: list[list[TensorSpec]] = [[] for _ in shards.shards]
    spans: list[tuple[int, int]] = []
    for entry in entries:
        for at, spec in _rows(shards, entry):
            specs[at].append(spec)
            (placed,) = place([spec])
            if placed.end and spans and spans[-1][0] == at:
                spans[-1] = at, spans[-1][1] + placed.end
            elif placed.end:
                spans.append((at, placed.end))
    headers = [build_header(place(each, sort=False)) for each in specs]
    return _Cut(headers, spans, [Digest() for _ in specs], Digest())


def _rows(shards: LayoutMap, entry: Entry) -> Iterator[tuple[int, TensorSpec]]:
    """Each host's rows of a tensor, in their order."""
    for shard in shards.shards:
        if (box := shard.boxes.get(entry.name)) is not None:
            yield shard.place, TensorSpec(entry.name, box_shape(box), entry.dtype)
