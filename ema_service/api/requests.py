"""Each request's id, its time, and what the log tells of it. The outermost layer: whatever is refused passes here.

A request may bring its id (``X-Request-Id``), so that a line here is found by a line of a proxy or a trainer; every
answer says it.

Knows ASGI, the log, and which routes wait by their nature. Does not know what a request asks for.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ema_service.api.tracing import Tracing
from ema_service.logs import ACCESS, Asked, within
from ema_service.metrics import Metrics

__all__ = ["REQUEST_ID", "Requests"]

_log = logging.getLogger(__name__)
_access = logging.getLogger(ACCESS)

REQUEST_ID = "X-Request-Id"
_HEADER = REQUEST_ID.lower().encode()
#: What may stand in an id. Others are not taken over: an id goes into log lines and an answer's head.
_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}\Z")
_READS = frozenset({"GET", "HEAD", "OPTIONS"})
#: Methods that are labels of their own; HTTP lets a client make up as many as it likes.
_METHODS = _READS | {"DELETE", "PATCH", "POST", "PUT"}
#: The label of requests that were refused before their route was found, or have none.
_NO_ROUTE = "none"
_EVENTS = "/v1/runs/{run}/events"


class Requests:
    """ASGI middleware: counts, times and traces requests, and logs writes that were refused, requests that took long,
    and with ``access`` each.

    slow: seconds beyond which a request is logged. Streams of events, and requests that wait for a step, take as long
    as they like.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None, *, slow: float, access: bool) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing
        self._slow = slow
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, began, status = Asked(_id(scope)), time.perf_counter(), 500
        within(request)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (_HEADER, request.id.encode())]}
            await send(message)

        with self._tracing.request(scope) if self._tracing else contextlib.nullcontext():
            try:
                await self._app(scope, receive, answer)
            finally:
                self._tell(scope, request, status, time.perf_counter() - began)

    def _tell(self, scope: Scope, request: Asked, status: int, seconds: float) -> None:
        method = scope["method"]
        route = getattr(scope.get("route"), "path", _NO_ROUTE)
        waits = route == _EVENTS or b"wait=" in scope["query_string"]
        self._metrics.answered(method if method in _METHODS else "other", route, status, None if waits else seconds)
        if self._tracing:
            self._tracing.answered(route, status, request.id)
        path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
        fields = {"method": method, "path": path, "status": status, "seconds": round(seconds, 6)}
        if self._access:
            peer = scope.get("client")
            fields["client"] = peer[0] if peer else ""
            _access.info("%s %s %d %.3f s", method, path, status, seconds, extra={"fields": fields})
        if request.fault and method not in _READS:
            level = logging.WARNING if status >= 500 else logging.INFO
            _log.log(level, "%s %s was refused: %s", method, path, request.fault, extra={"fields": fields})
        if seconds > self._slow and not waits:
            _log.warning(
                "%s %s took %.1f s, and was answered %d", method, path, seconds, status, extra={"fields": fields}
            )


def _id(scope: Scope) -> str:
    """The request's own id, where it brings one that can be taken over; else a new one."""
    for name, value in scope["headers"]:
        if name == _HEADER and _ID.match(value):
            return str(value.decode("ascii"))
    return secrets.token_hex(8)
