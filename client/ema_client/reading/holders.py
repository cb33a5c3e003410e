"""Who holds a version beside the server that was asked: its replicas bring stretches of the very body, by ETag.

The server itself is asked first, so a reader gets the newest version, and its own updates; where the server has a twin,
which has them too, the twin is asked in its place while it is away. Each stretch of that version is then asked for at
the holders in turn. One that is not there, or lacks the version, is left out for a while, and the stretch is asked for
at the next. Where the server itself is gone, they bring the rest of what it began.

Knows: that an ETag names the same bytes at all of them. Does not know: bodies, stretches, retries.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence

from ema_client.errors import ConnectionLost, EmaError, Overloaded, TransportError
from ema_client.http.downloads import Download
from ema_client.http.transport import Query, Transport

__all__ = ["Holders"]

#: Seconds for which a replica is not asked that was behind; and one that did not answer, which may be gone.
_BEHIND_SECONDS, _AWAY_SECONDS = 0.5, 10.0


class Holders:
    """A server, its twin and its replicas. Thread-safe."""

    def __init__(self, transport: Transport, replicas: Sequence[Transport] = (), twin: Transport | None = None) -> None:
        self._transport = transport
        #: Those that have the newest version.
        self._first = (transport, twin) if twin else (transport,)
        self._replicas = (*self._first[1:], *replicas)
        #: By holder: until when it is left out, by time.monotonic().
        self._resting = dict.fromkeys((transport, *self._replicas), float("-inf"))
        # Many readers begin at once, each with another holder.
        self._turns = itertools.count(random.randrange(1 << 16))

    @property
    def count(self) -> int:
        """How many hold versions, the server itself with them."""
        return 1 + len(self._replicas)

    @property
    def several(self) -> bool:
        """Whether there are replicas."""
        return bool(self._replicas)

    def download(
        self, path: str, *, query: Query, start: int, stop: int | None, etag: str | None, patience: float
    ) -> Download:
        """As Transport.download(), from one of those that hold the version of ``etag``. Raises as that."""
        turn = self._in_turn() if etag else self._newest()
        fault: EmaError | None = None
        for holder in turn:
            own = holder is self._transport
            try:
                part = holder.download(path, query=query, start=start, stop=stop, etag=etag, patience=patience)
            except TransportError as error:
                fault = error if own else fault
            except EmaError as error:
                # A server that was left behind by its twin answers "later" until it has everything again.
                if own and not (self._first[1:] and isinstance(error, Overloaded)):
                    raise
                fault = error if own else fault
            else:
                if own or part.status == 206 or not etag:
                    return part
                with part:  # another version, which nobody reads
                    self._resting[holder] = time.monotonic() + _BEHIND_SECONDS
                continue
            self._resting[holder] = time.monotonic() + _AWAY_SECONDS
        try:
            raise fault or ConnectionLost(f"nobody has {path}")
        finally:
            del fault

    def _newest(self) -> Iterator[Transport]:
        """Those that have the newest version; first who was there when it was asked last."""
        now = time.monotonic()
        yield from sorted(self._first, key=lambda each: now < self._resting[each])

    def _in_turn(self) -> Iterator[Transport]:
        """All holders but those that are left out, from the one on whose turn it is. The server itself never is."""
        everybody = (self._transport, *self._replicas)
        first = next(self._turns) % len(everybody)
        for each in (*everybody[first:], *everybody[:first]):
            if each is self._transport or time.monotonic() >= self._resting[each]:
                yield each
