"""Receives the body of a push into staging.

Knows the request's byte stream and a deadline. Does not know what the bytes mean (UpdateBody does) or what becomes
of them.
"""

from __future__ import annotations

import asyncio

from fastapi import Request

from ema_client.errors import InvalidRequest, RequestTimeout
from ema_service.runs import Staged, UpdateBody

__all__ = ["content_length", "receive"]


def content_length(request: Request) -> int | None:
    """The announced length of the body; None where it comes in chunks of unknown number. Raises InvalidRequest."""
    value = request.headers.get("content-length")
    if value is None:
        return None
    if not (value.isascii() and value.isdigit()):
        raise InvalidRequest(f"Content-Length: {value[:40]!r} is not a number of bytes")
    return int(value)


async def receive(request: Request, staged: Staged, *, silence: float) -> bytes:
    """Fill ``staged`` from the body and return its digest.

    silence: seconds the sender may stay silent. Raises what UpdateBody raises, RequestTimeout, and ClientDisconnect
    where the sender went away.
    """
    body = UpdateBody(staged, content_length(request))
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(silence) as deadline:
            async for chunk in request.stream():
                body.feed(chunk)
                deadline.reschedule(loop.time() + silence)
    except TimeoutError:
        raise RequestTimeout(f"no byte of the body came for {silence:g} seconds") from None
    return body.finish()
