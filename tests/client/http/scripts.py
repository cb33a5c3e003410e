"""Bodies to send and scripts to answer them with, for the tests of this folder. Knows HTTP/1.1 as bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ema_client.http.body import Body
from ema_client.http.connection import Timeouts
from ema_client.http.retry import RetryPolicy

QUICK = RetryPolicy(attempts=3, base=0.01, cap=0.02)
ONCE = RetryPolicy(attempts=1)
TIMEOUTS = Timeouts(connect=5.0, transfer=5.0, expect=5.0)
#: More than is sent without asking.
LARGE = 8 << 20

Scripted = Callable[..., Any]


def body_of(raw: bytes, piece: int = 1 << 20) -> Body:
    return Body(len(raw), lambda: (memoryview(raw)[i : i + piece] for i in range(0, len(raw), piece)))


def ok(peer: Any) -> None:
    """Answers every request of the connection with an empty object."""
    while request := peer.request():
        if "expect" in request.headers:
            peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        peer.body(request.length)
        peer.answer(200, {})
