"""Those who wait at a gateway for something to happen to a run: one stream from each host for all of them.

    evaluator 0     --- GET .../events ---\\
    evaluator 1     --- GET .../events ----> Watch ==> one stream of host 0
    ...                                        |  \\==> one stream of host 1
    evaluator 999   --- GET ...?min_step= -/   v
                                            Merging: what every host has

A stream is opened in the name of whoever came first, and shared by those whom a host cannot tell apart (the same token,
asked by the same name); each of them is judged by a host before. A host that is away is looked for while somebody
waits, and those who wait are told nothing meanwhile.

There is no queue for each watcher, as on a server: who reads slowly is told of the newest version, and of the latest
changes that are no versions.

Knows streams, hosts, and who waits. Does not know what makes an event of the whole run (merging), or routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx2
from fastapi.sse import format_sse_event

from ema_client.errors import EmaError, Overloaded, ProtocolError, RunNotFound, Stopping
from ema_client.protocol import RunEvent, RunInfo, events_path, from_json, run_path, to_json
from ema_service.cluster.gateway.hosts import HostAddress, Hosts, all_of
from ema_service.cluster.gateway.merging import Merging

__all__ = ["HEARTBEAT_SECONDS", "Watch", "Watches"]

#: As a server's: Seconds of silence after which a comment is sent, and milliseconds that a browser waits before it
#: connects again.
HEARTBEAT_SECONDS = 15.0
_OPENING = format_sse_event(comment="events", retry=1000)
_HEARTBEAT = format_sse_event(comment="")
#: A host says something every 15 seconds; one that does not for so long is away.
_SILENCE = 40.0
#: Seconds before a host is tried again, doubled up to the second.
_PAUSES = 0.25, 2.0
#: Seconds for which streams stay open that nobody follows: whoever asks for one step after another is back by then.
_LINGER_SECONDS = 10.0
#: Events beside versions that a slow watcher finds when it comes back.
_MOST_KEPT = 64
#: Most bytes of one event.
_EVENT_BYTES = 1 << 20
#: Seconds after which somebody may come again who found no place.
_FULL_SECONDS = 10.0


class _Kept(NamedTuple):
    """An event that is no version. number: among all of the watch, from 1."""

    number: int
    kind: str
    event: bytes


class _Telling:
    """What watchers have been told of the whole run, so that each of them finds what is new.

    now: the latest version as an event, empty before there is one. versions, others: how many versions were told, and
    how many other events.
    """

    def __init__(self) -> None:
        self.now = b""
        self.versions = self.others = 0
        self.moved = asyncio.Event()
        self._kept: deque[_Kept] = deque(maxlen=_MOST_KEPT)

    def tell(self, event: RunEvent) -> None:
        """Have all watchers find this event."""
        if event.kind == "version":
            self.versions, self.now = self.versions + 1, _encode(event)
        else:
            self.others += 1
            self._kept.append(_Kept(self.others, event.kind, _encode(event)))
        self.wake()

    def wake(self) -> None:
        """Have all who wait look again."""
        self.moved.set()
        self.moved = asyncio.Event()

    def since(self, others: int) -> list[_Kept]:
        """The events after so many that were no versions, as far as they are kept."""
        return [each for each in self._kept if each.number > others]


class Watch:
    """One run as its hosts' streams tell, for any number of watchers. On one event loop; ended by end().

    step: the trainer's, that every host has; None before any. ended: whether nothing more will be told.
    """

    def __init__(self, hosts: Hosts, info: RunInfo, headers: Mapping[str, str]) -> None:
        """info: what one host says of the run. headers: in whose name the hosts are asked."""
        self.ended = False
        self.watchers = 0
        self._hosts, self._info, self._headers = hosts, info, dict(headers)
        self._merging = Merging(1)
        self._telling = _Telling()
        self._listening: list[asyncio.Task[None]] = []
        self._opening = asyncio.create_task(self._open())

    @property
    def step(self) -> int | None:
        version = self._merging.version
        return version.step if version else None

    async def opened(self) -> None:
        """Return once every host's stream has begun. Raises the error of a host that has begun none."""
        await asyncio.shield(self._opening)

    async def stream(self, told: Callable[[str], None] = lambda _: None) -> AsyncGenerator[bytes, None]:
        """An event stream for one watcher, beginning with the version as it is now. told: called with each event's
        kind."""
        yield _OPENING
        telling = self._telling
        versions, others = -1, telling.others
        while True:
            moved = telling.moved
            if versions != telling.versions and self._merging.version:
                now = _encode(self._merging.version) if versions < 0 else telling.now
                versions = telling.versions
                told("version")
                yield now
            for kept in telling.since(others):
                others = kept.number
                told(kept.kind)
                yield kept.event
            if self.ended:
                return
            try:
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await moved.wait()
            except TimeoutError:
                yield _HEARTBEAT

    async def reached(self, step: int, seconds: float) -> bool:
        """Whether every host has a step, or comes to it within so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not (self._has(step) or self.ended):
                    await self._telling.moved.wait()
        return self._has(step)

    def end(self) -> None:
        """Tell those who wait that nothing more comes, and close the hosts' streams."""
        self.ended = True
        self._opening.cancel()
        for task in self._listening:
            task.cancel()
        self._telling.wake()

    # ----------------------------------------------------------------------------------------------------------------

    def _has(self, step: int) -> bool:
        return self.step is not None and self.step >= step

    async def _open(self) -> None:
        """Begin to listen to all hosts. Raises the error of a host that does not let us listen."""
        loop = asyncio.get_running_loop()
        count = len(await self._hosts.all())
        self._merging = Merging(count)
        begun: list[asyncio.Future[None]] = [loop.create_future() for _ in range(count)]
        self._listening = [asyncio.create_task(self._listen(place, each)) for place, each in enumerate(begun)]
        await all_of(begun)

    async def _listen(self, place: int, begun: asyncio.Future[None]) -> None:
        """Hear what one host tells, until the run is gone. begun: done with the first stream, or with its error."""
        pause, longest = _PAUSES
        while not self.ended:
            try:
                await self._follow(place, begun)
                pause, _ = _PAUSES
            except RunNotFound as fault:
                _settle(begun, fault)
                self._hear(place, _deleted(self._info))
                return
            except EmaError as fault:
                if _settle(begun, fault):
                    return
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _follow(self, place: int, begun: asyncio.Future[None]) -> None:
        """Hear one stream of a host until it ends. Raises RunNotFound where the host has the run no more."""
        host = (await self._hosts.all())[place]
        timeout = httpx2.Timeout(_SILENCE)
        path = events_path(self._info.run)
        async with self._hosts.open(host, "GET", path, self._headers, timeout=timeout) as answer:
            # The stream is older than this answer: where both runs are one, the stream is of that.
            found = await self._hosts.json(host, "GET", run_path(self._info.run), RunInfo, self._headers)
            if self._info.shard and found.created_at != self._info.created_at:
                raise RunNotFound(f"run {self._info.run!r} was made anew")
            self._merging.begin(place)
            _settle(begun)
            async for event in _events(host, self._hosts.chunks(host, answer)):
                self._hear(place, event)

    def _hear(self, place: int, event: RunEvent) -> None:
        whole = self._merging.hear(place, event)
        if whole:
            self.ended |= whole.kind == "run_deleted"
            self._telling.tell(whole)


