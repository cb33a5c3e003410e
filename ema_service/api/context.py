"""The state of one running server, which routes reach through the request.

Knows the parts of a server. Does not know HTTP beyond the request that asks for them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakValueDictionary

from fastapi import Request

from ema_client.errors import Overloaded
from ema_service.api.facts import Facts
from ema_service.api.lanes import Lanes
from ema_service.api.reading import Readings
from ema_service.api.transfer.admission import Admission
from ema_service.api.transfer.segments import Mappings
from ema_service.api.workers import Workers
from ema_service.memory import Arena, Staged
from ema_service.metrics import Metrics
from ema_service.persistence import Versions
from ema_service.runs import Registry, Run
from ema_service.settings import Settings

if TYPE_CHECKING:
    from ema_service.cluster.hosting.host import Host
    from ema_service.replica.following import Following

__all__ = ["Context"]

T = TypeVar("T")

#: Retry-After for whoever finds no place among those that stay. Watchers stay long; a refused one asks for versions
#: meanwhile, and for a place as often as such a poll lasts.
_WATCH_SECONDS = 10.0
_WAIT_SECONDS = 1.0


class Context:
    """One running server. Made on the event loop.

    More than a dozen attributes: the parts of a server, and who waits for one of them.

    host: what the server is in a cluster; None where it decides alone. replica: what follows the original, where the
    server is a replica. facts: what the server says of itself. workers:
    the server's threads. mappings: of clients' shared memory that pushes lie in. readings: the versions that are being
    sent. lanes: which stretches of updates are being received. pushers, readers: the queues before the budgets of
    staging and of frozen versions. watchers: how many streams of events are open. waits: how many reads wait for a
    step. stopping: set once the server is told to stop; whoever waits for a run stops waiting then.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        metrics: Metrics,
        host: Host | None = None,
        replica: Following | None = None,
    ) -> None:
        self.settings = settings
        self.registry = registry
        self.metrics = metrics
        self.host = host
        self.replica = replica
        self.facts = Facts(registry, metrics, host, replica)
        self.workers = Workers()
        self.mappings = Mappings()
        self.readings = Readings()
        self.pushers, self.readers = Admission(), Admission()
        self.lanes = Lanes(settings.max_lanes, settings.max_connections // 4)
        self.stopping = False
        self.watchers = self.waits = 0
        self._waiting: set[asyncio.Event] = set()
        self._turns: WeakValueDictionary[tuple[str, ...], asyncio.Lock] = WeakValueDictionary()
        self._syncing: set[Versions] = set()
        registry.staging.on_room(self.pushers.room)
        registry.frozen.on_room = self.readers.room

    async def stage(self, request: Request, run: Run, averages: int = 1) -> Staged:
        """Staging for the push of ``request``, once there is room. Nothing of the body has been asked for until then.

        Raises BodyTooLarge at once where the push can never fit; Overloaded, ClientDisconnect.
        """
        self.registry.staging.needed(run.layout, averages)
        staged = await self.pushers.take(
            request, partial(self.registry.staging.reserve, run.layout, averages, run.memory)
        )
        with contextlib.ExitStack() as undo:
            undo.callback(staged.release)
            await self.allocate(run, staged.allocate)
            undo.pop_all()
        return staged

    async def allocate(self, run: Run, work: Callable[[], T]) -> T:
        """What ``work`` returns, which takes memory for a push: on a thread where the memory is a device's, for the
        event loop waits for no device; else at once."""
        return work() if run.memory.on_host else await self.workers.allocate(work)

    async def hold(self, request: Request, *arenas: Arena) -> None:
        """Hold the averages of a version for a reader, once there is room; the caller releases them.

        Raises Overloaded, ClientDisconnect.
        """
        with self.metrics.pull("wait"):
            await self.readers.take(request, partial(self._hold, *arenas))

    def _hold(self, *arenas: Arena) -> None:
        try:
            self.registry.frozen.hold(*arenas)
        except Overloaded:
            self.readings.let_go()
            self.registry.frozen.hold(*arenas)

    def turn(self, *of: str) -> asyncio.Lock:
        """The turn of a piece of work on a run, or of another thing that has a lock: one at a time, in order.

        Who waits for that lock on a thread keeps the thread from all other runs; who waits for a turn keeps nothing.
        """
        return self._turns.setdefault(of, asyncio.Lock())

    async def steer(self, run: str, work: Callable[[], T]) -> T:
        """What ``work``, which takes the run's lock, returns. Waits for the turn first, for a thread then."""
        async with self.turn(run):
            return await self.workers.block(work)

    async def read(self, work: Callable[[], T]) -> T:
        """What ``work``, which reads a snapshot, returns: on a thread that no disk waits for, where snapshots may lie
        in an object store."""
        return await (self.workers.fetch(work) if self.registry.offload else self.workers.block(work))

    async def file(self, run: str, work: Callable[[], T]) -> T:
        """As steer(), for work that takes the lock of the run's snapshots, which is held while one is written."""
        async with self.turn(run, "snapshots"):
            return await self.workers.block(work)

    @contextlib.contextmanager
    def staying(self, *, watches: bool) -> Iterator[None]:
        """A place among the requests that stay until something happens, within the block. On the event loop only.

        watches: whether the request is a stream of events, not a wait for a step. A quarter of the connections is left
        to everyone else. Raises Overloaded where all places are taken.
        """
        limit, places = self.settings.max_watchers, self.settings.max_connections * 3 // 4
        if watches and self.watchers >= limit:
            raise Overloaded(f"{limit} watchers are there already (max_watchers)", retry_after=_WATCH_SECONDS)
        if self.watchers + self.waits >= places:
            raise Overloaded(
                f"{self.watchers + self.waits} requests wait for runs already, and the other connections are for those "
                "who do not (max_connections)",
                retry_after=_WATCH_SECONDS if watches else _WAIT_SECONDS,
            )
        self.watchers += watches
        self.waits += not watches
        try:
            yield
        finally:
            self.watchers -= watches
            self.waits -= not watches

    @contextlib.contextmanager
    def watching(self, run: Run) -> Iterator[asyncio.Event]:
        """An event that is set after each change of the run, and when the server is ``stopping``.

        On the event loop only.

        A waiter clears the event first and looks at the run then, so that no change goes unseen.
        """
        loop, moved = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(moved.set)

        self._waiting.add(moved)
        try:
            with run.changes.heard_by(tell):
                yield moved
        finally:
            self._waiting.discard(moved)

    def stop_watching(self) -> None:
        """Wake everyone who waits for something to happen to a run: a stream of events has no end of its own."""
        self.stopping = True
        if self.host:
            self.host.stop_waiting()
        for moved in self._waiting:
            moved.set()

    def sync(self) -> None:
        """Begin to sync every run that moved, unless its last sync is still under way."""
        for versions in self.registry.unsynced():
            if versions not in self._syncing:
                self._syncing.add(versions)
                self.workers.sync(versions.sync).add_done_callback(partial(self._synced, versions))

    def _synced(self, versions: Versions, done: asyncio.Future[None]) -> None:
        self._syncing.discard(versions)
        done.result()

    def close(self) -> None:
        """Finish the updates and files in hand, then take a last checkpoint of every run."""
        self.workers.close()
        self.registry.close()
