"""Services that hang and connections that fall silent: nobody waits much longer than the ten seconds that are promised.

Knows a server that is stopped by SIGSTOP (the kernel accepts connections and takes bytes for the process), and a relay
that swallows what its older connections carry. Does not know how silence is noticed.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from torch import nn

from ema_client import EmaClient, RemoteEma
from ema_client.errors import TransportError
from ema_client.http.connection import Timeouts

#: What ten seconds are on a busy machine, with the wait for a kept connection before them.
ABOUT_TEN = 22.0


@pytest.fixture
def hanging(start_server: Callable[..., Any]) -> Iterator[Any]:
    """A server for tests to stop; it goes on at the end, and ends."""
    server = start_server(memory=True)
    yield server
    server.process.send_signal(signal.SIGCONT)


def took(call: Callable[[], object]) -> float:
    began = time.monotonic()
    with contextlib.suppress(TransportError):
        call()
    return time.monotonic() - began


def test_server_that_hangs(hanging: Any) -> None:
    """Updates, a step with borrowed memory, a flush, and a client's calls end while the server is stopped; and after
    it goes on, all that was taken is applied."""
    small, large = nn.Linear(40, 40), nn.Linear(1500, 1500)
    optimizer = torch.optim.SGD(large.parameters(), lr=0.1)
    with (
        contextlib.closing(RemoteEma(small, run="small", url=hanging.url)) as ema,
        contextlib.closing(RemoteEma(large, run="large", url=hanging.url, borrow=True)) as borrowing,
        EmaClient(hanging.url) as client,
    ):
        for each, model in ((ema, small), (borrowing, large)):
            each(model)
            each.flush()
        client.run("small")
        hanging.process.send_signal(signal.SIGSTOP)
        waits: dict[str, float] = {}

        def trains() -> None:
            waits["update"] = max(took(lambda: ema(small)) for _ in range(10))
            waits["flush"] = took(ema.flush)

        def borrows() -> None:
            waits["borrowing update"] = took(lambda: borrowing(large))
            waits["step"] = took(optimizer.step)

        def looks() -> None:
            waits["run"] = took(lambda: client.run("small"))

        def pulls() -> None:
            waits["pull"] = took(lambda: client.pull("small"))

        threads = [threading.Thread(target=each) for each in (trains, borrows, looks, pulls)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        hanging.process.send_signal(signal.SIGCONT)

        assert set(waits) == {"update", "flush", "borrowing update", "step", "run", "pull"}
        assert max(waits.values()) < ABOUT_TEN, waits
        ema.flush(timeout=40)
        assert client.run("small").num_updates == ema.stats.sent > 1


class Tunnel:
    """Carries connections to a server; fall_silent() lets those of before carry nothing any more, unnoticed."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._to = (address.hostname, address.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._alive = threading.Event()
        self._alive.set()
        self._sockets: list[socket.socket] = []
        self.opened = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def fall_silent(self) -> None:
        self._alive.clear()
        self._alive = threading.Event()
        self._alive.set()

    def close(self) -> None:
        for sock in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._to)
            self.opened += 1
            self._sockets += [near, far]
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, target, self._alive), daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket, alive: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while (raw := source.recv(1 << 16)) and alive.is_set():
                target.sendall(raw)
            if alive.is_set():
                target.shutdown(socket.SHUT_WR)


def test_connections_that_fall_silent(server: Any, run_name: str) -> None:
    """Where older connections carry nothing any more and new ones work, one silent wait tells of all of their age."""
    state = {"w": torch.zeros(1000)}
    limit = 2 * Timeouts().kept + 3
    with contextlib.closing(Tunnel(server.url)) as tunnel, EmaClient(tunnel.url) as client:
        client.create_run(run_name, state)

        def pulls_at_once() -> None:
            threads = [threading.Thread(target=client.pull, args=(run_name,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)

        pulls_at_once()
        client.run(run_name)
        tunnel.fall_silent()
        began = time.monotonic()
        client.push(run_name, state, step=1)
        for _ in range(4):
            client.pull(run_name)
        client.run(run_name)

        assert time.monotonic() - began < limit
