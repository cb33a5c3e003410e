"""The head of an answer: read to its empty line, or not at all.

``http.client`` takes the end of the stream for the end of the head: of an answer cut inside its head it makes an answer
without the fields that are missing, or a line that is no status line. Such an answer is a broken connection.

Knows: HTTP/1.1's heads as lines, ``http.client``'s reader of answers. Does not know: what an answer means.
"""

from __future__ import annotations

import http.client
import io
from typing import Any

__all__ = ["WholeHead"]

_STATUS_LINE = b"HTTP/"


class WholeHead(http.client.HTTPResponse):
    """A response for ``http.client``, which raises ConnectionResetError where the stream ends inside the head."""

    def begin(self) -> None:
        """Read the head; called by ``http.client``."""
        stream = self.fp
        self.fp = _WholeLines(stream)  # type: ignore[assignment]
        try:
            super().begin()
        finally:
            if not self.isclosed():
                self.fp = stream


class _WholeLines:
    """The lines of ``stream``; a line that the stream's end cuts off is an error."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream
        self._first = True

    def readline(self, limit: int) -> bytes:
        line = self._stream.readline(limit)
        # A stranger's first line, such as another protocol's greeting, is told by http.client: a BadStatusLine.
        foreign = self._first and not line.startswith(_STATUS_LINE[: len(line)])
        self._first = False
        if not line.endswith(b"\n") and len(line) < limit and not foreign:
            raise ConnectionResetError("the connection ended inside the head of an answer")
        return line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
