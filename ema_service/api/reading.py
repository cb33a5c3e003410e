"""Versions that someone reads at this moment: further stretches of each can be asked for, though the run has moved on.

A reader whose link gives each connection a share of its own brings one version over several connections, by several
requests, and a trainer pushes meanwhile. What one request holds in memory the next one of the same version shares; and
as a socket takes the end of a stretch long before the reader has it, a version stays for a moment after a stretch. Once
the stretches that were asked for are all of the body, nothing more will be: the memory goes back at once, for the next
push of the run wants it.

Knows bodies by their ETags, and who holds them. Does not know requests, ranges, or what a version is. On the event loop
only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from ema_service.bodies import WeightsStream
from ema_service.memory import Arena

__all__ = ["LINGER_SECONDS", "Reading", "Readings"]

#: Seconds for which a version stays after the end of a stretch, for the next one to be asked for. Of a link that takes
#: 100 MB a second the socket holds the last 0.1 s.
LINGER_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Reading:
    """The body ``stream``, whose data lies in ``arena``."""

    stream: WeightsStream
    arena: Arena


@dataclass(slots=True)
class _Sent:
    """One body, as often as somebody is sent some of it.

    asked: bytes of all stretches so far. begun: how many of them began with the body's first byte, one for each reader.
    ended: what lets go of stretches that were sent, each with its timer.
    """

    readings: list[Reading] = field(default_factory=list)
    asked: int = 0
    begun: int = 0
    ended: dict[Callable[[], None], asyncio.TimerHandle] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether all readers have asked for all bytes."""
        return 0 < self.begun * self.readings[0].stream.length <= self.asked

    def let_go(self) -> None:
        """Let go of the stretches that were sent."""
        for over, timer in list(self.ended.items()):
            timer.cancel()
            over()


class Readings:
    """The bodies that are being sent, by whose they are and by ETag."""

    def __init__(self) -> None:
        self._sent: dict[tuple[Hashable, str], _Sent] = {}

    def find(self, owner: Hashable, etag: str | None) -> Reading | None:
        """The body of that ETag, where it is being sent to somebody."""
        sent = self._sent.get((owner, etag)) if etag else None
        return sent.readings[0] if sent else None

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

        def over() -> None:
            sent.ended.pop(over, None)
            sent.readings.remove(reading)
            if not sent.readings:
                del self._sent[key]
            release()

        def end() -> None:
            sent.ended[over] = asyncio.get_running_loop().call_later(LINGER_SECONDS, over)
            if sent.whole:
                sent.let_go()

        return over if stretch is None else end

    def let_go(self) -> None:
        """Let go of the versions of which nothing is being sent: others need the room."""
        for sent in list(self._sent.values()):
            sent.let_go()
