"""A connection that lends itself: to the receiving of one body (filling), and to the sending of weights (pouring).

Knows uvicorn's httptools protocol, and at which of its calls a body begins and ends. Does not know what the bytes mean,
or what an application makes of a connection's Link.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import os
import socket
from collections.abc import Iterator
from typing import Literal

import httptools
from fastapi import Request
from starlette.requests import ClientDisconnect

from ema_service.api.transfer.connection import LINGER_SECONDS, GuardedProtocol
from ema_service.api.transfer.filling import FILL, Filling, Pace, Work
from ema_service.api.transfer.pouring import MIN_POURED_BYTES, POUR, Pouring
from ema_service.api.transfer.socket_threads import SocketThreads
from ema_service.api.transfer.streams import PlainStream, Stream
from ema_service.api.transfer.tls_transport import SecureTransport
from ema_service.bodies import Body

__all__ = ["LINK", "LendingProtocol", "Link", "link_of"]

#: Name of the ASGI extension that says how the client is connected: a Link.
LINK = "ema.link"

Link = Literal["Unix socket", "TCP on this host", "TCP"]

#: Bytes of an answer that the kernel takes over a Unix socket before the server waits for the reader; Linux gives no
#: more than net.core.wmem_max. With its default of 208 KiB, server and reader take turns: 1 GiB is pulled at 0.80 of
#: the raw loop's rate, with this at 1.1.
UNIX_SEND_BYTES = 512 << 10


def link_of(request: Request) -> Link:
    """How the client of a request is connected. "TCP" also where the ASGI server does not say."""
    link: Link = request.scope.get("extensions", {}).get(LINK, "TCP")
    return link


class LendingProtocol(GuardedProtocol):
    """uvicorn's HTTP/1.1 protocol, with two extensions: receive a body where the application wants it, send from its
    memory."""

    #: Whether the client asked for the connection to be closed after this answer.
    _closes = False
    _link: Link = "TCP"

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._link = _link(transport)
        if self._link == "Unix socket":
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SEND_BYTES)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.cycle.scope is self.scope and not self.cycle.keep_alive:
            # uvicorn would close with the last byte of the answer. The unread rest of the body would then turn the
            # answer into a reset before the client has read it.
            self._closes = self.cycle.keep_alive = True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._closes and self.cycle.response_complete:  # not that of a request sent ahead
            self._closes = False
            delay = LINGER_SECONDS if self.cycle.more_body else 0.0
            self.loop.call_later(delay, self._close)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.extensions[FILL] = functools.partial(self._fill, self.scope)
        self.extensions[POUR] = functools.partial(self._pour, self.scope)
        self.extensions[LINK] = self._link

    async def _fill(
        self, scope: object, body: Body, work: Work | None, length: int, silence: float, receivers: SocketThreads
    ) -> bool:
        """Receive the body of the request of ``scope``, ``length`` bytes in all, into ``body``.

        The extension ``ema.fill``.

        False, and nothing done, where another request has arrived behind it: then the body is parsed already.
        """
        cycle = self.cycle
        if cycle.scope is not scope:
            return False
        if cycle.disconnected or self.transport.is_closing():
            raise ClientDisconnect
        if cycle.waiting_for_100_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            cycle.waiting_for_100_continue = False
        parsed, cycle.body = cycle.body, bytearray()
        filling = Filling(self, body, work, length - len(parsed), Pace(silence), receivers)
        if cycle.more_body:
            self.transport.set_protocol(filling)
            self.flow.resume_reading()
        filling.begin(parsed)
        await filling.wait()
        return True

    async def _pour(
        self, scope: object, left: memoryview, more: Iterator[memoryview], senders: SocketThreads
    ) -> tuple[int, memoryview]:
        """Send weights from memory on a thread. The extension ``ema.pour``; see pouring.pour()."""
        cycle, transport = self.cycle, self.transport
        # A thread would send weights too early where another request's answer comes first, or the transport has bytes
        # left.
        blocked = cycle.scope is not scope or cycle.disconnected or transport.get_write_buffer_size()
        if blocked or len(left) < MIN_POURED_BYTES or transport.is_closing() or not senders.free:
            return 0, left
        stream = self.lend()
        if stream is None:  # no descriptor is left: the event loop sends
            return 0, left
        pouring = Pouring(stream, left, more)
        working = senders.lend(pouring.run)
        try:
            await working
        finally:
            pouring.stopped = True
        cycle.expected_content_length -= pouring.sent
        return pouring.sent, pouring.left

    def lend(self) -> Stream | None:
        """The connection for a thread; None where no descriptor is left, or the TLS is not one that can be lent."""
        if isinstance(self.transport, SecureTransport):
            return self.transport.lend()
        if self.transport.get_extra_info("sslcontext"):
            return None
        try:
            return PlainStream(os.dup(self.transport.get_extra_info("socket").fileno()))
        except OSError:
            return None

    def take_back(self) -> None:
        """Give the connection back to uvicorn, at the beginning of a message: the body is over."""
        self.on_message_complete()
        self.parser = httptools.HttpRequestParser(self)
        with contextlib.suppress(AttributeError):  # httptools before 0.6.3 has no such method
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.transport.set_protocol(self)


def _link(transport: asyncio.BaseTransport) -> Link:
    """How the client is connected, by the socket: no header of the request can claim otherwise."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family == socket.AF_UNIX:
        return "Unix socket"
    try:
        peer, own = (ipaddress.ip_address(transport.get_extra_info(end)[0]) for end in ("peername", "sockname"))
    except (TypeError, IndexError, ValueError):  # closed already, or no internet address
        return "TCP"
    mapped = getattr(peer, "ipv4_mapped", None) or peer
    # What comes in from elsewhere under an address of this machine the kernel drops.
    return "TCP on this host" if mapped.is_loopback or peer == own else "TCP"
