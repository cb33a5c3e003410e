"""The address that a server tells to people: one that works from where they are.

Knows sockets and URLs. Does not know who listens, or what is served.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["announced", "host_of", "is_loopback", "most_reachable"]

#: Addresses of documentation (RFC 5737, RFC 3849): no packet goes there, only the way to them is asked for.
#: From netdevice(7): the address of an interface.
_SIOCGIFADDR = 0x8915
_ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


def announced(host: str, port: int, *, secure: bool, name: str | None = None) -> str:
    """The URL of a server that listens on ``host``, without a slash at its end.

    Of a server that listens on all addresses of its machine (0.0.0.0, ::), the one by which the machine reaches others,
    as others reach it by that one. Without a way to everybody else, as on a cluster's inner network, that of its first
    network interface; its loopback address where there is none.

    name: what others know the server by: a host name or an address, or a whole URL, such as that of a proxy.
    """
    if name and "://" in name:
        return name.rstrip("/")
    shown = name or _reachable(host)
    return f"{'https' if secure else 'http'}://{f'[{shown}]' if ':' in shown else shown}:{port}"


def host_of(name: str) -> str:
    """The host name or address in what announced() takes as ``name``."""
    return urlsplit(name).hostname or "" if "://" in name else name


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address. A name other than localhost counts as reachable by others."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def most_reachable(url: str, uds: Path | None) -> str:
    """Of a server's two addresses the one for most of its clients: the URL, or the Unix socket where only this machine
    reaches the URL."""
    host = urlsplit(url).hostname or ""
    return f"unix://{uds.resolve()}" if uds and is_loopback(host) else url


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
    found = [each for each in _interfaces() if not ipaddress.ip_address(each).is_loopback]
    return found[0] if found else "::1" if ":" in host else "127.0.0.1"


def _interfaces() -> Iterator[str]:
    """The IPv4 addresses of this machine's interfaces, in the kernel's order; none where the system does not tell."""
    try:
        names = [name for _, name in socket.if_nameindex()]
    except OSError:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for name in names:
            with contextlib.suppress(OSError):  # an interface without an address, or that is down
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                yield socket.inet_ntoa(answer[20:24])
