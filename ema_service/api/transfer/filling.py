"""Receives the body of a push from the socket straight into the memory it is for.

uvicorn hands a body to its application through five copies (1.0 GB/s where the socket gives 3). Here the connection
itself is lent to the receiving of one body: once the headers are parsed, the transport reads into the staging buffer
(``asyncio.BufferedProtocol``), and then goes back to uvicorn for the answer and the next request. The application sees
an ASGI extension, ``scope["extensions"]["ema.fill"]``; under any other server, and for a body of unannounced length,
``request.stream()`` does the same job slower.

While the bytes of a large body arrive faster than they are averaged, a thread reads the socket: it averages each piece
at once, out of the core's cache, and the event loop is free for everyone else. Where nothing arrives for a moment the
thread returns the socket to the loop, so that a slow sender holds no thread.

Knows transports, sockets and deadlines. Does not know what the bytes mean (a Body does) or what becomes of them.
"""

from __future__ import annotations

import asyncio
import functools
import select
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

from fastapi import Request
from starlette.requests import ClientDisconnect

from ema_client.errors import EmaError, InvalidRequest, MalformedBody, RequestTimeout
from ema_service.api.transfer.socket_threads import SocketThreads
from ema_service.api.transfer.streams import Stream
from ema_service.bodies import Body

if TYPE_CHECKING:
    from ema_service.api.transfer.lending import LendingProtocol

__all__ = ["FILL", "Fill", "Filling", "Pace", "Work", "content_length", "receive", "receive_head"]

#: Name of the ASGI extension: ``await fill(body, work, length, silence, receivers)``. False where the body has to be
#: streamed.
FILL = "ema.fill"


class Work(Protocol):
    """Work on a body's bytes behind the receiving. arrived: Body.arrived, larger each time."""

    def here(self, arrived: int) -> None:
        """Do the work now, on the calling thread, which receives."""

    def elsewhere(self, arrived: int) -> None:
        """Have a thread do the work: called on the event loop."""


Fill = Callable[[Body, Work | None, int, float, SocketThreads], Awaitable[bool]]

#: Bytes a second that a sender must keep up on average, beyond a grace as long as the silence it is allowed. A trickle
#: would hold its staging for ever; other servers ask for 240 to 500, but of bodies that hold no gigabytes of memory.
MIN_BYTES_PER_SECOND = 16 << 10

#: The rest of a refused body is read into so many bytes, and dropped.
_DISCARDED_AT_ONCE = 1 << 18

#: A thread reads the rest of a body of at least so many bytes, once so many arrived at once.
_LONG_BYTES = 1 << 20
_BURST_BYTES = 64 << 10
#: Bytes that a thread receives at once, a piece of the pass: still in a cache when they are averaged.
RECEIVED_AT_ONCE = 1 << 20
#: A thread returns the socket to the event loop when nothing arrived for so many milliseconds.
_IDLE_MS = 20


def content_length(request: Request) -> int | None:
    """The announced length of the body; None where it comes in chunks of unknown number. Raises InvalidRequest."""
    value = request.headers.get("content-length")
    if value is None:
        return None
    if not (value.isascii() and value.isdigit()):
        raise InvalidRequest(f"Content-Length: {value[:40]!r} is not a number of bytes")
    return int(value)


async def receive(
    request: Request, body: Body, receivers: SocketThreads, *, silence: float, work: Work | None = None
) -> None:
    """Fill ``body``, made for the announced length, and finish it.

    work: done behind the receiving, with the bytes that have arrived. silence: seconds the sender may stay silent.
    Raises as a Body; RequestTimeout; ClientDisconnect where the sender went away.
    """
    length = content_length(request)
    fill: Fill | None = request.scope.get("extensions", {}).get(FILL)
    if fill is None or length is None or not await fill(body, work, length, silence, receivers):
        await _stream(request, body, work, silence)
    body.finish()


async def receive_head(request: Request, body: Body, *, silence: float) -> None:
    """Have a request's whole body as the header of ``body``, whose data come otherwise.

    Raises as receive(); MalformedBody where the request's body is not the header, all of it and nothing else.
    """
    length = content_length(request)
    await _stream(request, body, None, silence)
    if body.head_bytes != length:
        raise MalformedBody("a request whose tensors lie in shared memory has a body that is not their header alone")


async def _stream(request: Request, body: Body, work: Work | None, silence: float) -> None:
    """Receive the body chunk by chunk from ASGI's ``request.stream()``."""
    pace = Pace(silence)
    try:
        async with asyncio.timeout_at(pace.deadline) as deadline:
            async for chunk in request.stream():
                if body.long_header:
                    await asyncio.to_thread(body.feed, chunk)
                else:
                    body.feed(chunk)
                if work:
                    work.elsewhere(body.arrived)
                pace.moved(len(chunk))
                deadline.reschedule(pace.deadline)
    except TimeoutError:
        raise pace.fault() from None


class Pace:
    """How long a sender is waited for: ``silence`` seconds for its next byte, and for a minimum rate on average."""

    def __init__(self, silence: float) -> None:
        self._clock = asyncio.get_running_loop().time
        self._silence = silence
        self._begun = self._last = self._clock()
        self._received = 0

    def moved(self, count: int) -> None:
        """Note that ``count`` bytes arrived."""
        if count:
            self._received += count
            self._last = self._clock()

    @property
    def deadline(self) -> float:
        """When the sender is given up unless more bytes arrive, in the event loop's time."""
        return min(self._last, self._begun + self._received / MIN_BYTES_PER_SECOND) + self._silence

    def fault(self) -> RequestTimeout:
        """Why the sender was given up."""
        if self._last + self._silence <= self._clock():
            return RequestTimeout(f"no byte of the body came for {self._silence:g} seconds")
        seconds = self._clock() - self._begun
        return RequestTimeout(
            f"{self._received} bytes of the body came in {seconds:.1f} seconds; "
            f"after the first {self._silence:g} it takes {MIN_BYTES_PER_SECOND} a second on average"
        )


