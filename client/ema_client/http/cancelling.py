"""Cancellation of what a thread does over a connection, by another thread.

A thread in a socket's send() or recv() notices nothing else. So the connection in use is noted where another thread can
end it: the waiting call then raises at once, as where the other end had closed the connection.

Knows: which connection the calling thread uses. Does not know: why anybody cancels, or what goes over the connection.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar, Token
from typing import Protocol, Self

from ema_client.errors import ConnectionLost

__all__ = ["Cancellation", "current", "hold", "is_cancelled", "release"]


class _Interrupted(Protocol):
    def interrupt(self) -> None: ...


class Cancellation:
    """Ends the requests that one thread makes within the ``with`` block; cancel() is for any thread.

    A connection that is being opened is not ended: it raises once it is open, or its timeout is over.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: _Interrupted | None = None
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """Interrupt the connection in use, and every one that is used within the block from now on."""
        with self._lock:
            self._cancelled = True
            if self._connection is not None:
                self._connection.interrupt()

    def check(self) -> None:
        """Raises ConnectionLost once cancelled."""
        if self._cancelled:
            raise ConnectionLost("the connection was given up: too slow, or nobody wants the rest")

    def hold(self, connection: _Interrupted | None) -> None:
        """Use ``connection`` from now on. Raises ConnectionLost once cancelled."""
        with self._lock:
            self.check()
            self._connection = connection

    def release(self, connection: _Interrupted) -> None:
        """The connection is another thread's from now on, if it is the one in use."""
        with self._lock:
            if self._connection is connection:
                self._connection = None

    def __enter__(self) -> Self:
        self._token: Token[Cancellation | None] = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)
        with self._lock:
            self._connection = None


#: Of the calling thread.
_current: ContextVar[Cancellation | None] = ContextVar("ema cancellation", default=None)


def current() -> Cancellation | None:
    """What ends the requests of the calling thread."""
    return _current.get()


def hold(connection: _Interrupted) -> None:
    """The calling thread uses ``connection``. Raises ConnectionLost where it was cancelled."""
    if (cancellation := current()) is not None:
        cancellation.hold(connection)


def release(connection: _Interrupted) -> None:
    """The calling thread gives ``connection`` back."""
    if (cancellation := current()) is not None:
        cancellation.release(connection)


def is_cancelled() -> bool:
    """Whether what the calling thread does was cancelled."""
    cancellation = current()
    return cancellation is not None and cancellation.cancelled
