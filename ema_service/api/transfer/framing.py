"""Requests that two readers of HTTP may read as different ones, each of which is refused or is its connection's last.

What one reader takes for a body, another takes for the next request: a stranger's request then passes a proxy as part
of an innocent one (request smuggling). Most of that the parser refuses by itself, as tests of it say: two lengths, a
length beside chunks, bare line feeds, folded lines. The rest is here.

Knows the head of a request. Does not know sockets, or what is done with a request.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["ambiguity", "has_body", "is_plain"]

Headers = Sequence[tuple[bytes, bytes]]

#: What a Host may be: a name or an address, and a port. h11 takes the same for a name as the standard does.
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+;=%-]*)(:[0-9]*)?\Z")
#: Digits of the longest length that is believed; h11 has as many.
_LENGTH_DIGITS = 20


def ambiguity(method: bytes, target: bytes, version: str, headers: Headers, *, upgrades: bool) -> str | None:
    """Why a request is refused, None where there is one way to read it. headers: names in lower case. upgrades: whether
    the parser believes that another protocol follows the head."""
    hosts, coded = _values(headers, b"host"), _values(headers, b"transfer-encoding")
    if version not in ("1.0", "1.1"):
        return f"HTTP/{version} is not spoken here"
    if method == b"CONNECT":
        return "this server speaks HTTP/1.1 and is no proxy: CONNECT is refused"
    if upgrades and has_body(headers):
        # The parser takes what follows for the other protocol, this server for the next request, a proxy for the body.
        return "Upgrade in a request with a body: nothing else is spoken here"
    if len(hosts) > 1 or (version == "1.1" and not hosts) or not all(_HOST.match(host) for host in hosts):
        return "one Host, a name or an address, is expected"
    if coded and version == "1.0":
        return "Transfer-Encoding does not exist in HTTP/1.0"
    if any(len(value) > _LENGTH_DIGITS for value in _values(headers, b"content-length")):
        return "Content-Length has too many digits"
    if not _is_for(target, hosts):
        return "the URL in the request line is not of the request's Host"
    return None


def has_body(headers: Headers) -> bool:
    """Whether a body of at least one byte, or of a length still unknown, belongs to the request."""
    lengths = _values(headers, b"content-length")
    return bool(_values(headers, b"transfer-encoding")) or any(value.strip(b"0") for value in lengths)


def is_plain(version: str, headers: Headers, *, upgrades: bool) -> bool:
    """Whether another request may follow: not behind HTTP/1.0, an upgrade, or codings that other readers do not
    know."""
    codings = [value.lower() for value in _values(headers, b"transfer-encoding")]
    return version == "1.1" and not upgrades and codings in ([], [b"chunked"])


def _values(headers: Headers, name: bytes) -> list[bytes]:
    return [value.strip() for each, value in headers if each == name]


def _is_for(target: bytes, hosts: Sequence[bytes]) -> bool:
    """Whether a request's target is a path, or a URL of the request's Host."""
    if target.startswith(b"/") or target == b"*":
        return True
    _, mark, rest = target.partition(b"://")
    authority = re.split(rb"[/?#]", rest, maxsplit=1)[0]
    return bool(mark) and [authority.lower()] == [host.lower() for host in hosts]
