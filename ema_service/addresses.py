"""The address that a server tells to people: one that works from where they are.

Knows sockets and URLs. Does not know who listens, or what is served.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

__all__ = ["announced", "host_of"]

#: Addresses of documentation (RFC 5737, RFC 3849): no packet goes there, only the way to them is asked for.
_ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


def announced(host: str, port: int, *, secure: bool, name: str | None = None) -> str:
    """The URL of a server that listens on ``host``, without a slash at its end.

    Of a server that listens on all addresses of its machine (0.0.0.0, ::), the one by which the machine reaches others,
    as others reach it by that one; its loopback address where it reaches nobody.

    name: what others know the server by: a host name or an address, or a whole URL, such as that of a proxy.
    """
    if name and "://" in name:
        return name.rstrip("/")
    shown = name or _reachable(host)
    return f"{'https' if secure else 'http'}://{f'[{shown}]' if ':' in shown else shown}:{port}"


def host_of(name: str) -> str:
    """The host name or address in what announced() takes as ``name``."""
    return urlsplit(name).hostname or "" if "://" in name else name


def _reachable(host: str) -> str:
    try:
        wildcard = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host
    if not wildcard:
        return host
    families = [socket.AF_INET6, socket.AF_INET] if ":" in host else [socket.AF_INET]
    for family in families:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((_ELSEWHERE[family], 9))  # of a datagram socket: nothing is sent
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return "::1" if ":" in host else "127.0.0.1"
