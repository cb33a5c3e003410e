"""Versions that someone reads at this moment: further stretches of each can be asked for, though the run has moved on.

A reader whose link gives each connection a share of its own brings one version over several connections, by several
requests, and a trainer pushes meanwhile. What one request holds in memory the next one of the same version shares; and
as a socket takes the end of a stretch long before the reader has it, a version stays for a moment after a stretch. Once
the stretches that were asked for are all of the body, nothing more will be: the memory goes back at once, for the next
push of the run wants it.

Knows bodies by their ETags, and who holds them. Does not know requests or ranges. On the event loop
only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial

from ema_client.errors import VersionGone
from ema_service.bodies import WeightsStream
from ema_service.memory import Arena
from ema_service.runs import Run
from ema_service.shadows import State

__all__ = ["LINGER_SECONDS", "Reading", "Readings"]

#: Seconds for which a version stays after the end of a stretch, for the next one to be asked for. Of a link that takes
#: 100 MB a second the socket holds the last 0.1 s.
LINGER_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Reading:
    """The body ``stream``, whose data lies in ``arena``. state: the version, where all weights of it are held."""

    stream: WeightsStream
    arena: Arena
    state: State | None = None


@dataclass(slots=True)
class _Sent:
    """One body, as often as somebody is sent some of it.

    asked: bytes of all stretches so far. begun: how many of them began with the body's first byte, one for each reader.
    ended: stretches that were sent, each with the timer that lets go of it.
    """

    readings: list[Reading] = field(default_factory=list)
    asked: int = 0
    begun: int = 0
    ended: dict[_Held, asyncio.TimerHandle] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether all readers have asked for all bytes."""
        return 0 < self.begun * self.readings[0].stream.length <= self.asked

    def let_go(self) -> None:
        """Let go of the stretches that were sent."""
        for held, timer in list(self.ended.items()):
            timer.cancel()
            held.let_go()


@dataclass(frozen=True, eq=False, slots=True)
class _Held:
    """What one answer holds of the body it sends.

    No closure that knows itself: such a cycle would hold the version's memory until a garbage collection.
    """

    sent: _Sent
    reading: Reading
    release: Callable[[], None]
    forget: Callable[[], object]

    def ended(self) -> None:
        """The stretch was sent: let go of it a moment later, or now where all was asked for."""
        self.sent.ended[self] = asyncio.get_running_loop().call_later(LINGER_SECONDS, self.let_go)
        if self.sent.whole:
            self.sent.let_go()

    def let_go(self) -> None:
        self.sent.ended.pop(self, None)
        self.sent.readings.remove(self.reading)
        if not self.sent.readings:
            self.forget()
        self.release()


class Readings:
    """The bodies that are being sent, by whose they are and by ETag."""

    def __init__(self) -> None:
        self._sent: dict[tuple[Hashable, str], _Sent] = {}

    def find(self, owner: Hashable, etag: str | None) -> Reading | None:
        """The body of that ETag, where it is being sent to somebody."""
        sent = self._sent.get((owner, etag)) if etag else None
        return sent.readings[0] if sent else None

    def state(self, owner: Run, version: str) -> State:
        """The version of this name, where it is the run's, or stays. Raises VersionGone."""
        for (of, _), sent in self._sent.items():
            for each in sent.readings if of is owner else ():
                if each.state and str(each.state.version) == version:
                    return each.state
        state = owner.ready_state()
        if str(state.version) != version:
            raise VersionGone(f"version {version} of run {owner.config.run!r} is not here, or no more", retry_after=0.0)
        return state

    def begin(
        self, owner: Hashable, reading: Reading, release: Callable[[], None], stretch: tuple[int, int] | None
    ) -> Callable[[], None]:
        """Say that the body, whose data the caller holds, is being sent. The caller calls what is returned at the end;
        ``release``, which lets go of the data, is called then, or, of a stretch, a moment later.

        stretch: the bytes [start, stop) of the body that are being sent; None: the whole.
        """
        key = owner, reading.stream.etag
        sent = self._sent.setdefault(key, _Sent())
        sent.readings.append(reading)
        if stretch is not None:
            sent.asked += stretch[1] - stretch[0]
            sent.begun += stretch[0] == 0

        held = _Held(sent, reading, release, partial(self._sent.pop, key, None))
        return held.let_go if stretch is None else held.ended

    def let_go(self) -> None:
        """Let go of the versions of which nothing is being sent: others need the room."""
        for sent in list(self._sent.values()):
            sent.let_go()
