"""Events between a reading thread and a loop that may be slower: the newest event of each kind waits.

Knows: which events make an older event out of date, and which events are no news. Does not know: how events come, or
what the loop does.
"""

from __future__ import annotations

import threading

from ema_client.errors import EmaError
from ema_client.protocol import EventKind, RunEvent, SnapshotInfo

__all__ = ["Mailbox"]


class Mailbox:
    """Events that were delivered and not taken yet: the newest of each kind and of each snapshot, in order of delivery.

    kinds: of the events that are taken in; deliver() drops the others.
    """

    def __init__(self, kinds: frozenset[EventKind]) -> None:
        self.kinds = kinds
        self._events: dict[tuple[str, str], RunEvent] = {}
        self._told: set[SnapshotInfo] = set()
        self._version: str | None = None
        self._closed = False
        self._fault: EmaError | None = None
        self._moved = threading.Condition()

    def deliver(self, event: RunEvent) -> None:
        """Put an event in, unless nobody wants its kind or an earlier connection delivered the same event."""
        with self._moved:
            if event.kind in self.kinds and self._is_news(event):
                key: tuple[str, str] = (event.kind, event.average)
                if event.snapshot:
                    # One key for creation and deletion: of a deleted snapshot, only the deletion is still to be told.
                    key = ("snapshot", event.snapshot.name)
                self._events.pop(key, None)
                self._events[key] = event
                self._moved.notify()

    def close(self, fault: EmaError | None = None) -> None:
        """No event will come any more. ``fault``: why not, where that is an error."""
        with self._moved:
            self._closed, self._fault = True, fault
            self._moved.notify()

    def take(self, timeout: float | None) -> RunEvent | None:
        """The next event; None at the end, and after ``timeout`` seconds without an event. Raises close()'s fault."""
        with self._moved:
            self._moved.wait_for(lambda: self._events or self._closed, timeout)
            if self._events:
                return self._events.pop(next(iter(self._events)))
            if self._fault:
                raise self._fault
            return None

    def _is_news(self, event: RunEvent) -> bool:
        if event.kind == "version":
            news, self._version = event.version != self._version, event.version
            return news
        if event.kind == "snapshot_created" and event.snapshot:
            news = event.snapshot not in self._told
            self._told.add(event.snapshot)
            return news
        return True
