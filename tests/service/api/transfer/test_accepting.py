"""Many connections: strangers who only connect take nothing from those at work, nor from files.

Knows sockets, and the limits of another process. Does not know how connections are accepted.
"""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from safetensors.torch import save

from ema_client import EmaClient
from ema_service.logs import Seldom
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import Certificate, PlainRun, ServerProcess

MOST = 24
#: Large enough to be received by a thread, which wants a descriptor of its own.
TENSORS = {"w": torch.ones(1_000_000)}
BODY = save(TENSORS)
#: The state of a socket in /proc/net/tcp.
LISTENING = "0A"
#: A server that had 256 descriptors when it was started, and a stranger a second for the first byte.
FEW = """
import resource
from ema_service.api.transfer import connection
connection.FIRST_BYTE_SECONDS = 1.0
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from ema_service.cli import main
main()
"""
#: A server that was given 200 descriptors, and may have 5,000.
SOFT = FEW.replace("(256, 256)", "(200, 5000)")


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess]) -> Iterator[ServerProcess]:
    """A server that takes few connections."""
    folder = tmp_path_factory.mktemp("bounded")
    running = server_class(folder, ("--max-connections", str(MOST)), folder / "data").start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess]) -> Iterator[ServerProcess]:
    """A server with few descriptors."""
    folder = tmp_path_factory.mktemp("few")
    (folder / "few.py").write_text(FEW)
    running = server_class(folder, (), folder / "data", program=(str(folder / "few.py"),)).start()
    yield running
    running.stop()


@contextlib.contextmanager
def idle(server: ServerProcess, count: int, first: bytes = b"") -> Iterator[list[socket.socket]]:
    """Connections that say nothing, or only the beginning of a request."""
    address = urlsplit(server.url)
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            raw = stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=10))
            with contextlib.suppress(ConnectionError):  # closed for another one
                raw.sendall(first)
            opened.append(raw)
        yield opened


def descriptors(server: ServerProcess) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def open_connections(server: ServerProcess) -> int:
    """Connections that the server has accepted and not closed."""
    port = f":{urlsplit(server.url).port:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(line[1].endswith(port) and line[3] != LISTENING and line[9] != "0" for line in lines)


def limit(server: ServerProcess, count: int) -> None:
    """Let a running server have ``count`` descriptors."""
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (count, 256))


