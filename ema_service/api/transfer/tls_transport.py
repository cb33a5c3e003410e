"""A connection under TLS that can be lent to a thread, keys and all.

asyncio's own TLS transport decrypts and encrypts on the event loop, for all connections: one core's work, however many
cores there are, and its keys cannot be lent. SecureTransport is as asyncio's towards the HTTP protocol above it. Below
it is a plain transport, beside it a tls_session.Session, which a thread may borrow with the socket. Meanwhile the event
loop reads nothing of the connection, keeps what it is asked to write, and closes the connection once it is back.

Knows transports and protocols of asyncio. Does not know HTTP, bodies, certificates, or how TLS works.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Callable
from typing import Any, cast

from ema_service.api.transfer.tls_session import SecureStream, Session, scratch

__all__ = ["SecureTransport", "accept_secure"]

#: Most plain bytes that a protocol without a buffer of its own is given at once. uvicorn stops reading at as many, so
#: the rest of a large body stays encrypted for the thread that receives the body.
_GIVEN_AT_ONCE = 64 << 10


async def accept_secure(
    sock: socket.socket, context: ssl.SSLContext, make: Callable[[], asyncio.Protocol], seconds: float
) -> None:
    """Begin a connection under TLS on an accepted socket; the protocol of ``make`` has it once the handshake is done.

    seconds: for the handshake. Raises OSError where the handshake fails, TimeoutError where it takes too long. Then,
    and where the calling task is cancelled, the connection is closed.
    """
    loop = asyncio.get_running_loop()
    below, connection = await loop.connect_accepted_socket(lambda: _Connection(context, make), sock)
    try:
        async with asyncio.timeout(seconds):
            await connection.begun
    finally:
        if not connection.runs:
            below.abort()


class SecureTransport(asyncio.Transport):
    """What an HTTP protocol has of a connection under TLS: asyncio's transport, and lend(). On the event loop only.

    More than twenty methods: most are those that asyncio asks of a transport.
    """

    def __init__(
        self, below: asyncio.Transport, session: Session, context: ssl.SSLContext, protocol: asyncio.Protocol
    ) -> None:
        super().__init__({"sslcontext": context, "ssl_object": session.tls})
        self._loop = asyncio.get_running_loop()
        self._below = below
        self._session = session
        self._protocol: asyncio.BaseProtocol = protocol
        self._paused = self._closing = self._aborted = self._lent = False
        #: Written while a thread had the session.
        self._kept: list[bytes] = []

    # --- lending

    def lend(self) -> SecureStream | None:
        """The connection for a thread, until that calls close(); None where the process has no descriptor left."""
        try:
            descriptor = os.dup(self.get_extra_info("socket").fileno())
        except OSError:
            return None
        self._lent = True
        self._below.pause_reading()
        return SecureStream(descriptor, self._session, self._given_back)

    def _given_back(self, stream: SecureStream) -> None:
        """On the thread, before the end of its work can be seen on the event loop."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and its connections with it
            self._loop.call_soon_threadsafe(self._take_back, stream)

    def _take_back(self, stream: SecureStream) -> None:
        self._lent = False
        if self._aborted or self._below.is_closing():
            self._below.abort()
            return
        self._below.write(stream.unsent)
        kept, self._kept = self._kept, []
        for data in kept:
            self._session.write(data)
        self._flush()
        if self._closing:
            self._end()
        elif not self._paused:
            self._go_on()

    # --- reading

    def arrived(self) -> None:
        """Give the protocol what the session has been fed with, until the protocol wants no more."""
        try:
            while not (self._paused or self._lent or self._closing) and self._deliver():
                pass
        except ssl.SSLError:  # no TLS, or altered on the way
            self._flush()  # the alert that says so
            self.abort()
            return
        if not self._lent:
            self._flush()

    def _deliver(self) -> bool:
        """Give the protocol one portion, and say whether there was any."""
        protocol = self._protocol
        if isinstance(protocol, asyncio.BufferedProtocol):
            if count := self._session.read_into(memoryview(protocol.get_buffer(-1))):
                protocol.buffer_updated(count)
        else:
            portion = scratch()[:_GIVEN_AT_ONCE]
            if count := self._session.read_into(portion):
                cast(asyncio.Protocol, protocol).data_received(bytes(portion[:count]))
        if not count and self._session.ended:
            self.close()
        return count > 0

    def is_reading(self) -> bool:
        return not (self._paused or self._closing)

    def pause_reading(self) -> None:
        self._paused = True
        self._below.pause_reading()

    def resume_reading(self) -> None:
        if not self._paused:
            return
        self._paused = False
        if not self._lent:
            self._go_on()

    def _go_on(self) -> None:
        self._below.resume_reading()
        self._loop.call_soon(self.arrived)  # of records read before, the socket tells nothing

    # --- writing

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self._closing:
            return
        if self._lent:
            self._kept.append(bytes(data))
            return
        self._session.write(data)
        self._flush()

    def _flush(self) -> None:
        if encrypted := self._session.take():
            self._below.write(encrypted)

    def get_write_buffer_size(self) -> int:
        return self._below.get_write_buffer_size() + sum(map(len, self._kept))

    # --- ending

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Close the connection when all that was written is sent, and a thread that has the connection is done."""
        if self._closing:
            return
        self._closing = True
        if not self._lent:
            self._end()

    def _end(self) -> None:
        self._session.end()
        self._flush()
        self._below.close()

    def abort(self) -> None:
        """Break the connection off; a thread that has it finds its end."""
        self._closing = True
        if self._lent:
            self._aborted = True
            with contextlib.suppress(OSError):  # the peer was quicker
                self.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        else:
            self._below.abort()

    def lost(self) -> None:
        """The plain connection has ended."""
        self._closing = True

    # --- asking

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        own = super().get_extra_info(name)
        return self._below.get_extra_info(name, default) if own is None else own

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol


class _Connection(asyncio.BufferedProtocol):
    """The protocol of the plain transport: the handshake, then what arrives for the SecureTransport.

    begun: done once the handshake is. runs: whether the protocol of ``make`` has the connection.
    """

    def __init__(self, context: ssl.SSLContext, make: Callable[[], asyncio.Protocol]) -> None:
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._context = context
        self._make = make
        self._session = Session(context)
        self._secure: SecureTransport | None = None

    @property
    def runs(self) -> bool:
        return self._secure is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._below = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - as much as has come
        return scratch()

    def buffer_updated(self, nbytes: int) -> None:
        self._session.feed(scratch()[:nbytes])
        if self._secure is None:
            self._shake_hands()
        if self._secure is not None:
            self._secure.arrived()

    def _shake_hands(self) -> None:
        try:
            done = self._session.handshake()
        except ssl.SSLError as fault:
            self._below.write(self._session.take())  # the alert that tells the client why
            self._finish(fault)
            return
        self._below.write(self._session.take())
        if done:
            protocol = self._make()
            self._secure = SecureTransport(self._below, self._session, self._context, protocol)
            protocol.connection_made(self._secure)
            self._finish(None)

    def _finish(self, fault: Exception | None) -> None:
        """Wake who waits for the handshake."""
        if self.begun.done():
            return
        if fault:
            self.begun.set_exception(fault)
        else:
            self.begun.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._secure is None:
            self._finish(exc or ConnectionResetError("closed within the TLS handshake"))
        else:
            self._secure.lost()
            cast(asyncio.Protocol, self._secure.get_protocol()).connection_lost(exc)

    def pause_writing(self) -> None:
        if self._secure is not None:
            self._secure.get_protocol().pause_writing()

    def resume_writing(self) -> None:
        if self._secure is not None:
            self._secure.get_protocol().resume_writing()
