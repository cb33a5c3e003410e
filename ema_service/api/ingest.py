"""Receives the body of a push straight from the socket into staging, and sends weights straight from memory.

uvicorn hands a body to its application through five copies (measured: 1.0 GB/s where the socket gives 3). Here the
connection itself is lent to the receiving of one body: once the headers are in, the transport reads into the staging
buffer (``asyncio.BufferedProtocol``), and then goes back to uvicorn for the answer and the next request. The
application sees this as an ASGI extension, ``scope["extensions"]["ema.fill"]``; under any other server, and for a
body of unannounced length, ``request.stream()`` does the same job slower.

While the bytes of a large body come faster than they are worked through, a thread of its own reads the socket: what it
has just received it averages at once, out of the core's cache, and the event loop is free for everyone else. Where
nothing comes for a moment the loop waits for more, so that a slow sender holds no thread. Likewise a thread writes
weights while they are taken as fast as it does (the extension ``ema.pour``); the rest is the loop's.

Knows transports, sockets, uvicorn's httptools protocol, and deadlines. Does not know what the bytes mean (a Body does)
or what becomes of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import ipaddress
import logging
import os
import select
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Literal

import httptools
from fastapi import Request
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ema_client.errors import EmaError, InvalidRequest, RequestTimeout
from ema_service.api.connection import LINGER_SECONDS, GuardedProtocol
from ema_service.bodies import Body
from ema_service.threads import Threads

__all__ = [
    "EXTENSION",
    "LINK",
    "FillingProtocol",
    "Lenders",
    "Link",
    "content_length",
    "link_of",
    "pour",
    "receive",
    "uvicorn_fits",
]

_log = logging.getLogger(__name__)

#: Name of the ASGI extension: ``await fill(body, length, silence)``, False where the body has to be streamed.
EXTENSION = "ema.fill"

#: Name of the ASGI extension: ``await pour(left, more, senders)``, see pour().
POUR = "ema.pour"

#: Name of the ASGI extension that says how the connection came: a Link.
LINK = "ema.link"

Link = Literal["Unix socket", "TCP on this host", "TCP"]

Fill = Callable[[Body, int, float, "Lenders"], Awaitable[bool]]
Pour = Callable[[memoryview, Iterator[memoryview], "Lenders"], Awaitable[tuple[int, memoryview]]]

#: Bytes a second that a sender keeps up on average, beyond a grace as long as the silence it is allowed. A trickle
#: would hold its staging for ever; other servers ask for 240 to 500, but of bodies that hold no gigabytes of memory.
MIN_BYTES_PER_SECOND = 16 << 10

#: What the kernel takes of an answer over a Unix socket before it is to wait for the reader; Linux gives no more than
#: net.core.wmem_max. With its default of 208 KiB the two take turns: 1 GiB pulled at 0.80 of the raw loop, so at 1.1.
UNIX_SEND_BYTES = 512 << 10

#: Bytes of a refused body are read and dropped into this.
_DISCARD_BYTES = 1 << 18

#: A thread reads the rest of a body that is at least so long, once so many bytes came at once; and writes such pieces.
_LONG_BYTES = 1 << 20
_BURST_BYTES = 64 << 10
#: It reads pieces of this: what is worked through next is still in the core's cache.
PIECE_BYTES = 256 << 10
#: It goes back to the event loop where nothing came for so many milliseconds.
_IDLE_MS = 20


class Lenders:
    """Threads that sockets are lent to, each one body at a time. On the event loop only.

    free: how many of them have none.
    """

    def __init__(self, threads: Threads, count: int) -> None:
        self._threads = threads
        self.free = count

    def lend(self, work: Callable[[], None]) -> asyncio.Future[None] | None:
        """Have a thread do ``work``; None where none is free."""
        if not self.free:
            return None
        self.free -= 1
        working = asyncio.get_running_loop().run_in_executor(self._threads, work)
        working.add_done_callback(self._give_back)
        return working

    def _give_back(self, _working: asyncio.Future[None]) -> None:
        self.free += 1


def content_length(request: Request) -> int | None:
    """The announced length of the body; None where it comes in chunks of unknown number. Raises InvalidRequest."""
    value = request.headers.get("content-length")
    if value is None:
        return None
    if not (value.isascii() and value.isdigit()):
        raise InvalidRequest(f"Content-Length: {value[:40]!r} is not a number of bytes")
    return int(value)


def link_of(request: Request) -> Link:
    """How the request came. "TCP" also where the ASGI server does not say."""
    link: Link = request.scope.get("extensions", {}).get(LINK, "TCP")
    return link


async def receive(request: Request, body: Body, receivers: Lenders, *, silence: float) -> None:
    """Fill ``body``, made for the announced length.

    silence: seconds the sender may stay silent. Raises what a Body raises, RequestTimeout, and ClientDisconnect where
    the sender went away.
    """
    length = content_length(request)
    fill: Fill | None = request.scope.get("extensions", {}).get(EXTENSION)
    if fill is None or length is None or not await fill(body, length, silence, receivers):
        await _stream(request, body, silence)
    body.finish()


async def _stream(request: Request, body: Body, silence: float) -> None:
    pace = _Pace(silence)
    try:
        async with asyncio.timeout_at(pace.deadline) as deadline:
            async for chunk in request.stream():
                if body.long_header:
                    await asyncio.to_thread(body.feed, chunk)
                else:
                    body.feed(chunk)
                pace.moved(len(chunk))
                deadline.reschedule(pace.deadline)
    except TimeoutError:
        raise pace.fault() from None


class _Pace:
    """How long a sender is waited for: ``silence`` seconds for its next byte, and for a minimum rate on average."""

    def __init__(self, silence: float) -> None:
        self._clock = asyncio.get_running_loop().time
        self._silence = silence
        self._begun = self._last = self._clock()
        self._received = 0

    def moved(self, count: int) -> None:
        if count:
            self._received += count
            self._last = self._clock()

    @property
    def deadline(self) -> float:
        """When it is given up unless more comes, in the event loop's time."""
        return min(self._last, self._begun + self._received / MIN_BYTES_PER_SECOND) + self._silence

    def fault(self) -> RequestTimeout:
        """Why it was given up."""
        if self._last + self._silence <= self._clock():
            return RequestTimeout(f"no byte of the body came for {self._silence:g} seconds")
        seconds = self._clock() - self._begun
        return RequestTimeout(
            f"{self._received} bytes of the body came in {seconds:.1f} seconds; "
            f"after the first {self._silence:g} it takes {MIN_BYTES_PER_SECOND} a second on average"
        )


