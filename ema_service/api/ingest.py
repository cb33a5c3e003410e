"""Receives the body of a push straight from the socket into staging.

uvicorn hands a body to its application through five copies (measured: 1.0 GB/s where the socket gives 3). Here the
connection itself is lent to the receiving of one body: once the headers are in, the transport reads into the staging
buffer (``asyncio.BufferedProtocol``), and then goes back to uvicorn for the answer and the next request. The
application sees this as an ASGI extension, ``scope["extensions"]["ema.fill"]``; under any other server, and for a
body of unannounced length, ``request.stream()`` does the same job slower.

Knows transports, uvicorn's httptools protocol, and deadlines. Does not know what the bytes mean (a Body does)
or what becomes of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import httptools
from fastapi import Request
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ema_client.errors import EmaError, InvalidRequest, RequestTimeout
from ema_service.runs import Body, Staged, UpdateBody

__all__ = ["EXTENSION", "FillingProtocol", "content_length", "receive", "receive_into", "uvicorn_fits"]

_log = logging.getLogger(__name__)

#: Name of the ASGI extension: ``await fill(body, length, silence)``, False where the body has to be streamed.
EXTENSION = "ema.fill"

Fill = Callable[[Body, int, float], Awaitable[bool]]

#: How long a client that asked for the connection to be closed gets to read the refusal of a body it is still sending.
LINGER_SECONDS = 2.0

#: Bytes of a refused body are read and dropped into this.
_DISCARD_BYTES = 1 << 18


def content_length(request: Request) -> int | None:
    """The announced length of the body; None where it comes in chunks of unknown number. Raises InvalidRequest."""
    value = request.headers.get("content-length")
    if value is None:
        return None
    if not (value.isascii() and value.isdigit()):
        raise InvalidRequest(f"Content-Length: {value[:40]!r} is not a number of bytes")
    return int(value)


async def receive(
    request: Request, staged: Staged, *, silence: float, on_data: Callable[[int], None] | None = None
) -> None:
    """Fill ``staged`` from the body.

    silence: seconds the sender may stay silent. on_data: as for UpdateBody. Raises what a Body raises,
    RequestTimeout, and ClientDisconnect where the sender went away.
    """
    await receive_into(request, UpdateBody(staged, content_length(request), on_data=on_data), silence=silence)


async def receive_into(request: Request, body: Body, *, silence: float) -> None:
    """Fill ``body``, made for the announced length. Raises as receive()."""
    length = content_length(request)
    fill: Fill | None = request.scope.get("extensions", {}).get(EXTENSION)
    if fill is None or length is None or not await fill(body, length, silence):
        await _stream(request, body, silence)
    body.finish()


async def _stream(request: Request, body: Body, silence: float) -> None:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(silence) as deadline:
            async for chunk in request.stream():
                body.feed(chunk)
                deadline.reschedule(loop.time() + silence)
    except TimeoutError:
        raise _too_slow(silence) from None


def _too_slow(silence: float) -> RequestTimeout:
    return RequestTimeout(f"no byte of the body came for {silence:g} seconds")


def uvicorn_fits() -> bool:
    """Whether this uvicorn has what FillingProtocol relies on; if not, bodies take the slow path."""
    needed = {
        HttpToolsProtocol: ("on_message_begin", "on_message_complete", "connection_lost", "data_received"),
        RequestResponseCycle: ("receive",),
    }
    attributes = ("self.parser", "self.flow", "self.transport", "self.cycle", "self.scope", "self.pipeline")
    source = inspect.getsource(HttpToolsProtocol)
    cycle = inspect.getsource(RequestResponseCycle)
    return (
        all(hasattr(cls, name) for cls, names in needed.items() for name in names)
        and all(name in source for name in attributes)
        and all(name in cycle for name in ("self.waiting_for_100_continue", "self.body", "self.more_body"))
    )


class FillingProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol, offering the application to have a body received where it wants it."""

    #: Whether the client asked for the connection to be closed after this answer.
    _closes = False

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.cycle.scope is self.scope and not self.cycle.keep_alive:
            # uvicorn would close with the last byte of the answer; what is unread of the body then turns the answer
            # into a reset before the client has read it.
            self._closes = self.cycle.keep_alive = True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._closes:
            delay = LINGER_SECONDS if self.cycle.more_body else 0.0
            self.loop.call_later(delay, self.transport.close)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        extensions: dict[str, Any] = {EXTENSION: functools.partial(self._fill, self.scope)}
        self.scope["extensions"] = extensions

    async def _fill(self, scope: object, body: Body, length: int, silence: float) -> bool:
        """Receive the body of the request of ``scope``, ``length`` bytes in all, into ``body``.

        False, and nothing done, where another request has come in behind it: then its body is parsed already.
        """
        cycle = self.cycle
        if cycle.scope is not scope:
            return False
        if cycle.waiting_for_100_continue and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            cycle.waiting_for_100_continue = False
        parsed, cycle.body = cycle.body, bytearray()
        filling = _Filling(self, body, length - len(parsed))
        if cycle.more_body and not cycle.disconnected:
            self.transport.set_protocol(filling)
            self.flow.resume_reading()
        elif cycle.disconnected:
            raise ClientDisconnect
        filling.begin(parsed)
        await filling.wait(silence)
        return True

    def take_back(self) -> None:
        """The body is over: uvicorn goes on with the connection, at the beginning of a message."""
        self.on_message_complete()
        self.parser = httptools.HttpRequestParser(self)
        with contextlib.suppress(AttributeError):  # as uvicorn does it, for httptools before 0.6.3
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.transport.set_protocol(self)


