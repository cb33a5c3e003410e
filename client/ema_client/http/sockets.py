"""Sockets to a service: TCP, TLS or a Unix socket, under the standard library's ``http.client``.

Knows: which socket an address asks for, and how to look at a socket without reading. Does not know: requests, answers,
or who keeps a connection.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import selectors
import socket
import ssl
import struct
import sys

from ema_client.http.address import Address

__all__ = ["UNHEARD_SECONDS", "Selector", "give_up", "look_after", "open_http", "probing", "readable", "unheard"]

#: What the kernel takes of a Unix socket's sender before the sender has to wait for the reader; Linux gives no more
#: than net.core.wmem_max. With Linux' default of 208 KiB sender and reader take turns: 1 GiB is pulled at 0.80 of the
#: speed of a raw socket, and with this size at 1.1.
UNIX_SEND_BUFFER_BYTES = 512 << 10

#: For a single look at a single socket; epoll would open a file descriptor for each look.
Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


#: Seconds after which a machine that acknowledges nothing is held for gone: its kernel would, however busy its service
#: is. A packet was sent five times by then.
UNHEARD_SECONDS = 5.0
#: Of TCP's keepalive: seconds until the first probe of a quiet connection, between two, and how many go unanswered.
_PROBES = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}
#: Where Linux' struct tcp_info has the packets that are not acknowledged, and the milliseconds since the last that was.
_UNACKED, _LAST_ACK, _TCP_INFO_BYTES = 24, 56, 60


def probing(**more: int) -> list[tuple[int, int, int]]:
    """Options with which the kernel ends a connection on which nothing is on its way and whose other machine is gone:
    reading raises TimeoutError with an errno after UNHEARD_SECONDS. What a system does not have is left out. more: of
    TCP, by the option's name."""
    named = [(getattr(socket, name, None), value) for name, value in {**_PROBES, **more}.items()]
    tcp = [(socket.IPPROTO_TCP, option, value) for option, value in named if option is not None]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *tcp]


def look_after(sock: socket.socket) -> None:
    """Give a connection the options of probing(). A Unix socket is left: its other end is on this machine."""
    for option in probing() if sock.family != socket.AF_UNIX else ():
        sock.setsockopt(*option)


def unheard(sock: socket.socket) -> bool:
    """Whether bytes are on their way and the other machine has acknowledged none for UNHEARD_SECONDS. A service that
    reads nothing for a while is heard: its kernel answers. False where the system does not tell (not Linux)."""
    if sock.family == socket.AF_UNIX or sys.platform != "linux":
        return False
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    unacked, since = (struct.unpack_from("=I", info, offset)[0] for offset in (_UNACKED, _LAST_ACK))
    return bool(unacked and since >= UNHEARD_SECONDS * 1000)


def open_http(address: Address, timeout: float, context: ssl.SSLContext | None) -> http.client.HTTPConnection:
    """An ``http.client`` connection to ``address``, which connects with the first request. timeout: in seconds."""
    if address.socket is not None:
        return _UnixConnection(address.socket, timeout)
    if address.secure:
        return http.client.HTTPSConnection(address.host, address.port, timeout=timeout, context=context)
    return http.client.HTTPConnection(address.host, address.port, timeout=timeout)


def readable(sock: socket.socket, timeout: float) -> bool:
    """Whether bytes, or the end of the stream, wait to be read within ``timeout`` seconds."""
    with Selector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(timeout))


def give_up(sock: socket.socket | None) -> None:
    """Close a socket that another process has open too: without shutdown(), which would end the other's connection."""
    if sock is not None:
        with contextlib.suppress(OSError):
            os.close(sock.detach())


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self.timeout)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SEND_BUFFER_BYTES)
            sock.connect(self._path)
        except BaseException:
            sock.close()
            raise
        self.sock = sock