async def pour(
    request: Request, left: memoryview, more: Iterator[memoryview], senders: Lenders
) -> tuple[int, memoryview]:
    """Send ``left``, and of ``more`` what the reader takes at once; the head of the answer must have been sent.

    Returns how many bytes were sent, and what is left of the last piece: it, and what ``more`` still has, is to be sent
    as any body is. Nothing is sent where a thread is of no use: for a small piece, under TLS or another ASGI server, or
    while the socket is full. Raises what ``more`` raises.
    """
    extension: Pour | None = request.scope.get("extensions", {}).get(POUR)
    return await extension(left, more, senders) if extension else (0, left)


def uvicorn_fits() -> bool:
    """Whether this uvicorn has what FillingProtocol relies on; if not, bodies take the slow path."""
    needed = {
        HttpToolsProtocol: (
            *("connection_made", "connection_lost", "data_received", "pause_writing", "resume_writing"),
            *("on_message_begin", "on_header", "on_headers_complete", "on_body", "on_message_complete"),
            *("on_response_complete", "send_400_response", "timeout_keep_alive_handler"),
        ),
        RequestResponseCycle: ("receive",),
        FlowControl: ("resume_reading",),
    }
    attributes = (
        *("self.parser", "self.flow", "self.transport", "self.cycle", "self.scope", "self.pipeline"),
        *("self.url", "self.app_state", "self.loop"),
    )
    source = inspect.getsource(HttpToolsProtocol)
    cycle = inspect.getsource(RequestResponseCycle)
    return (
        all(hasattr(cls, name) for cls, names in needed.items() for name in names)
        and all(name in source for name in attributes)
        and all(name in cycle for name in ("self.waiting_for_100_continue", "self.body", "self.more_body"))
        and "self.expected_content_length" in cycle
        and all(name in cycle for name in ("self.disconnected", "self.response_started", "self.response_complete"))
    )


