"""A limit on JSON bodies, applied before anything parses them.

FastAPI reads a whole JSON body into memory whatever its size. This layer reads it first, up to the limit, and
answers 413 beyond. Bodies of weights pass through untouched: their route knows their exact length (ingest).

Knows ASGI messages. Does not know routes, beyond what a weights body looks like in a request.
"""

from __future__ import annotations

import asyncio
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ema_client.errors import BodyTooLarge, RequestTimeout
from ema_service.api.errors import problem_response

__all__ = ["JsonLimit"]

_WEIGHTS_BODY = re.compile(r"/v1/runs/[^/]+/(weights(/parts/.+)?|updates/.+)\Z")


class JsonLimit:
    """ASGI middleware: a request body that is no weights body has at most ``limit`` bytes and comes
    within ``silence`` seconds."""

    def __init__(self, app: ASGIApp, limit: int, silence: float) -> None:
        self._app = app
        self._limit = limit
        self._silence = silence

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"] == "PUT" and _WEIGHTS_BODY.match(scope["path"])):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(_announced(scope), receive)
        except (BodyTooLarge, RequestTimeout) as error:
            await problem_response(error, {"Connection": "close"})(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, announced: int, receive: Receive) -> list[Message]:
        """The messages of the body. Raises BodyTooLarge, RequestTimeout."""
        if announced > self._limit:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._silence):
                return await self._read_all(receive)
        except TimeoutError:
            raise RequestTimeout(f"the JSON body did not come within {self._silence:g} seconds") from None

    async def _read_all(self, receive: Receive) -> list[Message]:
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


def _announced(scope: Scope) -> int:
    """The Content-Length, 0 without one. uvicorn has refused what is no number."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


def _replay(messages: list[Message], receive: Receive) -> Receive:
    waiting = iter(messages)

    async def replayed() -> Message:
        for message in waiting:
            return message
        return await receive()

    return replayed
