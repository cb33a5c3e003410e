"""Who may do what: bearer tokens, each with scopes and a pattern of run names.

A token file has a line for each token: the SHA-256 of the token, its scopes, its pattern, and then a remark for whoever
reads the file. The token itself is printed once, by ``ema-service token create``, and stored nowhere::

    # sha256 of the token                      scopes      runs
    9f86d081884c7d659a2feaa0c55ad015a3bf4f1b…  push,pull   cogview*    the cluster's trainers

Scopes: ``pull`` reads; ``snapshot`` takes snapshots; ``push`` creates runs, pushes, takes snapshots, and steers the
decay; ``admin`` may do everything, deleting included.

Knows tokens, methods and paths. Does not know runs, or what a route does. Neither tokens nor their hashes are ever
logged.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ema_client.errors import Forbidden, Unauthorized
from ema_service.api.errors import problem_response

__all__ = [
    "SCOPES",
    "Access",
    "Auth",
    "Grant",
    "TokenFileError",
    "access_of",
    "create_token",
    "needs_token",
    "read_token_file",
]

SCOPES = ("push", "pull", "snapshot", "admin")
#: By scope, the others that allow the same.
_INCLUDED_IN = {"pull": {"admin"}, "push": {"admin"}, "snapshot": {"push", "admin"}, "admin": set[str]()}

#: Paths that need no token, for their answers say nothing of any run: the pages (whose data need a token), and whether
#: the process lives.
_OPEN = re.compile(r"/(healthz|readyz|docs|openapi\.json|assets/.*)?\Z")
_RUN = re.compile(r"/v1/runs/([^/]+)")
_SNAPSHOT = re.compile(r"/v1/runs/[^/]+/snapshots/[^/]+\Z")
_HASH = re.compile(r"[0-9a-f]{64}\Z")


class TokenFileError(ValueError):
    """A line of the token file cannot be read."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What one token allows. digest: the SHA-256 of the token. runs: a pattern of run names."""

    digest: bytes
    scopes: frozenset[str]
    runs: str


@dataclass(frozen=True, slots=True)
class Access:
    """What one request may do. runs: a pattern of run names."""

    scopes: frozenset[str]
    runs: str

    def may(self, scope: str, run: str | None) -> bool:
        """Whether the request may act with ``scope`` on ``run`` (None: on no run in particular)."""
        return bool(({scope} | _INCLUDED_IN[scope]) & self.scopes) and (run is None or fnmatchcase(run, self.runs))

    def check(self, scope: str, run: str | None) -> None:
        """Raises Forbidden, naming scope and run, where the request may not act."""
        if not self.may(scope, run):
            where = "" if run is None else f" for run {run!r}"
            raise Forbidden(f"this token does not allow {scope!r}{where}")


#: The access of every request to a server without tokens, which listens on loopback only unless told otherwise.
EVERYTHING = Access(frozenset({"admin"}), "*")


def access_of(request: Request) -> Access:
    """What the request may do, for routes that list runs, or whose run is named in the body."""
    access: Access = request.scope.get("ema.access", EVERYTHING)
    return access


def read_token_file(path: Path) -> tuple[Grant, ...]:
    """The grants of a token file. Raises OSError, or TokenFileError naming the line."""
    grants = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            grants.append(_grant(line.split(), f"{path}, line {number}"))
    if not grants:
        raise TokenFileError(f"{path} has no token: make one with `ema-service token create`")
    return tuple(grants)


def create_token(path: Path, scopes: Collection[str], runs: str) -> str:
    """Make a token, append its line to ``path`` (a new file gets mode 0600), and return the token, which cannot be had
    again.

    Raises TokenFileError for an unknown scope or a pattern with white space, OSError.
    """
    token = secrets.token_urlsafe(32)
    words = [_digest(token).hex(), ",".join(scopes), runs]
    _grant(words if runs == "".join(runs.split()) else words[:2], "the new token")
    path.touch(mode=0o600)
    with path.open("a") as file:
        file.write(" ".join(words) + "\n")
    return token


class Auth:
    """ASGI middleware: a request without a token that allows it is answered 401 or 403, before its body is read."""

    def __init__(self, app: ASGIApp, grants: tuple[Grant, ...], refused: Callable[[str], None]) -> None:
        self._app = app
        self._grants = grants
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not needs_token(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        try:
            access = scope["ema.access"] = self._access(scope)
            access.check(_needed(scope["method"], scope["path"]), _run(scope["path"]))
        except Unauthorized as error:
            self._refused(error.code)
            await problem_response(error, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        except Forbidden as error:
            self._refused(error.code)
            await problem_response(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _access(self, scope: Scope) -> Access:
        """What the request's bearer token allows. Raises Unauthorized.

        Every grant is compared, each in constant time: the time of an answer tells nothing of a token.
        """
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        kind, _, token = (values[0] if len(values) == 1 else b"").partition(b" ")
        if kind.lower() != b"bearer" or not token:
            raise Unauthorized("this server wants a bearer token")
        digest = hashlib.sha256(token.strip()).digest()
        found = [grant for grant in self._grants if hmac.compare_digest(grant.digest, digest)]
        if not found:
            raise Unauthorized("this server does not know that token")
        return Access(found[0].scopes, found[0].runs)


def needs_token(method: str, path: str) -> bool:
    """Whether a server with a token file asks a request for a token."""
    return method not in ("GET", "HEAD") or not _OPEN.match(path)


def _needed(method: str, path: str) -> str:
    """The scope that a request needs."""
    if method in ("GET", "HEAD"):
        return "pull"
    if method == "PUT" and _SNAPSHOT.match(path):
        return "snapshot"
    return "admin" if method == "DELETE" else "push"


def _run(path: str) -> str | None:
    """The run named in a path, None where there is none."""
    found = _RUN.match(path)
    return found.group(1) if found else None


def _grant(words: list[str], where: str) -> Grant:
    """The grant of a line's words. Raises TokenFileError, beginning with ``where``."""
    if len(words) < 3 or not _HASH.match(words[0]):
        raise TokenFileError(f"{where}: expected the SHA-256 of a token in hexadecimal, its scopes, and a run pattern")
    scopes = frozenset(words[1].split(","))
    if unknown := scopes - set(SCOPES):
        raise TokenFileError(f"{where}: {', '.join(sorted(unknown))!r} is no scope; there are {', '.join(SCOPES)}")
    return Grant(bytes.fromhex(words[0]), scopes, words[2])


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
