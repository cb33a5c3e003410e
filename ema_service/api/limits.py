"""Limits on bodies, applied before anything parses them.

FastAPI reads a whole JSON body into memory, whatever its size. So this layer reads the body first, up to the limit, and
answers 413 beyond. Bodies of weights pass through untouched: their route knows their exact length (filling). Encoded
bodies are refused whatever they hold: a kilobyte of gzip may be a gigabyte of zeros.

Knows ASGI messages. Does not know routes, beyond what a weights body looks like in a request.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ema_client.errors import BodyTooLarge, EmaError, RequestTimeout, UnsupportedEncoding
from ema_service.api.errors import problem_response

__all__ = ["JSON_REFUSALS", "BodyLimits"]

#: Refusals of a JSON body, which its route may answer before it is called, for OpenAPI.
JSON_REFUSALS = (BodyTooLarge, RequestTimeout)

_WEIGHTS_BODY = re.compile(r"/v1/runs/[^/]+/(weights(/parts/.+)?|updates/.+)\Z")


class BodyLimits:
    """ASGI middleware that refuses encoded bodies, and JSON bodies that are too long or arrive too late.

    limit: most bytes of a JSON body. silence: seconds in which all of it must arrive. refused: told the code of each
    refusal.
    """

    def __init__(self, app: ASGIApp, limit: int, silence: float, refused: Callable[[str], None]) -> None:
        self._app = app
        self._refused = refused
        self._limit = limit
        self._silence = silence

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            _check_encoding(scope)
            if not (scope["method"] == "PUT" and _WEIGHTS_BODY.match(scope["path"])):
                receive = _replay(await self._read(_announced(scope), receive), receive)
        except EmaError as error:
            self._refused(error.code)
            # After a body that is too long or late, close: the rest would be read as the next request. An encoded body
            # is either of a known length or unread by anyone, so the connection goes on.
            headers = None if isinstance(error, UnsupportedEncoding) else {"Connection": "close"}
            await problem_response(error, headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _read(self, announced: int, receive: Receive) -> list[Message]:
        """The messages of a JSON body. Raises BodyTooLarge, RequestTimeout."""
        if announced > self._limit:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._silence):
                return await self._read_all(receive)
        except TimeoutError:
            raise RequestTimeout(f"the JSON body did not come within {self._silence:g} seconds") from None

    async def _read_all(self, receive: Receive) -> list[Message]:
        """The messages of a JSON body, however late. Raises BodyTooLarge."""
        messages: list[Message] = []
        size = 0
        while True:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > self._limit:
                raise self._too_large()
            if not message.get("more_body", False):
                return messages

    def _too_large(self) -> BodyTooLarge:
        hint = "send fewer or shorter fields"
        return BodyTooLarge(f"the JSON body has more than {self._limit} bytes", hint=hint)


def _check_encoding(scope: Scope) -> None:
    """Raises UnsupportedEncoding where the body is encoded in any way but HTTP's own chunks."""
    for name, value in scope["headers"]:
        plain = {b"content-encoding": b"identity", b"transfer-encoding": b"chunked"}.get(name)
        if plain and value.strip().lower() != plain:
            shown = f"{name.decode().title()}: {value[:40].decode('latin-1')}"
            raise UnsupportedEncoding(f"{shown}: bodies are taken as they are")


def _announced(scope: Scope) -> int:
    """The Content-Length, 0 without one. uvicorn has refused any that is no number."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """A ``receive`` that gives these messages, and then goes on with ``receive``."""
    waiting = iter(messages)

    async def replayed() -> Message:
        for message in waiting:
            return message
        return await receive()

    return replayed