class FillingProtocol(GuardedProtocol):
    """uvicorn's HTTP/1.1 protocol, offering the application to have a body received where it wants it."""

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
            # uvicorn would close with the last byte of the answer; what is unread of the body then turns the answer
            # into a reset before the client has read it.
            self._closes = self.cycle.keep_alive = True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._closes:
            self._closes = False
            delay = LINGER_SECONDS if self.cycle.more_body else 0.0
            self.loop.call_later(delay, self._close)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.extensions[EXTENSION] = functools.partial(self._fill, self.scope)
        self.extensions[POUR] = functools.partial(self._pour, self.scope)
        self.extensions[LINK] = self._link

    async def _fill(self, scope: object, body: Body, length: int, silence: float, receivers: Lenders) -> bool:
        """Receive the body of the request of ``scope``, ``length`` bytes in all, into ``body``.

        False, and nothing done, where another request has come in behind it: then its body is parsed already.
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
        filling = _Filling(self, body, length - len(parsed), _Pace(silence), receivers)
        if cycle.more_body:
            self.transport.set_protocol(filling)
            self.flow.resume_reading()
        filling.begin(parsed)
        await filling.wait()
        return True

    async def _pour(
        self, scope: object, left: memoryview, more: Iterator[memoryview], senders: Lenders
    ) -> tuple[int, memoryview]:
        cycle, transport = self.cycle, self.transport
        # Behind another request's answer, or what the transport has not sent yet, a thread would send too early.
        blocked = cycle.scope is not scope or cycle.disconnected or transport.get_write_buffer_size()
        if blocked or len(left) < _LONG_BYTES or transport.is_closing() or transport.get_extra_info("sslcontext"):
            return 0, left
        pouring = _Pouring(os.dup(transport.get_extra_info("socket").fileno()), left, more)
        working = senders.lend(pouring.run)
        if working is None:
            pouring.close()
            return 0, left
        try:
            await working
        finally:
            pouring.stopped = True
        cycle.expected_content_length -= pouring.sent
        return pouring.sent, pouring.left

    def take_back(self) -> None:
        """The body is over: uvicorn goes on with the connection, at the beginning of a message."""
        self.on_message_complete()
        self.parser = httptools.HttpRequestParser(self)
        with contextlib.suppress(AttributeError):  # as uvicorn does it, for httptools before 0.6.3
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.transport.set_protocol(self)


def _link(transport: asyncio.BaseTransport) -> Link:
    """By the socket, which no header of the request can talk over."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family == socket.AF_UNIX:
        return "Unix socket"
    try:
        peer = ipaddress.ip_address(transport.get_extra_info("peername")[0])
    except (TypeError, IndexError, ValueError):  # closed already, or no address of the internet
        return "TCP"
    mapped = getattr(peer, "ipv4_mapped", None) or peer
    return "TCP on this host" if mapped.is_loopback else "TCP"


class _Pouring:
    """Writes pieces to a socket, on a thread, while it takes them. Ends where they do, where the reader was full for
    a moment, or who awaits it gave up.

    The end of the connection is left for the event loop to find. sent: bytes; left: of the piece in hand.
    """

    def __init__(self, descriptor: int, left: memoryview, more: Iterator[memoryview]) -> None:
        self._descriptor = descriptor
        self._more = more
        self.left = left
        self.sent = 0
        self.stopped = False

    def close(self) -> None:
        os.close(self._descriptor)

    def run(self) -> None:
        """Raises what ``more`` raises."""
        try:
            room = select.poll()
            room.register(self._descriptor, select.POLLOUT)
            while not self.stopped and (self.left or self._next()):
                try:
                    count = os.write(self._descriptor, self.left)
                except BlockingIOError:
                    if not room.poll(_IDLE_MS):
                        return
                    continue
                except OSError:
                    return
                self.left = self.left[count:]
                self.sent += count
        finally:
            self.close()

    def _next(self) -> bool:
        self.left = next(self._more, memoryview(b""))
        return bool(self.left)


