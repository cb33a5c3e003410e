"""Limits on bodies, applied before anything parses them.

A request may have a body where its route documents one, and nowhere else: what nobody reads would only fill memory.
FastAPI reads a whole JSON body into memory, whatever its size. So this layer reads the body first, up to the route's
limit (``x-max-bytes`` in the route's OpenAPI), and answers 413 beyond. All JSON that is held at one time shares one
budget. Bodies of weights pass through untouched: their route knows their exact length (filling). Encoded bodies are
refused whatever they hold: a kilobyte of gzip may be a gigabyte of zeros.

Knows ASGI messages, and what a route's OpenAPI says of its body. Does not know which routes there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ema_client.errors import (
    BodyTooLarge,
    EmaError,
    Overloaded,
    RequestTimeout,
    UnsupportedEncoding,
    UnsupportedMediaType,
)
from ema_service.api.errors import problem_response

__all__ = ["JSON_REFUSALS", "BodyLimits", "JsonBudget", "takes_json"]

#: Refusals of a JSON body, which its route may answer before it is called, for OpenAPI.
JSON_REFUSALS = (BodyTooLarge, RequestTimeout, UnsupportedMediaType, Overloaded)

#: The member of a route's OpenAPI that says how many bytes a JSON body of the route may have.
_MAX_BYTES = "x-max-bytes"
#: Methods whose requests have no body on any path. RFC 9110 gives such a body no meaning, and another reader of HTTP on
#: the way might take the body for the next request.
_BODILESS = frozenset({"GET", "HEAD", "DELETE", "OPTIONS", "TRACE"})

_TELLING = frozenset({b"content-length", b"transfer-encoding", b"content-encoding", b"content-type"})

#: A body of so few bytes is small, and finds room in the budget where large bodies have taken all that they may.
_SMALL_BYTES = 64 << 10
#: What the budget keeps for small bodies: sixteen of them, or hundreds of those that a change of a decay takes.
_KEPT_FOR_SMALL = 1 << 20
#: Retry-After of a body for which there is no room, in seconds: a body of the largest size takes less to be read.
_RETRY_SECONDS = 1.0


def takes_json(most: int, described: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The ``openapi_extra`` of a route whose JSON body may have ``most`` bytes.

    described: the body's OpenAPI, of a route that parses the body itself; else FastAPI adds it.
    """
    return {"requestBody": {**(described or {}), _MAX_BYTES: most}}


class JsonBudget:
    """The bytes of JSON bodies that may be held at one time. On the event loop only.

    in_use: bytes held now.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self.in_use = 0

    def share(self) -> _Share:
        """A body's share, to be used with ``with``: it grows with the body, and is given back at the end."""
        return _Share(self)

    def take(self, count: int, *, small: bool) -> None:
        """Count bytes as held. Raises Overloaded where there is no room for them."""
        if self.in_use + count > self._total - (0 if small else _KEPT_FOR_SMALL):
            raise Overloaded(
                f"{self.in_use} bytes of JSON are being received, of {self._total} that may be",
                hint="try again after Retry-After seconds",
                retry_after=_RETRY_SECONDS,
            )
        self.in_use += count


class _Share:
    """What one body has of a JsonBudget. size: bytes."""

    def __init__(self, budget: JsonBudget) -> None:
        self._budget = budget
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._budget.in_use -= self.size

    def grow(self, count: int) -> None:
        """Have ``count`` bytes more. Raises Overloaded."""
        self._budget.take(count, small=self.size + count <= _SMALL_BYTES)
        self.size += count


