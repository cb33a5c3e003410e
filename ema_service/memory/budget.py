"""A count of bytes in use, and their limit.

Knows numbers. Does not know what the bytes are for, or where they lie.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Budget"]


class Budget:
    """Bytes in use, and most of them. Thread-safe.

    on_room: called whenever bytes come free, on any thread, perhaps in a garbage collection.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.on_room: Callable[[], None] = _nothing
        # Re-entrant: a garbage collection may give bytes back on a thread that is inside take().
        self._lock = threading.RLock()

    def take(self, nbytes: int) -> bool:
        """Take ``nbytes`` of the budget, and say whether they were free."""
        with self._lock:
            if self.used + nbytes > self.limit:
                return False
            self.used += nbytes
            return True

    def count(self, nbytes: int) -> None:
        """Count ``nbytes`` that are in use already, beyond the limit, too."""
        with self._lock:
            self.used += nbytes

    def give_back(self, nbytes: int) -> None:
        """Return ``nbytes`` to the budget."""
        with self._lock:
            self.used -= nbytes
        self.on_room()


def _nothing() -> None:
    pass