class _Filling(asyncio.BufferedProtocol):
    """Has the connection for the length of one body. Owned by the task that awaits wait(); fed by the event loop, or
    by a thread that is lent the socket meanwhile.

    After the body turned out wrong the rest of it is read and dropped, so that the sender reads the answer instead of a
    broken connection; uvicorn's keep-alive timeout ends that if the sender does not.
    """

    def __init__(self, http: FillingProtocol, body: Body, remaining: int, pace: _Pace, receivers: Lenders) -> None:
        self._http = http
        self._body = body
        self._remaining = remaining
        self._pace = pace
        self._receivers = receivers
        self._discarding: memoryview | None = None
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin(self, parsed: bytearray) -> None:
        """Take the part of the body that came along with the headers."""
        self._pace.moved(len(parsed))
        try:
            self._body.feed(parsed)
        except EmaError as fault:
            self._fail(fault)
        if not self._hand_over():
            self._finish_if_over()

    async def wait(self) -> None:
        """Return when the body is whole. Raises what a Body raises, RequestTimeout, ClientDisconnect."""
        clock = asyncio.get_running_loop().time
        try:
            while not self._done.done():
                if (left := self._pace.deadline - clock()) <= 0:
                    raise self._pace.fault()
                await asyncio.wait([self._done], timeout=left)
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
        self._pace.moved(nbytes)
        if self._discarding is None:
            try:
                self._body.advance(nbytes)
            except EmaError as fault:
                self._fail(fault)
            if self._body.unread:
                self._pause_for(asyncio.get_running_loop().run_in_executor(None, self._body.read_header))
                return
            if nbytes >= _BURST_BYTES and self._hand_over():
                return
        self._finish_if_over()

    def _pause_for(self, working: asyncio.Future[None]) -> None:
        """Read nothing of the socket here while a thread is at work."""
        self._http.flow.pause_reading()
        working.add_done_callback(self._resume)

    def _resume(self, working: asyncio.Future[None]) -> None:
        if fault := working.exception():
            self._fail(fault)
        if not self._http.transport.is_closing():
            self._http.flow.resume_reading()
            self._finish_if_over()

    def _hand_over(self) -> bool:
        """Let a thread read the socket, where that is worth it, there is one, and the bytes come as they are (no
        TLS)."""
        transport = self._http.transport
        if self._remaining < _LONG_BYTES or self._done.done() or transport.get_extra_info("sslcontext"):
            return False
        # The loop may close its descriptor meanwhile, and the system give the number to someone else.
        descriptor = os.dup(transport.get_extra_info("socket").fileno())
        working = self._receivers.lend(functools.partial(self._drain, descriptor))
        if working is None:
            os.close(descriptor)
            return False
        self._pause_for(working)
        return True

    def _drain(self, descriptor: int) -> None:
        """On a thread: receive and work while bytes come. Ends where the body does, or who awaits it gave up.

        The end of the connection is left for the event loop to find. Raises as Body.advance().
        """
        try:
            arrival = select.poll()
            arrival.register(descriptor, select.POLLIN)
            while self._remaining and not self._done.done() and (window := self._body.window()):
                try:
                    count = os.readv(descriptor, [window[: min(self._remaining, PIECE_BYTES)]])
                except BlockingIOError:
                    if not arrival.poll(_IDLE_MS):
                        return
                    continue
                except OSError:
                    return
                if not count:
                    return
                self._remaining -= count
                self._pace.moved(count)
                self._body.advance(count)
                self._body.read_header()
        finally:
            os.close(descriptor)

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

    def _fail(self, fault: BaseException) -> None:
        self._discard()
        if not self._done.done():
            self._done.set_exception(fault)

    def _discard(self) -> None:
        self._discarding = memoryview(bytearray(_DISCARD_BYTES))
