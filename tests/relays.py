"""Ways to a server that do harm to what they carry.

Knows sockets and threads. Does not know HTTP, or what a test asks.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Breaking", "Relay", "Stalling"]


class Relay:
    """Carries connections to the server at ``url``; subclasses say how. url: the relay's. opened: its connections."""

    def __init__(self, url: str) -> None:
        self.leads(url)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.opened = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def leads(self, url: str) -> None:
        """Carry new connections to another server."""
        address = urlsplit(url)
        self._to = (address.hostname, address.port)

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


class Breaking(Relay):
    """Each connection is cut, or falls silent, after a random number of bytes of either direction, or goes on."""

    def __init__(self, url: str, dice: random.Random, troubles: int) -> None:
        self._dice = dice
        self._lock = threading.Lock()
        self.troubles = troubles
        super().__init__(url)

    def begin(self, troubles: int) -> None:
        """End what is there, and have so many of the connections that come have trouble."""
        with self._lock:
            self.troubles = troubles
        for sock in self._sockets[1:]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def begins(self) -> tuple[int, bool] | None:
        """After how many bytes a new connection has trouble, and whether it falls silent then."""
        with self._lock:
            if self.troubles == 0 or self._dice.random() < 0.3:
                return None
            self.troubles -= 1
            return self._dice.randrange(12 << 20), self._dice.random() < 0.2

    def carry(self, source: socket.socket, target: socket.socket, _: str, told: tuple[int, bool] | None) -> None:
        carried, buffer = 0, memoryview(bytearray(1 << 18))
        while count := source.recv_into(buffer):
            carried += count
            if told is not None and carried > told[0]:
                if told[1]:
                    # Longer than either end waits.
                    time.sleep(3)
                # close() alone ends nothing while the other direction's thread reads from the same socket.
                for sock in (source, target):
                    sock.shutdown(socket.SHUT_RDWR)
                return
            target.sendall(buffer[:count])
        target.shutdown(socket.SHUT_WR)


class Stalling(Relay):
    """Each connection has ``rate`` bytes a second of each direction; after stall() one of them stands still, alive, and
    goes on after wake().

    holds: bytes that the kernel takes of a sender whom the relay does not read. stalled: set once a connection stands
    still. silenced: how many did.
    """

    def __init__(self, url: str, rate: float = 100e6, *, holds: int = 64 << 10) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._way, self._after, self._more = "", 0, 0
        self._awake = threading.Event()
        self.stalled = threading.Event()
        self.silenced = 0
        super().__init__(url)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, holds)

    def stall(self, after: int, way: str = "up", times: int = 1) -> None:
        """Have the next connection that carries more than ``after`` bytes that way, from now on, stand still; the next
        ``times`` of them."""
        with self._lock:
            self._way, self._after, self._more = way, after, times
            self._awake.clear()
            self.stalled.clear()

    def wake(self) -> None:
        """Have what stands still go on, and nothing else stand still."""
        with self._lock:
            self._more = 0
        self._awake.set()

    def close(self) -> None:
        self.wake()
        super().close()

    def begins(self) -> dict[str, int]:
        """What a connection carried that way since the first stall(), -1 once it has stood still."""
        return {"carried": 0}

    def carry(self, source: socket.socket, target: socket.socket, way: str, told: dict[str, int]) -> None:
        buffer, due = memoryview(bytearray(256 << 10)), time.monotonic()
        try:
            while count := source.recv_into(buffer):
                passes = self._passes(way, told, count)
                target.sendall(buffer[:passes])
                if passes < count:
                    self._awake.wait(120)
                    target.sendall(buffer[passes:count])
                due = max(due, time.monotonic() - 0.01) + count / self._rate
                time.sleep(max(0.0, due - time.monotonic()))
        finally:
            for sock in (source, target):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                # A socket that is open takes bytes until its memory is full, and its sender waits for ever.
                sock.close()

    def _passes(self, way: str, told: dict[str, int], count: int) -> int:
        """How many of the next ``count`` bytes go before the connection stands still."""
        with self._lock:
            if told["carried"] < 0:
                return count if self._awake.is_set() else 0
            if not self._more or way != self._way:
                return count
            told["carried"] += count
            beyond = told["carried"] - self._after
            if beyond <= 0:
                return count
            told["carried"] = -1
            self._more -= 1
            self.silenced += 1
            self.stalled.set()
            return max(0, count - beyond)
