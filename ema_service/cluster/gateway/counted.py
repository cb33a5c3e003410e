"""The requests of a gateway, counted as they pass: how many, how long, how many bytes.

Knows ASGI. Does not know what a request asks for.
"""

from __future__ import annotations

import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ema_service.cluster.counting import GatewayMetrics

__all__ = ["Counted"]

#: Of a route's path, which kind of value a parameter has.
_CONVERTER = re.compile(r":\w+(?=})")
#: Methods that are labels of their own; HTTP lets a client make up as many as it likes.
_METHODS = frozenset({"GET", "HEAD", "DELETE", "PATCH", "POST", "PUT"})


class Counted:
    """ASGI middleware: counts a gateway's requests, their time and their bytes."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics, began, status = self._metrics, time.perf_counter(), 500

        async def take() -> Message:
            message = await receive()
            metrics.received.inc(len(message.get("body", b"")))
            return message

        async def answer(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            metrics.sent.inc(len(message.get("body", b"")))
            await send(message)

        try:
            await self._app(scope, take, answer)
        finally:
            self._tell(scope, status, time.perf_counter() - began)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = _CONVERTER.sub("", getattr(scope.get("route"), "path", "none"))
        self._metrics.requests.labels(method, route, str(status)).inc()
        if not (route.endswith("/events") or b"wait=" in scope["query_string"]):
            self._metrics.seconds.labels(method, route).observe(seconds)
