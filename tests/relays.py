"""Ways to a server that do harm to what they carry.

Knows sockets and threads. Does not know HTTP, or what a test asks.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Relay"]


class Relay:
    """Carries connections to the server at ``url``; subclasses say how. url: the relay's. opened: its connections."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._to = (address.hostname, address.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.opened = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def begins(self) -> Any:
        """What carry() is told of a new connection, for both directions."""
        return None

    def carry(self, source: socket.socket, target: socket.socket, way: str, told: Any) -> None:
        """Carry one direction of a connection to its end. way: "up" to the server, or "down". May raise OSError."""
        raise NotImplementedError

    def close(self) -> None:
        """End every connection, and take no more."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._to)
            except OSError:  # the server is gone, and so is who came
                near.close()
                continue
            self.opened += 1
            self._sockets += [near, far]
            told = self.begins()
            for source, target, way in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._carry, args=(source, target, way, told), daemon=True).start()

    def _carry(self, *carried: Any) -> None:
        with contextlib.suppress(OSError):
            self.carry(*carried)