@pytest.mark.parametrize("first", [b"", b"GET /healthz HTTP/1.1\r\n"], ids=["silent", "in the middle of a head"])
def test_idle_connections_make_room(first: bytes, bounded: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """However many idle connections there are, a new one is answered at once, and one at work goes on."""
    run = plain_run(bounded, TENSORS)
    with ThreadPoolExecutor(1) as thread, bounded.http() as waiter:
        poll = thread.submit(waiter.get, f"{run.path}/weights", params={"min_step": 1, "wait": 20})
        time.sleep(0.2)
        with idle(bounded, 4 * MOST, first):
            assert descriptors(bounded) < 4 * MOST
            began = time.monotonic()
            assert httpx.get(f"{bounded.url}/healthz", timeout=5).status_code == 200
            assert run.push(1, TENSORS).status_code == 200
            assert time.monotonic() - began < 4
        assert poll.result(30).status_code == 200


def test_reader_that_takes_nothing_makes_room(bounded: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """Nor do connections whose answers nobody reads keep others out, long before --body-timeout."""
    large = {"w": torch.ones(8_000_000)}
    run = plain_run(bounded, large)
    ask = f"GET {run.path}/weights HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    run.http.close()
    with idle(bounded, MOST, ask):
        assert httpx.get(f"{bounded.url}/healthz", timeout=10).status_code == 200


def test_connections_at_work_are_waited_for(bounded: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """Where every connection is at work none is closed: the new one waits for its turn."""
    run = plain_run(bounded, TENSORS)
    run.http.close()
    ask = f"GET {run.path}/weights?min_step=9&wait=4 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    push = f"PUT {run.path}/updates/1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
    # Of those who wait for a step there are three quarters at most.
    with idle(bounded, MOST // 4, push + BODY[:1000]) as pushes, idle(bounded, MOST * 3 // 4, ask) as polls:
        time.sleep(1.5)  # until the server has read what the polls ask, after the large answers of the test before
        assert httpx.get(f"{bounded.url}/healthz", timeout=20).status_code == 200
        assert select.select(polls, [], [], 0)[0], "no poll had ended when the new connection was answered"
        assert {poll.recv(12) for poll in polls} == {b"HTTP/1.1 409"}
        assert not select.select(pushes, [], [], 0)[0]


def test_a_burst_within_the_limit_is_taken(bounded: ServerProcess) -> None:
    """As many connections as there may be, opened in one moment: each is answered, and counted once."""
    address = urlsplit(bounded.url)
    ask = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for _ in range(40):
        wait_until(lambda: open_connections(bounded) == 0)
        with contextlib.ExitStack() as stack:
            burst = [stack.enter_context(socket.socket()) for _ in range(MOST)]
            for raw in burst:
                raw.setblocking(False)
                raw.connect_ex((address.hostname, address.port))
            for raw in burst:
                raw.settimeout(10)
                raw.sendall(ask)
            # Whole answers: a client's end that leaves something unread is a reset, which the kernel forgets at once.
            assert [raw.recv(65536)[:12] for raw in burst] == [b"HTTP/1.1 200"] * len(burst)


def test_handshakes_are_counted(
    tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess], certificate: Certificate
) -> None:
    """Connections that never finish their TLS handshake make room as others do."""
    flags = ("--max-connections", str(MOST), *certificate.flags)
    server = server_class(tmp_path_factory.mktemp("tls"), flags).start()
    try:
        with idle(server, 3 * MOST, b"\x16\x03\x01"):
            assert descriptors(server) < 3 * MOST
            trusted = ssl.create_default_context(cafile=str(certificate.authority))
            assert httpx.get(f"{server.url}/healthz", verify=trusted, timeout=5).status_code == 200
    finally:
        server.stop()


@pytest.mark.parametrize("count", [220, 300], ids=["fewer than descriptors", "more"])
def test_files_have_their_share_of_descriptors(
    count: int, few: ServerProcess, plain_run: Callable[..., PlainRun]
) -> None:
    """However many connections idle, a run keeps its durability, snapshots are taken, the log is short."""
    run = plain_run(few, TENSORS)
    with idle(few, count):
        assert descriptors(few) < 200
        for step in range(1, 4):
            assert run.push(step, TENSORS).status_code == 200
        assert run.http.put(f"{run.path}/snapshots/s").status_code == 201
        assert run.http.post("/v1/runs", json={"run": f"{run.name}-2", "layout": [W]}).status_code == 201
        assert httpx.get(f"{few.url}{run.path}", timeout=5).json()["status"] == "ready"
    assert run.info()["durable_step"] == 3
    assert len(few.log) < 5000


W = {"name": "w", "shape": [1], "dtype": "F32"}


def test_silent_connection_is_closed_soon(few: ServerProcess) -> None:
    """Who connects and says nothing is closed long before --body-timeout; who has begun may go on."""
    with idle(few, 1) as [silent], idle(few, 1, b"GET /healthz HTTP/1.1\r\n") as [begun]:
        assert silent.recv(1) == b""
        begun.sendall(b"Host: localhost\r\n\r\n")
        assert begun.recv(12) == b"HTTP/1.1 200"


def test_rest_of_a_refused_body_is_not_waited_for(few: ServerProcess) -> None:
    """A refused sender that falls silent in the rest of its body is closed as one that falls silent after it."""
    head = b"PUT /v1/runs/none/updates/1 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with idle(few, 1, head) as [sender]:
        assert sender.recv(1 << 16).startswith(b"HTTP/1.1 404")
        sender.sendall(b"5\r\nhel")
        while sender.recv(1 << 16):  # the rest of the answer, then the end
            pass


def test_without_descriptors(few: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """Where descriptors run out all the same, a push is taken or comes again, nothing is lost, and the log is short."""
    run = plain_run(few, TENSORS)
    with EmaClient(few.uds) as client:
        state = client.shared_state(TENSORS)
        client.push(run.name, state, step=1)
        assert "shared memory" in client.link
        limit(few, 3)  # of every number that may be had the descriptor is in use
        assert run.push(2, TENSORS).status_code == 200
        refused = run.http.put(f"{run.path}/snapshots/s")
        assert (refused.status_code, refused.json()["retryable"]) == (503, True)
        ends = threading.Timer(1.0, limit, (few, 256))
        ends.start()
        with idle(few, 20):
            client.push(run.name, state, step=3)
        ends.join()
        client.push(run.name, state, step=4)
        assert "shared memory" in client.link
    assert (run.info()["status"], run.info()["step"]) == ("ready", 4)
    assert "Traceback" not in few.log
    assert len(few.log) < 20_000


def test_limit_is_raised(tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess]) -> None:
    """The server takes as many descriptors as it may, whatever it was given."""
    folder = tmp_path_factory.mktemp("soft")
    (folder / "soft.py").write_text(SOFT)
    server = server_class(folder, program=(str(folder / "soft.py"),)).start()
    try:
        assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE) == (5000, 5000)
    finally:
        server.stop()


def test_log_has_a_line_for_a_state(caplog: pytest.LogCaptureFixture) -> None:
    """Of one sentence some lines a minute are written; the next minute begins with how many were not."""
    import logging

    now = [0.0]
    seldom = Seldom(lambda: now[0])
    record = lambda number: logging.LogRecord("x", logging.INFO, "", 0, "client %d left", (number,), None)  # noqa: E731
    assert [seldom.filter(record(number)) for number in range(50)].count(True) == 20
    other = logging.LogRecord("x", logging.INFO, "", 0, "something else", (), None)
    assert seldom.filter(other)
    now[0] = 61.0
    last = record(51)
    assert seldom.filter(last)
    assert last.getMessage() == "client 51 left (and 30 more like this were not written)"
    assert caplog.records == []
