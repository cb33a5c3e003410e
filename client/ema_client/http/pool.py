"""The connections to a service, kept open between requests.

Knows: which connection is idle, and which has gone stale. Does not know: what is asked, how a connection speaks, or
retries, but for a single case: a kept connection that broke meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ema_client.errors import ConnectionLost
from ema_client.forks import Lock, tell_in_child
from ema_client.http import cancelling
from ema_client.http.connection import Connection, Timeouts
from ema_client.http.place import Place

__all__ = ["Pool"]

T = TypeVar("T")

#: Idle connections that stay open, the lanes of a body and a few more; a client with more threads at once opens and
#: closes the connections beyond.
MAX_IDLE = 10


class Pool:
    """Connections to a service. Thread-safe: a connection is lent to a single caller at a time.

    A new connection goes to where the service is by then.

    A forked process begins without connections.
    """

    def __init__(self, place: Place, timeouts: Timeouts) -> None:
        self._place = place
        self._timeouts = timeouts
        self._idle: list[Connection] = []
        self._lock = Lock()
        tell_in_child(self)

    def after_fork(self) -> None:
        """Forget the idle connections, which are the parent's."""
        self._idle = []

    def open(self) -> Connection:
        """A new connection, which the caller closes. Raises ServiceUnreachable, UsageError as Place.address() does."""
        address = self._place.address()
        return Connection(address, self._timeouts, self._place.context if address.secure else None)

    def exchange(self, request: Callable[[Connection], T]) -> tuple[Connection, T]:
        """Call ``request`` with a connection; returns both, and the caller gives the connection back.

        A request is made a second time where a kept connection broke, or stayed silent: every write of the protocol
        may be repeated. All idle connections are then in doubt, unless the calling thread was cancelled (cancelling).
        """
        connection = self._take()
        kept = connection.heard is not None
        try:
            return connection, request(connection)
        except ConnectionLost as lost:
            if cancelling.is_cancelled():
                raise
            self.doubt()
            if not kept or not isinstance(lost.__cause__, ConnectionError | TimeoutError):
                raise
        connection = self.open()
        return connection, request(connection)

    def doubt(self) -> None:
        """Close the idle connections: what broke another one of their age has broken them too, perhaps unnoticed."""
        self.close()

    def give_back(self, connection: Connection) -> None:
        """Take back a connection whose answer was read to the end: it is kept for the next request, or closed."""
        cancelling.release(connection)
        with self._lock:
            stays = connection.reusable and len(self._idle) < MAX_IDLE
            if stays:
                self._idle.append(connection)
        if not stays:
            connection.close()

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self) -> Connection:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else self.open()
            if connection.heard is None or not connection.stale:
                return connection
            connection.close()
