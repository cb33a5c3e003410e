"""The rings of the runs on several hosts: whoever asks that all hosts have the same snapshots of one.

    each host         writes a snapshot that is due, by itself (persistence.ShardRing)
    the first host    asks that the ring have it, and be without what is too many: a change, RingKept
    a host lacks one  its disk was full, it was killed, a file is gone: it says which, and all are asked without those
    another host      asks where the first has none of what that one has begun or lost, and so asks for nothing

Lives on the event loop. Knows when the hosts are to agree. Does not know what is due or too many, or who decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping

from ema_client.errors import EmaError, Overloaded, Superseded
from ema_service.cluster.encoding import encode
from ema_service.cluster.hosting.shard_run import ShardRun
from ema_service.cluster.messages import Answer, Change, RingKept
from ema_service.cluster.reasons import error_of, lacked_in
from ema_service.persistence import ShardRing

__all__ = ["Rings"]

_log = logging.getLogger(__name__)

#: Seconds between two looks at all rings, for what nobody was told of: the host that asked is gone, a file is.
_LOOK_SECONDS = 2.0
#: Seconds between two tries while a host is still writing, at first and at most: at each an update that is under way
#: waits for a refusal.
_PAUSE, _MOST_PAUSE = 0.02, 2.0
#: Seconds in which nothing comes of what a ring waits for, until the next host asks in place of the one before.
_TURN_SECONDS = 5.0


class Rings:
    """Has all hosts have the same ring, of each run. Made on the event loop; start(), then close()."""

    def __init__(
        self,
        shards: Callable[[], Mapping[str, ShardRun]],
        turn: Callable[[ShardRun], int | None],
        ask: Callable[[str, Change], Awaitable[Answer]],
    ) -> None:
        """shards: this host's, by run. turn: how many hosts come before this one in asking for a run; None where this
        one is not to ask. ask: as Asking.change()."""
        self._shards = shards
        self._turn = turn
        self._ask = ask
        self._loop = asyncio.get_running_loop()
        self._moved = asyncio.Event()
        #: By run: what has its hosts agree at this moment.
        self._agreeing: dict[str, asyncio.Task[None]] = {}
        #: Runs whose ring has moved while their hosts agree.
        self._moved_since: set[str] = set()
        #: By run whose ring waits to be agreed on: ShardRing.ended, and since when it is that.
        self._stood: dict[str, tuple[int, float]] = {}
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look after the rings."""
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Ask for nothing any more."""
        tasks = [*self._agreeing.values(), *([self._watching] if self._watching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def moved(self, ring: ShardRing) -> None:
        """A run, or its ring, has changed. On any thread; takes microseconds."""
        if ring.is_unsettled:
            with contextlib.suppress(RuntimeError):  # the server has stopped
                self._loop.call_soon_threadsafe(self._moved.set)

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._moved.wait()
            self._moved.clear()
            there = list(self._shards().items())  # runs come and go on other threads
            shards = {name: shard for name, shard in there if shard.ring and shard.ring.is_unsettled}
            self._stood = {name: stood for name, stood in self._stood.items() if name in shards}
            for name, shard in shards.items():
                if name in self._agreeing:
                    self._moved_since.add(name)
                elif shard.ring and self._is_turn(name, shard, shard.ring):
                    self._agreeing[name] = task = asyncio.create_task(self._agree(shard.talk, shard.ring))
                    task.add_done_callback(lambda _, name=name: self._agreed(name))  # type: ignore[misc]

    def _is_turn(self, name: str, shard: ShardRun, ring: ShardRing) -> bool:
        """Whether this host is to ask now: at once if it is the first, else where nothing came of those before."""
        turn, now = self._turn(shard), time.monotonic()
        ended, since = self._stood.get(name, (None, now))
        if ended != ring.ended:
            since = now
            self._stood[name] = ring.ended, since
        return turn is not None and now - since >= turn * _TURN_SECONDS

    def _agreed(self, name: str) -> None:
        del self._agreeing[name]
        if name in self._moved_since:  # after the hosts' last look at it, maybe
            self._moved_since.discard(name)
            self._moved.set()

    async def _agree(self, talk: str, ring: ShardRing) -> None:
        """Have all hosts agree on what this one has written. A failure is logged: the next look tries again."""
        pause = _PAUSE
        try:
            while wanted := await asyncio.to_thread(ring.wanted):
                change = encode(RingKept(wanted[0], " ".join(wanted[1])))
                answer = await self._ask(talk, Change(secrets.token_hex(16), change))
                if answer.committed:
                    pause = _PAUSE
                elif lacked := lacked_in(answer.reason):
                    why = f"another host lacks snapshots {', '.join(lacked)}: all go on without these"
                    await asyncio.to_thread(ring.give_up, lacked, why)
                elif answer.reason and not _passes(answer.reason):
                    raise error_of(answer.reason)
                else:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _MOST_PAUSE)
        except EmaError as fault:
            _log.warning("talk %s: the hosts could not agree on a ring: %s", talk, fault)


def _passes(reason: str) -> bool:
    """Whether what a change was refused for passes by itself."""
    return isinstance(error_of(reason), Overloaded | Superseded)
