"""Versions that someone reads at this moment: further stretches of each can be asked for, though the run has moved on.

A reader whose link gives each connection a share of its own brings one version over several connections, by several
requests, and a trainer pushes meanwhile. What one request holds in memory the next one of the same version shares; and
as a socket takes the end of a stretch long before the reader has it, a version stays for a moment after a stretch.

Knows bodies by their ETags, and who holds them. Does not know requests, ranges, or what a version is. On the event loop
only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass

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


class Readings:
    """The bodies that are being sent, by whose they are and by ETag."""

    def __init__(self) -> None:
        self._sent: dict[tuple[Hashable, str], list[Reading]] = {}
        #: What ends the readings of stretches that were sent, each with its timer.
        self._ended: dict[Callable[[], None], asyncio.TimerHandle] = {}

    def find(self, owner: Hashable, etag: str | None) -> Reading | None:
        """The body of that ETag, where it is being sent to somebody."""
        readings = self._sent.get((owner, etag)) if etag else None
        return readings[0] if readings else None

    def begin(
        self, owner: Hashable, reading: Reading, release: Callable[[], None], *, stretch: bool
    ) -> Callable[[], None]:
        """Say that the body, whose data the caller holds, is being sent. The caller calls what is returned at the end;
        ``release``, which lets go of the data, is called then, or, of a stretch, a moment later."""
        key = owner, reading.stream.etag
        self._sent.setdefault(key, []).append(reading)

        def over() -> None:
            self._ended.pop(over, None)
            self._sent[key].remove(reading)
            if not self._sent[key]:
                del self._sent[key]
            release()

        def end() -> None:
            self._ended[over] = asyncio.get_running_loop().call_later(LINGER_SECONDS, over)

        return end if stretch else over

    def let_go(self) -> None:
        """Let go of the versions of which nothing is being sent: others need the room."""
        for over, timer in list(self._ended.items()):
            timer.cancel()
            over()