class Filling(asyncio.BufferedProtocol):
    """Receives one body in place of uvicorn's protocol. Owned by the task that awaits wait().

    Bytes are received by the event loop, or by a thread that the socket is lent to. After the body turned out wrong the
    rest is read and dropped, so that the sender reads the answer instead of a broken connection; uvicorn's keep-alive
    timeout ends that if the sender does not.
    """

    def __init__(
        self,
        http: LendingProtocol,
        body: Body,
        work: Work | None,
        remaining: int,
        pace: Pace,
        receivers: SocketThreads,
    ) -> None:
        self._http = http
        self._body = body
        self._work = work
        self._remaining = remaining
        self._pace = pace
        self._receivers = receivers
        self._discarding: memoryview | None = None
        self._working: asyncio.Future[None] | None = None
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        #: What wait() raises. Not kept in the future, nor beyond wait(): the traceback of a fault refers to this object
        #: and to the body, and a cycle would hold the body's memory until a garbage collection.
        self._fault: BaseException | None = None

    def begin(self, parsed: bytearray) -> None:
        """Take the part of the body that uvicorn read along with the headers."""
        self._pace.moved(len(parsed))
        try:
            self._body.feed(parsed)
            if self._work:
                self._work.elsewhere(self._body.arrived)
        except EmaError as fault:
            self._fail(fault)
        if not self._hand_over():
            self._finish_if_over()

    async def wait(self) -> None:
        """Return when the body is whole. Raises as a Body; RequestTimeout, ClientDisconnect.

        However the call ends, no thread receives into the body's memory any more.
        """
        clock = asyncio.get_running_loop().time
        try:
            while not self._done.done():
                if (left := self._pace.deadline - clock()) <= 0:
                    raise self._pace.fault()
                await asyncio.wait([self._done], timeout=left)
            if self._fault is not None:
                raise self._fault
        finally:
            self._done.cancel()  # nobody awaits the end any more
            if self._working and not self._working.done():
                await asyncio.wait([self._working])
            self._fault = self._working = None
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
                if self._work:
                    self._work.elsewhere(self._body.arrived)
            except EmaError as fault:
                self._fail(fault)
            if self._body.unread:
                self._pause_for(asyncio.get_running_loop().run_in_executor(None, self._body.read_header))
                return
            if nbytes >= _BURST_BYTES and self._hand_over():
                return
        self._finish_if_over()

    def _pause_for(self, working: asyncio.Future[None]) -> None:
        """Read nothing of the socket on the event loop while a thread is at work."""
        self._http.flow.pause_reading()
        self._working = working
        working.add_done_callback(self._resume)

    def _resume(self, working: asyncio.Future[None]) -> None:
        """Go on with the socket on the event loop: the thread has returned it."""
        if fault := working.exception():
            self._fail(fault)
        if not self._http.transport.is_closing():
            self._http.flow.resume_reading()
            self._finish_if_over()

    def _hand_over(self) -> bool:
        """Lend the socket to a thread, and say whether that was done.

        Not for a short rest of a body, or without a free thread.
        """
        if self._remaining < _LONG_BYTES or self._done.done() or not self._receivers.free:
            return False
        stream = self._http.lend()
        if stream is None:  # no descriptor is left: the event loop receives the body
            return False
        self._pause_for(self._receivers.lend(functools.partial(self._drain, stream)))
        return True

    def _drain(self, stream: Stream) -> None:
        """On a thread: receive and work while bytes arrive. Raises as Body.advance().

        Ends with the body, where nothing arrives, or where the waiting task gave up. The end of the connection is left
        for the event loop to find.
        """
        try:
            arrival = select.poll()
            arrival.register(stream, select.POLLIN)
            while self._remaining and not self._done.done() and (window := self._body.window()):
                try:
                    count = stream.read_into(window[: min(self._remaining, RECEIVED_AT_ONCE)])
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
                if self._work:
                    self._work.here(self._body.arrived)
        finally:
            stream.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._http.connection_lost(exc)
        self._end(ClientDisconnect())

    def pause_writing(self) -> None:
        self._http.pause_writing()

    def resume_writing(self) -> None:
        self._http.resume_writing()

    def _finish_if_over(self) -> None:
        """Give the connection back to uvicorn when the announced bytes have arrived."""
        if self._remaining == 0:
            if self._http.transport.get_protocol() is self:
                self._http.take_back()
            self._end(None)
        elif self._discarding is None and self._body.complete:
            # More bytes were announced than the data have: without this error the loop would fill an empty window for
            # ever.
            self._fail(self._body.surplus(self._remaining))

    def _fail(self, fault: BaseException) -> None:
        """Read and drop the rest of the body; wait() raises ``fault``."""
        self._discard()
        self._end(fault)

    def _end(self, fault: BaseException | None) -> None:
        """Have wait() raise ``fault``, or return."""
        if not self._done.done():
            self._fault = fault
            self._done.set_result(None)

    def _discard(self) -> None:
        self._discarding = memoryview(bytearray(_DISCARDED_AT_ONCE))
