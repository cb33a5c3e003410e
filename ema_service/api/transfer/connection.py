"""A connection of a stranger: bounded heads, bounded patience, and refusals in the one shape of errors.

uvicorn alone sets no such bounds: a head may grow, or trickle in, for ever; an answer that nobody reads keeps its
memory for ever; bytes that are no HTTP are answered in plain text; what else a request may be taken for does not
matter. ``GuardedProtocol`` is uvicorn's protocol with these bounds.

Knows uvicorn's httptools protocol, transports and timers. Does not know routes, bodies of weights (filling),
or what makes a request ambiguous (framing).
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ema_client.errors import PROBLEM_JSON, BadRequest, EmaError, HeadTooLarge, RequestTimeout
from ema_service.api.transfer.accepting import KEPT, SILENT, UNREAD
from ema_service.api.transfer.framing import ambiguity, is_plain

__all__ = ["LINGER_SECONDS", "MAX_HEAD_BYTES", "STATE", "Guard", "GuardedProtocol", "on_lost"]

_log = logging.getLogger(__name__)

#: The key under which the application leaves its Guard for the connections, in ASGI's lifespan state.
STATE = "ema.guard"

#: Name of the ASGI extension: a set of functions that are called when the request's connection is lost.
_LOST = "ema.lost"

#: Most bytes of request line and header fields together, and of trailers; h11 allows as many.
MAX_HEAD_BYTES = 64 << 10

#: Seconds that the first byte may take. A client connects when it has something to say.
FIRST_BYTE_SECONDS = 10.0

#: Seconds that a reader may take nothing before its connection may be closed for another one.
_SPARED_SECONDS = 2.0

#: Seconds that a refused sender, still sending, gets to read the refusal.
LINGER_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Guard:
    """What an application asks of its connections.

    patience: seconds that a head may take to arrive, and that a reader may take for the bytes last given to its socket
    (1 MiB of weights). refused: told the code of each request refused here. cut: told of each reader cut off.
    """

    patience: float = 60.0
    refused: Callable[[str], None] = lambda code: None  # noqa: ARG005 - a function that does nothing
    cut: Callable[[], None] = lambda: None


@contextlib.contextmanager
def on_lost(request: Request, callback: Callable[[], None]) -> Iterator[None]:
    """Have ``callback`` called, on the event loop, if the client goes away within the block."""
    watchers: set[Callable[[], None]] = request.scope.get("extensions", {}).get(_LOST, set())
    watchers.add(callback)
    try:
        yield
    finally:
        watchers.discard(callback)


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol among strangers.

    More than twenty methods: most are callbacks of uvicorn's class, each with a bound before or behind it.
    More than a dozen attributes: what bounds the head, the request and the reader, and a timer for each.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._guard: Guard = self.app_state.get(STATE) or Guard()
        self._watchers: set[Callable[[], None]] = set()
        self._fault: EmaError | None = None
        self._refused = False
        self._stalled: asyncio.TimerHandle | None = None
        self._closing: asyncio.TimerHandle | None = None
        #: Bytes that the parser has not made a whole head or a piece of a body of yet; and bytes of the header fields
        #: found.
        self._unparsed = self._fields = 0
        self._in_head = True
        #: Whether the request being received is the connection's last, and whether that one is over: then nothing more
        #: is read.
        self._last = self._over = False
        #: When bytes last came, or an answer was sent; and when the client stopped taking what is sent.
        self._moved = self.loop.time()
        self._unread_since: float | None = None
        first = min(FIRST_BYTE_SECONDS, self._guard.patience)
        self._head_timer: asyncio.TimerHandle | None = self.loop.call_later(first, self._first_byte_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._stalled, self._closing):
            if timer:
                timer.cancel()
        super().connection_lost(exc)
        for callback in tuple(self._watchers):
            callback()

    # --- what comes in

    def data_received(self, data: bytes) -> None:
        if self._refused or self._over:
            return
        self._unparsed += len(data)
        self._moved = self.loop.time()
        super().data_received(data)
        if self._unparsed > MAX_HEAD_BYTES and not self._refused:
            self._refuse(_too_large())
        elif self._in_head and self._unparsed and self._head_timer is None:
            self._head_timer = self._later(self._head_is_late)

    def on_message_begin(self) -> None:
        if self._over:
            raise BadRequest("the connection was to be closed after the request before")
        super().on_message_begin()
        self._fields = 0
        self.extensions: dict[str, Any] = {_LOST: self._watchers}
        self.scope["extensions"] = self.extensions

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += len(name) + len(value)
        if self._fields + len(self.url) > MAX_HEAD_BYTES:
            self._fault = _too_large()
            raise self._fault  # the parser reports an error, and calls send_400_response()
        if self._in_head:  # behind a chunked body come trailers: who checked the head has not seen them
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._unparsed = False, 0
        if self._head_timer:
            self._head_timer.cancel()
            self._head_timer = None
        version, upgrades = self.parser.get_http_version(), self.parser.should_upgrade()
        if reason := ambiguity(self.parser.get_method(), self.url, version, self.headers, upgrades=upgrades):
            self._fault = BadRequest(reason)
            raise self._fault
        super().on_headers_complete()
        self._last = not (self.cycle.keep_alive and is_plain(version, self.headers, upgrades=upgrades))
        self.cycle.keep_alive = not self._last

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head, self._unparsed, self._over = True, 0, self._last
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's text says less than ours
        if self._over:
            return
        self._refuse(self._fault or BadRequest("the request cannot be read as HTTP/1.1"))

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: who asks for another protocol is answered in this one, and no line of the log is a stranger's."""

    def _first_byte_is_late(self) -> None:
        """Close a connection on which nothing came; wait on for a head that has begun."""
        rest = self._guard.patience - FIRST_BYTE_SECONDS
        if self._unparsed and rest > 0:
            self._head_timer = self.loop.call_later(rest, self._head_is_late)
        else:
            self._head_is_late()

    def _head_is_late(self) -> None:
        """Refuse a head that has begun and is not complete; close a connection on which none has begun."""
        self._head_timer = None
        if self._unparsed:
            self._refuse(RequestTimeout(f"the request's head did not come within {self._guard.patience:g} seconds"))
        else:
            self.transport.close()

    def _refuse(self, fault: EmaError) -> None:
        """Answer a request that the application could not answer, listen to no more, and close the connection."""
        self._refused = True
        self._guard.refused(fault.code)
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request
        unanswered = cycle if cycle is not None and not cycle.response_complete else None
        if self.pipeline or (unanswered and unanswered.response_started):
            self._close()  # the refusal would stand in the middle of another answer
            return
        if unanswered:
            unanswered.disconnected = True  # the application's own answer is not sent any more
            unanswered.message_event.set()
        self.transport.write(_plain_answer(fault))
        # The rest is read and dropped for a while: closing at once would reset the connection before the answer is
        # read.
        self.flow.resume_reading()
        self._closing = self.loop.call_later(LINGER_SECONDS, self._close)

    # --- what goes out

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_since = self.loop.time()
        self._stalled = self._stalled or self._later(self._cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread_since = None
        if self._stalled:
            self._stalled.cancel()
            self._stalled = None

    def on_response_complete(self) -> None:
        self._moved = self.loop.time()
        super().on_response_complete()
        if self.transport.is_closing():
            self._close()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def _unset_keepalive_if_required(self) -> None:
        """As uvicorn does when bytes come; not for the rest of a body that was refused, which may come for ever."""
        if self._in_head or not self.cycle.response_complete:
            super()._unset_keepalive_if_required()

    # --- idleness

    @property
    def idle_since(self) -> tuple[int, float] | None:
        """As Idling.idle_since."""
        if self.transport.is_closing():
            return None
        if self._unread_since is not None:
            spared = self.loop.time() - self._unread_since < _SPARED_SECONDS
            return None if spared else (UNREAD, self._unread_since)
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request
        if cycle is None:
            return SILENT, self._moved
        return (KEPT, self._moved) if cycle.response_complete and not self.pipeline else None

    def give_up(self) -> None:
        """Close the connection for another one; what the client does not take is dropped."""
        self.transport.abort()

    def _cut(self) -> None:
        """Break the connection of a reader that took too little for too long."""
        _log.info("a reader took nothing, or too little, for %g seconds and is cut off", self._guard.patience)
        self._guard.cut()
        self.transport.abort()

    def _close(self) -> None:
        """Close once everything is sent; bytes that the reader does not take in time are dropped."""
        if not self.transport.is_closing():
            self.transport.close()
        if self._closing:
            self._closing.cancel()
        self._closing = self._later(self.transport.abort)

    def _later(self, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Have ``callback`` called when the guard's patience is over."""
        return self.loop.call_later(self._guard.patience, callback)


def _plain_answer(fault: EmaError) -> bytes:
    """The whole answer with an error, head and body."""
    body = json.dumps(fault.to_problem()).encode()
    lines = [
        f"HTTP/1.1 {fault.status} {http.HTTPStatus(fault.status).phrase}",
        f"content-type: {PROBLEM_JSON}",
        f"content-length: {len(body)}",
        "connection: close",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _too_large() -> HeadTooLarge:
    return HeadTooLarge(f"the request line and header fields have more than {MAX_HEAD_BYTES} bytes")
