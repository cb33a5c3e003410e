"""Accepting connections: no more than there may be, and none while the process has no descriptor left.

asyncio accepts whatever comes. Where descriptors run out it logs each failure with its traceback, thousands a second.
Here connections are counted from the moment they are accepted, TLS handshakes included. Where all are taken, those that
wait for their client longest are closed for the new one: a client whose kept connection ends opens another. Where every
connection is at work, new ones wait in the kernel's queue.

Knows sockets, the event loop, and how long each connection has been idle. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Callable, Collection
from functools import partial
from typing import Protocol

from ema_service.api.transfer.tls_transport import accept_secure
from ema_service.descriptors import EXHAUSTED

__all__ = ["HANDSHAKE_SECONDS", "KEPT", "SILENT", "UNREAD", "Acceptor", "Connections", "Idling"]

_log = logging.getLogger(__name__)

#: Connections accepted in one turn of the event loop.
_AT_ONCE = 64
#: Seconds between two looks for room, where a connection could not be accepted.
_PAUSE_SECONDS = 0.1
#: Seconds that a connection waits for its client before it counts as idle: longer than the server takes to read what
#: came, where many connections are opened in one moment.
_SPARED_SECONDS = 0.1
#: Seconds in which a TLS handshake must be done. A handshake takes two round trips.
HANDSHAKE_SECONDS = 10.0
#: Of the connections over which nothing ever came, so many are closed together: a flood of them costs one look through
#: all connections each time.
_SHARE_OF_SILENT = 16
#: What accept() says where a client went away meanwhile, or the system lacks memory for one more socket.
_PASSING = frozenset({errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENOBUFS, errno.ENOMEM})


#: Ranks of idle connections, in the order in which they are closed: no request ever came; the last one was answered;
#: the client takes nothing of an answer.
SILENT, KEPT, UNREAD = range(3)


class Idling(Protocol):
    """A connection, as far as its being closed for another is concerned."""

    @property
    def idle_since(self) -> tuple[int, float] | None:
        """The connection's rank among idle ones, and the time since when it waits for its client. None where the client
        waits for the server, or sends a body."""

    def give_up(self) -> None:
        """Close the connection."""


class Connections:
    """The open connections of one server. On the event loop only.

    most: how many there may be at once. opened: the protocols that run. starts: of accepted connections, each until its
    task has ended, which is some turns of the loop after the connection's protocol runs.
    """

    def __init__(self, most: int, opened: Collection[Idling]) -> None:
        self.most = most
        self.opened = opened
        self.starts: set[_Start] = set()

    @property
    def full(self) -> bool:
        """Whether there are as many as there may be."""
        return len(self._starting()) + len(self.opened) >= self.most

    def _starting(self) -> list[_Start]:
        """The starts of connections whose protocol does not run yet, for their TLS handshake takes time."""
        return [start for start in self.starts if start.protocol not in self.opened]

    def close_idlest(self) -> bool:
        """Close the connections that have waited for their clients longest, and say whether there was any.

        Not those that have waited for a moment only: what their clients sent may lie in the kernel.
        """
        latest = asyncio.get_running_loop().time() - _SPARED_SECONDS
        idle = sorted(
            (since, number, each)
            for number, each in enumerate((*self._starting(), *self.opened))
            if (since := getattr(each, "idle_since", None)) is not None and since[1] <= latest
        )
        if not idle:
            return False
        lowest = idle[0][0][0]
        count = max(1, self.most // _SHARE_OF_SILENT) if lowest == SILENT else 1
        for (rank, _), _, each in idle[:count]:
            if rank == lowest:
                each.give_up()
        return True


class _Start:
    """The start of a connection: its TLS handshake, if there is one, and the first call of its protocol.

    make: makes the protocol.
    """

    def __init__(self, sock: socket.socket, make: Callable[[], asyncio.Protocol], tls: ssl.SSLContext | None) -> None:
        self.protocol: object = None
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()
        self._given_up = False
        self.task = self._loop.create_task(self._run(sock, tls))

    @property
    def idle_since(self) -> tuple[int, float] | None:
        """As Idling.idle_since."""
        return None if self._given_up else (SILENT, self._begun)

    def give_up(self) -> None:
        """End the handshake, and with it the connection."""
        self._given_up = True
        self.task.cancel()

    async def _run(self, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        with contextlib.suppress(OSError):  # the handshake failed or took too long, and the socket is closed
            if tls:
                await accept_secure(sock, tls, self._made, HANDSHAKE_SECONDS)
            else:
                await self._loop.connect_accepted_socket(self._made, sock)

    def _made(self) -> asyncio.Protocol:
        self.protocol = made = self._make()
        return made


class Acceptor:
    """Accepts the connections of one listening socket. On the event loop only.

    As an asyncio.Server it can be closed, and waited for. make: makes a connection's protocol. tls: gives the context
    of each connection of this socket.
    """

    def __init__(
        self,
        sock: socket.socket,
        connections: Connections,
        make: Callable[[], asyncio.Protocol],
        *,
        backlog: int,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self._sock = sock
        self._connections = connections
        self._make = make
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._starts: set[_Start] = set()
        #: Accepted while every connection was at work: begins once one of them ends.
        self._accepted: socket.socket | None = None
        self._resumes: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        sock.listen(backlog)
        self._loop.add_reader(sock, self._accept)

    def close(self) -> None:
        """Accept no more: who connects is refused, and tries elsewhere or again. Connections go on."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock)
        self._sock.close()
        if self._resumes:
            self._resumes.cancel()
        if self._accepted:
            self._accepted.close()
        for start in self._starts:
            start.give_up()

    async def wait_closed(self) -> None:
        """Return once every handshake under way has ended."""
        await asyncio.gather(*(start.task for start in self._starts), return_exceptions=True)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            self._accepted = self._accepted or self._next()
            if self._accepted is None:
                return
            full = self._connections.full
            if full and not self._connections.close_idlest():
                self._pause()
                return
            start = _Start(self._accepted, self._make, self._tls() if self._tls else None)
            self._accepted = None
            self._connections.starts.add(start)
            self._starts.add(start)
            start.task.add_done_callback(partial(self._begun, start))
            if full:
                return  # what was closed for the new one is counted until the loop's next turn

    def _next(self) -> socket.socket | None:
        """Accept a connection; None where there is none, or none can be had now."""
        try:
            return self._sock.accept()[0]
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as fault:
            if fault.errno not in EXHAUSTED | _PASSING:
                raise
            if fault.errno in EXHAUSTED:
                _log.warning("no connection can be accepted: %s; idle ones are closed", fault.strerror)
                self._connections.close_idlest()
            self._pause()
            return None

    def _begun(self, start: _Start, _task: asyncio.Task[None]) -> None:
        self._connections.starts.discard(start)
        self._starts.discard(start)

    def _pause(self) -> None:
        """Leave new connections in the kernel's queue for a moment."""
        self._loop.remove_reader(self._sock)
        self._resumes = self._loop.call_later(_PAUSE_SECONDS, self._resume)

    def _resume(self) -> None:
        self._loop.add_reader(self._sock, self._accept)
        self._accept()  # of what waits already the loop tells nothing