class BodyLimits:
    """ASGI middleware that refuses bodies where none is expected, encoded bodies, and JSON bodies that are too long,
    arrive too late, or are not sent as JSON.

    routes: of the application, as far as requests may have a body. silence: seconds in which all of a JSON body must
    arrive. refused: told the code of each refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Sequence[APIRoute],
        budget: JsonBudget,
        silence: float,
        refused: Callable[[str], None],
    ) -> None:
        self._app = app
        self._routes = [(route, _said_of(route)) for route in routes]
        self._budget = budget
        self._silence = silence
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        with self._budget.share() as share:
            try:
                _check_encoding(headers)
                if _has_body(headers) and (most := self._json_limit(scope)) is not None:
                    _check_type(headers)
                    receive = _replay(await self._read(_announced(headers), most, share, receive), receive)
            except EmaError as error:
                self._refused(error.code)
                # Closed after an answer to a body that nobody reads to its end: the rest would be read as the next
                # request. An encoded body is of a known length, or its chunks are: the connection goes on.
                closes = None if isinstance(error, UnsupportedEncoding) else {"Connection": "close"}
                await problem_response(error, closes)(scope, receive, send)
                return
            await self._app(scope, receive, send)

    def _json_limit(self, scope: Scope) -> int | None:
        """Most bytes of the request's JSON body; None for a body of weights, and where there is no such route, which
        reads nothing. Raises BodyTooLarge where the request may have no body."""
        if scope["method"] in _BODILESS:
            raise _unexpected(scope)
        for route, said in self._routes:
            if route.matches(scope)[0] is Match.FULL:
                if said is None:
                    raise _unexpected(scope)
                most: int | None = said.get(_MAX_BYTES)
                return most
        return None

    async def _read(self, announced: int, most: int, share: _Share, receive: Receive) -> list[Message]:
        """The messages of a JSON body. Raises BodyTooLarge, RequestTimeout, Overloaded."""
        if announced > most:
            raise _too_large(most)
        try:
            async with asyncio.timeout(self._silence):
                return await _read_all(most, share, receive)
        except TimeoutError:
            raise RequestTimeout(f"the JSON body did not come within {self._silence:g} seconds") from None


async def _read_all(most: int, share: _Share, receive: Receive) -> list[Message]:
    """The messages of a JSON body, however late. Raises BodyTooLarge, Overloaded."""
    messages: list[Message] = []
    while True:
        message = await receive()
        share.grow(len(message.get("body", b"")))
        if share.size > most:
            raise _too_large(most)
        messages.append(message)
        if not message.get("more_body", False):
            return messages


def _said_of(route: APIRoute) -> dict[str, Any] | None:
    """What a route's OpenAPI says of its body, None where the route takes none."""
    found: dict[str, Any] | None = (route.openapi_extra or {}).get("requestBody")
    return found


def _headers(scope: Scope) -> dict[bytes, bytes]:
    """The headers that tell of a body; two of one name are one list, as HTTP has it."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in _TELLING:
            found[name] = b", ".join(filter(None, (found.get(name), value.strip().lower())))
    return found


def _has_body(headers: dict[bytes, bytes]) -> bool:
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0").strip(b"0") != b""


def _announced(headers: dict[bytes, bytes]) -> int:
    """The Content-Length, 0 without one. uvicorn has refused any that is no number."""
    value = headers.get(b"content-length", b"")
    return int(value) if value.isdigit() else 0


def _check_encoding(headers: dict[bytes, bytes]) -> None:
    """Raises UnsupportedEncoding where the body is encoded in any way but HTTP's own chunks."""
    for name, plain in ((b"content-encoding", b"identity"), (b"transfer-encoding", b"chunked")):
        value = headers.get(name, plain)
        if value != plain:
            shown = f"{name.decode().title()}: {value[:40].decode('latin-1')}"
            raise UnsupportedEncoding(f"{shown}: bodies are taken as they are")


def _check_type(headers: dict[bytes, bytes]) -> None:
    """Raises UnsupportedMediaType unless the body is sent as JSON.

    A web page of a stranger can have a browser send text, a form or bytes of no type without asking; not JSON.
    """
    kind = headers.get(b"content-type", b"")
    if kind.partition(b";")[0].strip() != b"application/json":
        shown = f"as {kind[:40].decode('latin-1')}" if kind else "without a type"
        raise UnsupportedMediaType(f"the body was sent {shown}; this route takes JSON")


def _unexpected(scope: Scope) -> BodyTooLarge:
    hint = "send the request without a body"
    return BodyTooLarge(f"{scope['method']} {scope['path'][:200]} takes no body", hint=hint)


def _too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(f"the JSON body has more than {most} bytes", hint="send fewer or shorter fields")


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """A ``receive`` that gives these messages, and then goes on with ``receive``."""
    waiting = iter(messages)

    async def replayed() -> Message:
        for message in waiting:
            return message
        return await receive()

    return replayed
