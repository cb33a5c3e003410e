"""The short way of an update: past FastAPI, where the request's parameters are plainly right.

FastAPI's way finds, checks and converts parameters and checks the answer for 0.2 ms, a third of a push of 100 KB; an
update comes at every step of a training. Whatever is not plain goes FastAPI's way, to the same function, which also
says what is wrong with it and documents the route.

Knows how the parameters of an update are written. Does not know what becomes of an update (updates).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from fastapi import Request, Response
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from ema_client.protocol import HEADER_PUSH, HEADER_WRITER, KEY_PATTERN, MAX_STEP, NAME_PATTERN, UpdateResult
from ema_service.api.answers import json_bytes
from ema_service.api.context import Context

__all__ = ["DirectUpdates"]

_PATH = re.compile(rf"/v1/runs/(?P<run>{NAME_PATTERN.strip('^$')})/updates/(?P<step>0|[1-9][0-9]{{0,18}})\Z", re.ASCII)
_WRITER, _KEY = HEADER_WRITER.lower().encode(), HEADER_PUSH.lower().encode()
#: What each header of a push may be that says something of the push; another spelling is for FastAPI to refuse.
_SAID = {_WRITER: re.compile(rb"[1-9][0-9]{0,17}\Z"), _KEY: re.compile(KEY_PATTERN.strip("^$").encode() + rb"\Z")}

Push = Callable[[str, int, Request, Context, int | None, str | None], Awaitable[UpdateResult]]


class DirectUpdates(BaseRoute):
    """``PUT /v1/runs/{run}/updates/{step}``, for requests of which nothing is unusual; others match another route.

    push: applies the update of a run, step, request, server, writer and key.
    """

    def __init__(self, path: str, push: Push) -> None:
        self.path = path
        self._push = push

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] != "http" or scope["method"] != "PUT" or scope["query_string"] or scope.get("root_path"):
            return Match.NONE, {}
        found = _PATH.match(scope["path"])
        if not found or int(found["step"]) > MAX_STEP:
            return Match.NONE, {}
        said: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in _SAID:
                if name in said or not _SAID[name].match(value):
                    return Match.NONE, {}
                said[name] = value
        writer = int(said[_WRITER]) if _WRITER in said else None
        key = said[_KEY].decode() if _KEY in said else None
        params = {"run": found["run"], "step": int(found["step"]), "writer": writer, "key": key}
        return Match.FULL, {"route": self, "endpoint": self._push, "path_params": params}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what the push raises: the application's handlers answer errors."""
        request, params = Request(scope, receive, send), scope["path_params"]
        server: Context = scope["app"].state.context
        result = await self._push(params["run"], params["step"], request, server, params["writer"], params["key"])
        await Response(json_bytes(result), media_type="application/json")(scope, receive, send)