@dataclass
class Watches:
    """All watches of one gateway. most: how many may wait at once. On one event loop."""

    hosts: Hosts
    most: int
    waiting: int = 0
    _stopping: bool = False
    _watches: dict[tuple[object, ...], Watch] = field(default_factory=dict)
    #: What a host is being asked of a run, in whose name.
    _judging: dict[tuple[object, ...], asyncio.Task[RunInfo]] = field(default_factory=dict)

    @contextlib.asynccontextmanager
    async def watching(self, run: str, headers: Mapping[str, str]) -> AsyncIterator[Watch]:
        """The watch of a run for one who waits, within the block. headers: of the request, as they go on to hosts.

        Raises the hosts' errors; Overloaded where too many wait already; Stopping.
        """
        with self._staying():
            who = run, *sorted(headers.items())
            info = await self._judged(who, run, headers)
            key = info.created_at, *who
            found = self._watches.get(key)
            if found is None or found.ended:
                found = self._watches[key] = Watch(self.hosts, info, headers)
            found.watchers += 1
            try:
                await self._opened(key, found)
                yield found
            finally:
                found.watchers -= 1
                asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._let_go, key, found)

    def end(self) -> None:
        """End all watches, for good."""
        self._stopping = True
        for watch in self._watches.values():
            watch.end()

    # ----------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _staying(self) -> Iterator[None]:
        """A place among those who wait. Raises Overloaded, Stopping."""
        if self._stopping:
            raise Stopping("the gateway ends", retry_after=1.0)
        if self.waiting >= self.most:
            raise Overloaded(f"{self.most} wait at this gateway already", retry_after=_FULL_SECONDS)
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def _opened(self, key: tuple[object, ...], watch: Watch) -> None:
        """As Watch.opened(). A watch that did not begin is another's no more."""
        try:
            await watch.opened()
        except EmaError:
            self._forget(key, watch)
            raise

    async def _judged(self, who: tuple[object, ...], run: str, headers: Mapping[str, str]) -> RunInfo:
        """What a host says of the run to this sender: asked once for all who come meanwhile."""
        if who not in self._judging:
            task = self._judging[who] = asyncio.create_task(self._judge(run, headers))
            task.add_done_callback(lambda _: self._judging.pop(who))
        return await asyncio.shield(self._judging[who])

    async def _judge(self, run: str, headers: Mapping[str, str]) -> RunInfo:
        host, *_ = await self.hosts.all()
        return await self.hosts.json(host, "GET", run_path(run), RunInfo, headers)

    def _let_go(self, key: tuple[object, ...], watch: Watch) -> None:
        if not watch.watchers:
            self._forget(key, watch)

    def _forget(self, key: tuple[object, ...], watch: Watch) -> None:
        watch.end()
        if self._watches.get(key) is watch:
            del self._watches[key]


