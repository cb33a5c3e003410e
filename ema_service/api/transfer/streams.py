"""What a thread has of a connection that is lent to it: bytes of a body in, bytes of weights out, and no waiting.

Knows a socket's descriptor. Does not know threads, the event loop, or what the bytes mean; of TLS tls_session knows.
"""

from __future__ import annotations

import os
from typing import Protocol

__all__ = ["PlainStream", "Stream"]


class Stream(Protocol):
    """A connection in the hands of one thread, until close()."""

    def fileno(self) -> int:
        """The descriptor to wait with, for the next bytes or for room."""

    def read_into(self, view: memoryview) -> int:
        """Put the bytes that have come at the front of ``view``; returns their number, 0 at the end of the connection.

        Raises BlockingIOError where none has come, OSError where the connection is broken.
        """

    def write(self, view: memoryview) -> int:
        """Send the first bytes of ``view``; returns their number.

        Raises BlockingIOError where the socket is full, OSError where the connection is broken.
        """

    def close(self) -> None:
        """Give the connection back to the event loop."""


class PlainStream:
    """A Stream without TLS. Owns ``descriptor``, a duplicate of the connection's.

    The event loop may close its own descriptor meanwhile, and the system give the number to another file.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def read_into(self, view: memoryview) -> int:
        return os.readv(self._descriptor, [view])

    def write(self, view: memoryview) -> int:
        return os.write(self._descriptor, view)

    def close(self) -> None:
        os.close(self._descriptor)
