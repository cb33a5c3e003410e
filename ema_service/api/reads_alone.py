"""What a replica answers: reads of the versions that it holds. All else is the original's, and refused with its URL.

Knows methods, paths and queries. Does not know runs, or how a replica follows its original.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import parse_qsl

from starlette.types import ASGIApp, Receive, Scope, Send

from ema_client.errors import ReadOnlyReplica
from ema_service.api.errors import problem_response

__all__ = ["ReadsAlone"]

_READS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
#: Of a run, what follows from its newest version; everything on disk, measured or staged is at the original alone.
_HELD = re.compile(r"/v1/runs(/[^/]+(/(layout|version|weights|events))?)?\Z")
#: Of a query for weights, what asks for others than those of a version.
_WORKED_OUT = frozenset({"soup", "sigma_rel", "decay", "half_life", "window"})


class ReadsAlone:
    """ASGI middleware. original: of a replica, the URL of its original, empty while that is not known; None where the
    server is no replica, and everything goes on to the routes. refused: told the code of each refusal."""

    def __init__(self, app: ASGIApp, original: Callable[[], str | None], refused: Callable[[str], None]) -> None:
        self._app = app
        self._original = original
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        original = self._original() if scope["type"] == "http" else None
        if original is None or _is_held(scope["method"], scope["path"], scope["query_string"]):
            await self._app(scope, receive, send)
            return
        self._refused(ReadOnlyReplica.code)
        error = ReadOnlyReplica(
            f"this server is a replica of {original or 'another, which is not there yet'}: "
            f"{scope['method']} {scope['path'][:200]} is the original's to answer"
        )
        # The body of a write is not read, and would be taken for the next request.
        headers = {} if scope["method"] in _READS else {"Connection": "close"}
        await problem_response(error, headers)(scope, receive, send)


def _is_held(method: str, path: str, query: bytes) -> bool:
    """Whether a request is for what a replica has."""
    if method not in _READS:
        return False
    if not path.startswith("/v1/runs"):
        return True
    asked = {name for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True)}
    return bool(_HELD.match(path)) and not asked & _WORKED_OUT
