"""Answers that are read as they come: a large body of known length, and a stream of lines without end.

Knows: what of an answer's head must be there before its body is read, and when a connection is given back. Does not
know: how a connection speaks (connection), JSON, routes, tensors, retries.
"""

from __future__ import annotations

import http.client
from collections.abc import Iterator, Mapping

from ema_client.errors import ConnectionLost, ProtocolError
from ema_client.http import cancelling
from ema_client.http.answers import error_of
from ema_client.http.connection import Connection, headers_of
from ema_client.http.pool import Pool

__all__ = ["Download", "Stream", "open_download", "open_stream"]

#: Bytes that drain() reads at a time.
_DROP_BYTES = 64 << 10


class Download:
    """A body on its way: read it with readinto(), in a ``with`` block. Not thread-safe.

    url; status: 200, or 206 for a part of the body; headers: with lower-case names; length: bytes of the whole body or,
    with 206, of the part.
    """

    def __init__(self, pool: Pool, connection: Connection, response: http.client.HTTPResponse) -> None:
        self._pool = pool
        self._connection = connection
        self._response = response
        self.url = connection.url
        self.status = response.status
        self.headers = headers_of(response)
        self.length = response.length or 0

    def readinto(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes of the body. Raises ConnectionLost if the body has fewer."""
        filled = 0
        while filled < len(view):
            filled += self.read_some(view[filled:])

    def read_some(self, view: memoryview) -> int:
        """Put the next bytes of the body, at least one, at the front of ``view``; returns their number.

        Raises ConnectionLost if no byte comes.
        """
        count = self._connection.readinto(self._response, view)
        if count == 0:
            self._connection.close()
            raise ConnectionLost(f"{self.url} ended its answer before its Content-Length of {self.length}")
        return count

    def hand_over(self) -> None:
        """The calling thread reads from now on, and can be cancelled (cancelling). Raises ConnectionLost where it
        was."""
        cancelling.hold(self._connection)

    def drain(self) -> None:
        """Read what is left of the body, and drop it: for a few bytes, which are cheaper than another connection."""
        buffer = memoryview(bytearray(_DROP_BYTES))
        while not self._response.isclosed() and self._connection.readinto(self._response, buffer):
            pass

    def __enter__(self) -> Download:
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        if kind is not None and issubclass(kind, ConnectionLost) and not cancelling.is_cancelled():
            self._pool.doubt()
        if self._response.isclosed():
            self._pool.give_back(self._connection)
        else:
            cancelling.release(self._connection)
            self._connection.close()


class Stream:
    """An answer without end: lines() for a reading thread, close() for any thread.

    url; headers: with lower-case names.
    """

    def __init__(self, connection: Connection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response
        self.url = connection.url
        self.headers = headers_of(response)

    def lines(self) -> Iterator[bytes]:
        """The lines as they come, until the service or close() ends the answer; then closes the connection."""
        try:
            yield from self._connection.lines(self._response)
        finally:
            self.discard()

    def discard(self) -> None:
        """Close the connection, on the reading thread; lines() does so at the end of the answer."""
        self._response.close()
        self._connection.close()

    def close(self) -> None:
        """End lines(), from any thread."""
        self._connection.interrupt()


def open_download(pool: Pool, path: str, headers: Mapping[str, str], *, patience: float = 0.0) -> Download:
    """GET a large body. Raises the answer's error unless its status is 200 or 206, ProtocolError without a length.

    patience: seconds that the answer may take beyond the timeout.
    """
    connection, response = pool.exchange(lambda connection: connection.get(path, headers, patience=patience))
    if response.status not in (200, 206):
        answer = connection.read(response)
        pool.give_back(connection)
        raise error_of(answer)
    if response.length is None:
        connection.close()
        raise ProtocolError(f"{connection.url} sent a body without Content-Length")
    return Download(pool, connection, response)


def open_stream(pool: Pool, path: str, headers: Mapping[str, str], *, patience: float) -> Stream:
    """GET an answer without end, on a connection of its own. Raises the answer's error unless its status is 200.

    patience: seconds for the answer's head to come.
    """
    connection = pool.open()
    response = connection.stream(path, headers, patience=patience)
    if response.status != 200:
        answer = connection.read(response)
        connection.close()
        raise error_of(answer)
    return Stream(connection, response)