async def _events(host: HostAddress, chunks: AsyncIterator[bytes]) -> AsyncIterator[RunEvent]:
    """The events of a host's stream. Raises Overloaded for what no ema-service sends, and what ``chunks`` raises."""
    unread = b""
    async for chunk in chunks:
        *blocks, unread = (unread + chunk).split(b"\n\n")
        if len(unread) > _EVENT_BYTES:
            raise Overloaded(f"{host} sends an event of more than {_EVENT_BYTES} bytes")
        for block in blocks:
            data = b"".join(line[len(b"data:") :] for line in block.split(b"\n") if line.startswith(b"data:"))
            if data:
                try:
                    yield from_json(RunEvent, json.loads(data))
                except ValueError as fault:
                    raise ProtocolError(f"{host} sends an event that is none: {fault}") from None


def _settle(begun: asyncio.Future[None], fault: EmaError | None = None) -> bool:
    """Whether this was the first that was heard of a stream: it began, or why it did not."""
    if begun.done():
        return False
    if fault is None:
        begun.set_result(None)
    else:
        begun.set_exception(fault)
    return True


def _deleted(info: RunInfo) -> RunEvent:
    """That the run is gone, of which a host has said no more."""
    first = info.averages[0].name
    return RunEvent(
        "run_deleted", info.run, info.version, info.step, info.num_updates, first, info.decay, info.effective_decay
    )


def _encode(event: RunEvent) -> bytes:
    return format_sse_event(event=event.kind, data_str=json.dumps(to_json(event)), id=event.version)
