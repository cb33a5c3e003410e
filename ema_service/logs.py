"""The log: a line for each state, however often a stranger brings it about.

Whoever may connect can make a server say the same sentence again and again, until the log has filled a disk. So of each
sentence, whatever names and numbers it is filled with, some lines a minute are written, and the next says how many were
left out.

Knows records of the standard library's logging. Does not know who writes them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

__all__ = ["Seldom"]

#: Lines of one sentence that are written within so many seconds.
_LINES = 20
_SECONDS = 60.0
#: Sentences remembered. Sentences stand in programs, so there are not many; but a library may have put a name into one.
_SENTENCES = 10_000


class Seldom(logging.Filter):
    """Lets the first lines of each sentence through, and counts the rest. Thread-safe.

    clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        #: By sentence: when its minute began, and how many lines it had since.
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write the line. The first one after lines were left out says how many."""
        key, now = (record.name, str(record.msg)), self._clock()
        with self._lock:
            began, lines = self._seen.get(key, (now, 0))
            left_out = 0
            if now - began >= _SECONDS:
                began, lines, left_out = now, 0, max(0, lines - _LINES)
            if len(self._seen) >= _SENTENCES:
                self._seen.clear()
            self._seen[key] = began, lines + 1
        if left_out:
            record.msg = f"{record.getMessage()} (and {left_out} more like this were not written)"
            record.args = None
        return lines < _LINES
