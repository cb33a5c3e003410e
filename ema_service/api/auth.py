"""Who may do what: a request with a bearer token may do what the token's scopes and pattern of run names allow.

Knows tokens (ema_service.tokens has their file), methods and paths. Does not know runs, or what a route does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ema_client.errors import Forbidden, Unauthorized
from ema_service.api.errors import problem_response
from ema_service.tokens import SCOPES, Tokens, moment

__all__ = ["MORE_WITH_A_TOKEN", "Access", "Auth", "access_of", "needs_token"]

#: By scope, those that allow it.
_ALLOWED_BY = {
    "pull": {"pull", "train", "admin"},
    "snapshot": {"snapshot", "push", "train", "admin"},
    "push": {"push", "train", "admin"},
    "train": {"train", "admin"},
    "admin": {"admin"},
}

#: Paths that need no token, for their answers say nothing of any run: the pages (whose data need a token), and whether
#: the process lives. What a twin copies is asked for with another token, the cluster's.
_OPEN = re.compile(r"/(healthz|readyz|docs|openapi\.json|assets/.*|runs/[^/]+|v1/server|v1/twin/.*)?\Z")
#: Of these, the one that tells more to who has a token.
MORE_WITH_A_TOKEN = "/v1/server"
_RUN = re.compile(r"/v1/runs/([^/]+)")
_WRITER = re.compile(r"/v1/runs/[^/]+/writers/[^/]+\Z")
_SWEEPS = re.compile(r"/v1/runs/[^/]+/sweeps\Z")
_SNAPSHOT = re.compile(r"/v1/runs/[^/]+/snapshots/[^/]+\Z")


@dataclass(frozen=True, slots=True)
class Access:
    """What one request may do. runs: a pattern of run names."""

    scopes: frozenset[str]
    runs: str

    def may(self, scope: str, run: str | None) -> bool:
        """Whether the request may act with ``scope`` on ``run`` (None: on no run in particular)."""
        return bool(_ALLOWED_BY[scope] & self.scopes) and (run is None or fnmatchcase(run, self.runs))

    @property
    def all_scopes(self) -> list[str]:
        """Every scope that the request may act with, those that others include among them."""
        return [scope for scope in SCOPES if _ALLOWED_BY[scope] & self.scopes]

    def check(self, scope: str, run: str | None) -> None:
        """Raises Forbidden, naming scope and run, where the request may not act."""
        if not self.may(scope, run):
            where = "" if run is None else f" for run {run!r}"
            raise Forbidden(f"this token does not allow {scope!r}{where}")


#: The access of every request to a server without tokens, which listens on loopback only unless told otherwise.
EVERYTHING = Access(frozenset({"admin"}), "*")
#: The access of a request without a token to a server that has some.
_NOTHING = Access(frozenset(), "")


def access_of(request: Request) -> Access:
    """What the request may do, for routes that list runs, or whose run is named in the body."""
    access: Access = request.scope.get("ema.access", EVERYTHING)
    return access


class Auth:
    """ASGI middleware: a request without a token that allows it is answered 401 or 403, before its body is read."""

    def __init__(self, app: ASGIApp, tokens: Tokens, refused: Callable[[str], None]) -> None:
        self._app = app
        self._tokens = tokens
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope["ema.access"] = self._access(scope)
        except Unauthorized as error:
            self._refused(error.code)
            await problem_response(error, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        except Forbidden as error:
            self._refused(error.code)
            await problem_response(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _access(self, scope: Scope) -> Access:
        """What the request may do, its own path included. Raises Unauthorized, Forbidden."""
        method, path = scope["method"], scope["path"]
        if needs_token(method, path):
            access = self._of_token(scope)
            access.check(_needed(method, path), _run(path))
            return access
        sent = path == MORE_WITH_A_TOKEN and any(name == b"authorization" for name, _ in scope["headers"])
        return self._of_token(scope) if sent else _NOTHING

    def _of_token(self, scope: Scope) -> Access:
        """What the request's bearer token allows. Raises Unauthorized."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        kind, _, token = (values[0] if len(values) == 1 else b"").partition(b" ")
        if kind.lower() != b"bearer" or not token:
            raise Unauthorized("this server wants a bearer token")
        grant = self._tokens.find(token.strip())
        if grant is None:
            raise Unauthorized("this server does not know that token")
        if grant.expires is not None and grant.expired:
            raise Unauthorized(f"this token expired at {moment(grant.expires)}")
        return Access(grant.scopes, grant.runs)


def needs_token(method: str, path: str) -> bool:
    """Whether a server with a token file asks a request for a token."""
    return method not in ("GET", "HEAD") or not _OPEN.match(path)


def _needed(method: str, path: str) -> str:
    """The scope that a request needs."""
    if method in ("GET", "HEAD"):
        return "pull"
    if (method == "PUT" and _SNAPSHOT.match(path)) or (method == "POST" and _SWEEPS.match(path)):
        return "snapshot"
    if method == "DELETE" and not _WRITER.match(path):
        return "admin"
    return "push"


def _run(path: str) -> str | None:
    """The run named in a path, None where there is none."""
    found = _RUN.match(path)
    return found.group(1) if found else None
