"""The log: where lines go, in which shape, of which request; and a line for each state, however often it comes about.

Whoever may connect can make a server say the same sentence again and again, until the log has filled a disk. So of each
sentence, whatever names and numbers it is filled with, some lines a minute are written, and the next says how many were
left out. What a stranger wrote into a line stays one line: control characters are escaped.

Knows records of the standard library's logging, and that some belong to a request. Does not know who writes them.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

__all__ = ["ACCESS", "Asked", "LogFormat", "Seldom", "asked", "configure", "within"]

LogFormat = Literal["text", "json"]

#: The logger with a line for each request: asked for by a flag, and never left out.
ACCESS = "ema_service.access"

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
        if record.name == ACCESS:
            return True
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


@dataclass(slots=True)
class Asked:
    """A request, as far as the log tells of it. fault: why it was refused, for people; None while it was not."""

    id: str
    fault: str | None = None


_asked: ContextVar[Asked | None] = ContextVar("ema_asked", default=None)


def within(request: Asked) -> None:
    """Let the lines of this task, and of the threads that it hands work to, be those of a request from here on."""
    _asked.set(request)


def asked() -> Asked | None:
    """The request that is answered here; None in what the server does by itself."""
    return _asked.get()


def configure(shape: LogFormat) -> None:
    """Write the lines of the process to stderr: for people, or as one JSON object a line."""
    handler = logging.StreamHandler()
    handler.addFilter(Seldom())
    handler.setFormatter(_Json() if shape == "json" else _Text())
    # Of libraries what went wrong: some tell of each request that they send, as Azure's does.
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("ema_service").setLevel(logging.INFO)


class _Text(logging.Formatter):
    """A line for people; of a request, with its id at the end."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        request = _asked.get()
        line = super().formatMessage(record).translate(_ESCAPES)
        return f"{line} [{request.id}]" if request else line


class _Json(logging.Formatter):
    """A JSON object with time, level, logger and message, and where there are such request_id, exception, and the
    fields that the line was given (``extra={"fields": {...}}``)."""

    def format(self, record: logging.LogRecord) -> str:
        request = _asked.get()
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request:
            said["request_id"] = request.id
        said |= getattr(record, "fields", {})
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said)


#: Control characters, and what ends a line for some readers, as Python writes them.
_ESCAPES = {code: repr(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}
