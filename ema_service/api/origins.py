"""Whose requests are answered: no other site's page reaches the service through the browser of somebody who may.

A browser on the server's machine sends what any web page tells it to send: a POST to 127.0.0.1 without asking, and,
once the page's own name has come to mean 127.0.0.1 (DNS rebinding), every request, with its answer readable. Where no
token is asked for, nothing else would stop such a page. Headers that a page cannot set tell:

- Host is the name by which the browser found the server. A rebound name is the stranger's own, so the server answers to
  IP addresses and to names of its machine alone. Not needed where tokens are asked for: the page has none.
- Origin and Sec-Fetch-Site tell of the page that sends a write. Programs send neither.

Knows these headers. Does not know routes, tokens, or who is at the browser.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from ema_client.errors import EmaError, ForeignHost, ForeignOrigin
from ema_service.api.errors import problem_response
from ema_service.api.transfer.lending import LINK

__all__ = ["Origins"]

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(:[0-9]*)?\Z", re.ASCII)
_READS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
#: What Sec-Fetch-Site says of the service's own pages, and of what the browser's user asked for by hand.
_OWN_SITES = frozenset({"same-origin", "none"})


class Origins:
    """ASGI middleware that refuses names the server does not answer to, and writes from pages of another origin.

    names: host names, beside those of this machine, that the server answers to. any_host: whether it answers to every
    name, since a token is asked for. refused: told the code of each refusal.
    """

    def __init__(
        self, app: ASGIApp, names: Collection[str], refused: Callable[[str], None], *, any_host: bool = False
    ) -> None:
        self._app = app
        given = (name.lower() for name in names)
        self._names = ({_name(each) or each for each in given} | _names_of_this_machine()) - {""}
        self._refused = refused
        self._any_host = any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except EmaError as error:
                self._refused(error.code)
                await problem_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raises ForeignHost, ForeignOrigin."""
        host = _header(scope, b"host")
        # A browser reaches no Unix socket: what connects there is a program of this machine.
        if host is not None and not self._any_host and scope.get("extensions", {}).get(LINK) != "Unix socket":
            self._check_host(host)
        if scope["method"] not in _READS:
            _check_page(scope, host)

    def _check_host(self, host: str) -> None:
        """Raises ForeignHost."""
        name = _name(host)
        if not (name in self._names or name.endswith(".localhost") or _is_address(name)):
            raise ForeignHost(f"the request is for the host {host[:200]!r}, which is no name of this server")


def _check_page(scope: Scope, host: str | None) -> None:
    """Raises ForeignOrigin where the browser says that a page of another origin sends a write."""
    site, origin = _header(scope, b"sec-fetch-site"), _header(scope, b"origin")
    if site is not None and site not in _OWN_SITES:
        raise ForeignOrigin(f"the browser calls this write {site[:40]!r} (Sec-Fetch-Site)")
    # The scheme is not compared: a proxy in front may speak TLS for the server.
    if origin is not None and origin.partition("://")[2] != host:
        raise ForeignOrigin(f"this write comes from a page of {origin[:200]!r}")


def _header(scope: Scope, name: bytes) -> str | None:
    """A header's value in lower case; several values are one list, as HTTP has it. None where there is none."""
    values = [value.strip().lower().decode("latin-1") for each, value in scope["headers"] if each == name]
    return ", ".join(values) if values else None


def _name(host: str) -> str:
    """The name or address of a Host, without its port, brackets and closing dot; empty where it is none."""
    found = _HOST.match(host)
    return found.group(1).strip("[]").removesuffix(".") if found else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _names_of_this_machine() -> set[str]:
    """As the machine itself gives them. DNS is not asked: whoever answers there might be the stranger."""
    own = socket.gethostname().lower()
    return {"localhost", own, own.partition(".")[0]}