class _Filling(asyncio.BufferedProtocol):
    """Has the connection for the length of one body. Owned by the task that awaits wait(); fed by the event loop.

    After the body turned out wrong the rest of it is read and dropped, so that the sender reads the answer instead of a
    broken connection; uvicorn's keep-alive timeout ends that if the sender does not.
    """

    def __init__(self, http: FillingProtocol, body: Body, remaining: int) -> None:
        self._http = http
        self._body = body
        self._remaining = remaining
        self._received = 0
        self._discarding: memoryview | None = None
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin(self, parsed: bytearray) -> None:
        """Take the part of the body that came along with the headers."""
        try:
            self._body.feed(parsed)
        except EmaError as fault:
            self._fail(fault)
        self._finish_if_over()

    async def wait(self, silence: float) -> None:
        """Return when the body is whole. Raises what a Body raises, RequestTimeout, ClientDisconnect."""
        try:
            while not self._done.done():
                before = self._received
                await asyncio.wait([self._done], timeout=silence)
                if not self._done.done() and self._received == before:
                    raise _too_slow(silence)
            self._done.result()
        finally:
            self._done.cancel()  # nobody will ask again
            if self._remaining and self._discarding is None:
                self._discard()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the buffer is as large as the rest
        window = self._body.window() if self._discarding is None else self._discarding
        return window[: self._remaining]

    def buffer_updated(self, nbytes: int) -> None:
        self._remaining -= nbytes
        self._received += nbytes
        if self._discarding is None:
            try:
                self._body.advance(nbytes)
            except EmaError as fault:
                self._fail(fault)
        self._finish_if_over()

    def connection_lost(self, exc: Exception | None) -> None:
        self._http.connection_lost(exc)
        if not self._done.done():
            self._done.set_exception(ClientDisconnect())

    def pause_writing(self) -> None:
        self._http.pause_writing()

    def resume_writing(self) -> None:
        self._http.resume_writing()

    def _finish_if_over(self) -> None:
        if self._remaining == 0:
            if self._http.transport.get_protocol() is self:
                self._http.take_back()
            if not self._done.done():
                self._done.set_result(None)
        elif self._discarding is None and self._body.complete:
            # Never an endless loop on an empty window: what is announced beyond the data is not part of it.
            self._fail(self._body.surplus(self._remaining))

    def _fail(self, fault: EmaError) -> None:
        self._discard()
        if not self._done.done():
            self._done.set_exception(fault)

    def _discard(self) -> None:
        self._discarding = memoryview(bytearray(_DISCARD_BYTES))
