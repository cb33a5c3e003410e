"""What a host answers that its twin went on without: nothing of runs, for what it has of them is older.

Knows paths. Does not know when a host is left behind, or how it is filled.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from ema_client.errors import Overloaded
from ema_service.api.errors import problem_response

__all__ = ["LeftBehind"]

_RUNS = re.compile(r"/v1/runs(?:/([^/]+)|\Z)")


class LeftBehind:
    """ASGI middleware. check: raises Overloaded where nothing is answered of the run of a name, or of which runs there
    are (None), by what this server has. refused: told the code of each refusal."""

    def __init__(self, app: ASGIApp, check: Callable[[str | None], None], refused: Callable[[str], None]) -> None:
        self._app = app
        self._check = check
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = _RUNS.match(scope["path"]) if scope["type"] == "http" else None
        if found:
            try:
                self._check(found[1])
            except Overloaded as fault:
                self._refused(fault.code)
                # The body of a write is not read, and would be taken for the next request.
                await problem_response(fault, {"Connection": "close"})(scope, receive, send)
                return
        await self._app(scope, receive, send)
