"""Connections for weights, kept between requests, and a large body on its way.

A body that lies in shared memory is handed to a service on this host by name. Where the service will not have that,
this is logged once, and bodies are sent from then on.

Knows: which connection is free, which has gone stale, how bodies travel. Does not know: how a connection speaks
(connection), JSON, routes, tensors, retries but one: a kept connection that the server closed while it lay idle.
"""

from __future__ import annotations

import functools
import http.client
import logging
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeGuard, TypeVar

from ema_client.errors import ConnectionLost, EmaError, MalformedBody, ProtocolError, SegmentUnusable
from ema_client.http.address import Address
from ema_client.http.answers import Answer, error_of
from ema_client.http.connection import Body, Connection, Timeouts
from ema_client.protocol import HEADER_SEGMENT

if TYPE_CHECKING:
    from ema_client.http.memfd import SharedBody

__all__ = ["SHARE_ABOVE", "BulkPool", "Download", "Stream"]

T = TypeVar("T")

_log = logging.getLogger("ema_client")

#: A body below this is sent as quickly as it is handed over.
SHARE_ABOVE = 1 << 20
#: A body handed over is read and averaged before a byte of the answer comes: at the pace of one slow core, at least.
SHARED_BYTES_PER_SECOND = 200e6
#: Idle connections kept; more threads than this at once open their own.
MAX_IDLE = 4


class BulkPool:
    """Connections to one service. Thread-safe: each caller has a connection to itself while it uses one."""

    def __init__(self, address: Address, timeouts: Timeouts, context: ssl.SSLContext | None) -> None:
        self._new = functools.partial(Connection, address, timeouts, context)
        self._address = address
        self._shares = address.same_host
        #: How the bodies of this client travel, in words.
        self.link = address.link
        self._idle: list[Connection] = []
        self._lock = threading.Lock()

    def put(self, path: str, headers: Mapping[str, str], body: Body) -> Answer:
        """Send a large body, or hand it over; the answer may be a refusal."""
        if body.shared is not None and self._shares and body.length > SHARE_ABOVE:
            answer = self._hand_over(path, headers, body.shared)
            fault = None if answer.status < 400 else error_of(answer)
            if not _unshareable(fault):
                return answer
            self._send_from_now_on(fault)
        return self._put(path, headers, body)

    def _put(self, path: str, headers: Mapping[str, str], body: Body, patience: float = 0.0) -> Answer:
        connection, answer = self._exchange(lambda it: it.put(path, headers, body, patience=patience))
        self.give_back(connection)
        return answer

    def _hand_over(self, path: str, headers: Mapping[str, str], shared: SharedBody) -> Answer:
        with shared.offered() as segment:
            named = {**headers, HEADER_SEGMENT: segment.to_header()}
            answer = self._put(path, named, Body(0, lambda: ()), shared.length / SHARED_BYTES_PER_SECOND)
        if answer.status < 400:
            self.link = "shared memory"
        return answer

    def _send_from_now_on(self, fault: EmaError) -> None:
        self._shares = False
        self.link = f"{self._address.link}; shared memory was refused: {fault.detail}"
        _log.warning("pushes to %s are sent and not shared: %s", self._address.url, fault.detail)

    def get(self, path: str, headers: Mapping[str, str], *, patience: float = 0.0) -> Download:
        """Ask for a large body. Raises the answer's error unless it is 200 or 206, ProtocolError without a length."""
        connection, response = self._exchange(lambda connection: connection.get(path, headers, patience=patience))
        if response.status not in (200, 206):
            answer = connection.read(response)
            self.give_back(connection)
            raise error_of(answer)
        if response.length is None:
            connection.close()
            raise ProtocolError(f"{connection.url} sent a body without Content-Length")
        return Download(self, connection, response)

    def stream(self, path: str, headers: Mapping[str, str], *, patience: float) -> Stream:
        """Ask for an answer without end, on a connection of its own. Raises the answer's error unless it is 200."""
        connection = self._new()
        response = connection.stream(path, headers, patience=patience)
        if response.status != 200:
            answer = connection.read(response)
            connection.close()
            raise error_of(answer)
        return Stream(connection, response)

    def give_back(self, connection: Connection) -> None:
        with self._lock:
            keep = connection.reusable and len(self._idle) < MAX_IDLE
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _exchange(self, request: Callable[[Connection], T]) -> tuple[Connection, T]:
        connection = self._take()
        try:
            return connection, request(connection)
        except ConnectionLost as lost:
            if not connection.used or not isinstance(lost.__cause__, ConnectionError):
                raise
        # The server closed a kept connection as the request went out. A request repeated is the same request: every
        # write of the protocol is idempotent.
        connection = self._new()
        return connection, request(connection)

    def _take(self) -> Connection:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else self._new()
            if not connection.used or not connection.stale:
                return connection
            connection.close()


def _unshareable(fault: EmaError | None) -> TypeGuard[EmaError]:
    """Whether a body that was handed over is to be sent.

    A service that knows nothing of segments, or a proxy that drops the header, finds an empty body.
    """
    return isinstance(fault, SegmentUnusable | MalformedBody)


class Download:
    """A body on its way: read it with readinto(), in a ``with`` block. Not thread-safe.

    url, status, headers (lower-case names), length (bytes of this body; of a part, its own).
    """

    def __init__(self, pool: BulkPool, connection: Connection, response: http.client.HTTPResponse) -> None:
        self._pool = pool
        self._connection = connection
        self._response = response
        self.url = connection.url
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.length = response.length or 0

    def readinto(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes of the body. Raises ConnectionLost if the body ends before that."""
        filled = 0
        while filled < len(view):
            filled += self.read_some(view[filled:])

    def read_some(self, view: memoryview) -> int:
        """Put the next bytes of the body, one or more, at the front of ``view``. Raises ConnectionLost if none come."""
        count = self._connection.readinto(self._response, view)
        if count == 0:
            self._connection.close()
            raise ConnectionLost(f"{self.url} ended its answer before its Content-Length of {self.length}")
        return count

    def __enter__(self) -> Download:
        return self

    def __exit__(self, *_: object) -> None:
        if self._response.isclosed():
            self._pool.give_back(self._connection)
        else:
            self._connection.close()


class Stream:
    """An answer without end: read its lines on one thread; close() it from any.

    url, headers (lower-case names).
    """

    def __init__(self, connection: Connection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response
        self.url = connection.url
        self.headers = {name.lower(): value for name, value in response.getheaders()}

    def lines(self) -> Iterator[bytes]:
        """Lines as they come, until the service ends the answer or close() does. Closes the connection at the end."""
        try:
            yield from self._connection.lines(self._response)
        finally:
            self.discard()

    def discard(self) -> None:
        """Let go of the connection, on the thread that reads; lines() does so at its end."""
        self._response.close()
        self._connection.close()

    def close(self) -> None:
        """End lines(), from any thread."""
        self._connection.interrupt()
