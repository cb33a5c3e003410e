"""Requests to a machine that is gone: whose link is down, so that nobody ends the connection. Whatever the patience, it
is left after some seconds; a service that is stopped is waited for.

Machines are network namespaces; skipped where there are none. Knows sockets. Does not know hosts of runs
(tests/service/cluster/test_links.py).
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from ema_client.errors import ConnectionLost
from ema_client.http.body import Body
from ema_client.http.retry import RetryPolicy
from ema_client.http.sockets import UNHEARD_SECONDS
from ema_client.http.transport import Transport
from tests.benchmarks.namespaces import Network, why_no_network

REASON = why_no_network()
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON or "-"), pytest.mark.timeout(90)]

LENGTH = 64 << 20
#: Seconds that a service may be silent for, as the requests below have it: more than the test may take.
PATIENCE = 100.0


class Service:
    """Answers a GET of /body with the head and the first megabyte of a long body, reads up to ``reads`` bytes of a PUT,
    and says nothing else."""

    def __init__(self, address: str, reads: int, reached: threading.Semaphore) -> None:
        """reached: released with each request that has come."""
        self._listener = socket.create_server((address, 0))
        self.url = f"http://{address}:{self._listener.getsockname()[1]}"
        self._reads = reads
        self._ended = threading.Event()
        self._connections: list[socket.socket] = []
        self._reached = reached
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self._listener.accept()[:1], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = connection.recv(1 << 16)
            if b"100-continue" in head:
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            if head.startswith(b"GET /body"):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % LENGTH + bytes(1 << 20))
            self._connections.append(connection)
            self._reached.release()
            left = self._reads
            while left > 0:
                left -= len(connection.recv(1 << 16)) or left
            self._ended.wait(PATIENCE)

    def end(self) -> None:
        """Break all connections."""
        for each in self._connections:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._ended.set()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def network() -> Iterator[Network]:
    with Network({"service": 800, "client": None}) as made:
        yield made


def asking(transport: Transport) -> None:
    transport.json_once("POST", "/x", {}, patience=PATIENCE)


def sending(transport: Transport, length: int = LENGTH) -> None:
    body = Body(length, lambda: iter([memoryview(bytearray(length))]), waits=PATIENCE)
    transport.upload_once("/x", body)


def reading(transport: Transport) -> None:
    with transport.download("/body", patience=PATIENCE) as body:
        view = memoryview(bytearray(LENGTH))
        while count := body.readinto(view):
            view = view[count:]


#: What waits, and how much of a body the service takes meanwhile.
WAYS: dict[str, tuple[Callable[[Transport], None], int]] = {
    "control": (asking, 1 << 30),
    "in the middle of an upload": (sending, 1 << 30),
    "for an upload's answer": (partial(sending, length=2 << 20), 2 << 20),
    "in the middle of a download": (reading, 1 << 30),
}


def test_a_machine_that_is_gone_is_left(network: Network) -> None:
    """Soon, and the error says for how long it was silent, not how long it might have been."""

    def wait(ask: Callable[[Transport], None], reads: int) -> tuple[float, float]:
        with network.at("service"):
            service = Service(network.address("service"), reads, ready)
        with network.at("client"), contextlib.closing(service):
            transport = Transport(service.url, retry=RetryPolicy(attempts=1))
            seconds, fault = [0.0], None
            try:
                ask(transport)
            except ConnectionLost as lost:
                fault, seconds = lost, [time.monotonic()]
            transport.close()
            assert fault is not None
            return seconds[0], fault.silence

    ready = threading.Semaphore(0)
    with ThreadPoolExecutor(len(WAYS)) as threads:
        waiting = [threads.submit(wait, *way) for way in WAYS.values()]
        for _ in waiting:
            ready.acquire()
        time.sleep(0.3)  # the long upload takes 0.7 seconds
        network.cut("service")
        gone = time.monotonic()
        for name, each in zip(WAYS, waiting, strict=True):
            ended, silence = each.result()
            assert ended - gone < 3 * UNHEARD_SECONDS, name
            assert silence == UNHEARD_SECONDS, name


@pytest.mark.parametrize("ask", [asking, sending])
def test_a_machine_that_is_there_is_waited_for(network: Network, ask: Callable[[Transport], None]) -> None:
    """Its kernel answers for a service that reads nothing and says nothing, for longer than a machine is waited for."""
    with network.at("service"):
        service = Service(network.address("service"), 0, reached := threading.Semaphore(0))
    with network.at("client"), contextlib.closing(service), ThreadPoolExecutor(1) as threads:
        transport = Transport(service.url, retry=RetryPolicy(attempts=1))
        waiting = threads.submit(ask, transport)
        reached.acquire()
        time.sleep(UNHEARD_SECONDS + 3)
        assert not waiting.done()
        service.end()
        with pytest.raises(ConnectionLost):
            waiting.result()
        transport.close()
