"""``python -m linked serve ... RATE``: the service behind a link of RATE megabytes a second, which all of its
connections share.

Linux paces each socket by itself (SO_MAX_PACING_RATE), over loopback too, and without privileges: a hundred times a
second the rate is dealt out to the sockets that have something to send. What the service receives is not paced: a
network's link carries both directions at once. Knows sockets. Does not know what is measured.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import sys
import threading
import time
import weakref

from paced import SO_MAX_PACING_RATE

from ema_service.cli import main

__all__: list[str] = []

#: Linux' number for the bytes that a socket has not sent yet.
_SIOCOUTQNSD = 0x894B
_SECONDS = 0.01


class _Linked(socket.socket):
    def accept(self) -> tuple[socket.socket, object]:
        connection, address = super().accept()
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, _RATE)
            _opened.append(weakref.ref(connection))
        return connection, address


def _sends(sock: socket.socket) -> bool:
    """Whether a socket has something to send."""
    with contextlib.suppress(OSError, ValueError):  # closed meanwhile
        waiting: int = struct.unpack("i", fcntl.ioctl(sock.fileno(), _SIOCOUTQNSD, b"\0" * 4))[0]
        return waiting > 0
    return False


def _deal() -> None:
    """Deal the rate out, again and again."""
    while True:
        time.sleep(_SECONDS)
        found = [(each, each()) for each in tuple(_opened)]
        for gone in (each for each, sock in found if sock is None):
            _opened.remove(gone)
        busy = [sock for _, sock in found if sock is not None and _sends(sock)]
        for sock in busy:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, _RATE // len(busy))


if __name__ == "__main__":
    # Behind the other arguments.
    _RATE = int(float(sys.argv.pop()) * 1e6)
    _opened: list[weakref.ref[socket.socket]] = []
    socket.socket = _Linked  # type: ignore[misc]
    threading.Thread(target=_deal, daemon=True).start()
    main()
