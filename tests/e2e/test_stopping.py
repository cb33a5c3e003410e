"""The start and the end of a server: what readers, terminals and the environment cannot do to either.

Knows processes, signals and plain HTTP. Does not know how a server is put together.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from safetensors.torch import save

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

SELDOM = ("--checkpoint-interval", "1000")
#: More than the sockets between the server and a reader hold.
LARGE = {"w": torch.zeros(4_000_000)}
SMALL = {"w": torch.ones(10)}
#: A server in a hurry.
HASTY = """
from ema_service.api import server
server.WRITE_SECONDS, server.STOP_SECONDS = 0.5, 1.5
from ema_service.cli import main
main()
"""


def reader_that_takes_nothing(server: ServerProcess, run: PlainRun) -> socket.socket:
    address = urlsplit(server.url)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect((address.hostname, address.port))
    raw.sendall(f"GET {run.path}/weights HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert raw.recv(12) == b"HTTP/1.1 200"
    return raw


def test_what_must_be_kept_is_kept_first(
    start_server: Callable[..., ServerProcess], plain_run: Callable[..., PlainRun]
) -> None:
    """While readers that take nothing hold the end up, a killed server has lost nothing of a run of ``memory``."""
    server = start_server(*SELDOM)
    run = plain_run(server, LARGE, durability="memory")
    run.push(1, LARGE).raise_for_status()
    readers = [reader_that_takes_nothing(server, run) for _ in range(2)]
    server.process.send_signal(signal.SIGTERM)
    time.sleep(4)
    assert server.process.poll() is None, "the readers hold nothing up: this test shows nothing"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((urlsplit(server.url).hostname, urlsplit(server.url).port), timeout=5)
    server.kill()
    server.start()
    with server.http() as http:
        assert http.get(run.path).json()["step"] == 1
    for reader in readers:
        reader.close()


def test_the_end_is_soon(tmp_path: Path, server_class: type[ServerProcess], plain_run: Callable[..., PlainRun]) -> None:
    """Readers that take nothing, and senders that fall silent, are cut off in the end, and the server ends with 0."""
    (tmp_path / "hasty.py").write_text(HASTY)
    server = server_class(tmp_path, SELDOM, tmp_path / "data", program=(str(tmp_path / "hasty.py"),)).start()
    run = plain_run(server, LARGE, durability="memory")
    run.push(1, LARGE).raise_for_status()
    reader = reader_that_takes_nothing(server, run)
    sender = socket.create_connection((urlsplit(server.url).hostname, urlsplit(server.url).port), timeout=20)
    sender.sendall(f"PUT {run.path}/updates/2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 16000080\r\n\r\n".encode())
    time.sleep(0.3)
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 10
    server.start()
    with server.http() as http:
        assert http.get(run.path).json()["step"] == 1
    server.stop()
    reader.close()
    sender.close()


def test_writes_end_with_the_order_to_stop(
    start_server: Callable[..., ServerProcess], plain_run: Callable[..., PlainRun]
) -> None:
    """A write in hand is finished and kept; one that comes later is told to come again."""
    server = start_server(*SELDOM)
    run = plain_run(server, SMALL, durability="memory")
    body, address = save(SMALL), urlsplit(server.url)
    head = f"PUT {run.path}/updates/1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((address.hostname, address.port), timeout=20) as in_hand:
        in_hand.sendall(head + body[:50])
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        late = run.push(2, SMALL)
        assert (late.status_code, late.json()["code"], late.json()["retryable"]) == (503, "stopping", True)
        in_hand.sendall(body[50:])
        assert in_hand.recv(12) == b"HTTP/1.1 200"
    assert server.process.wait(20) == 0
    server.start()
    with server.http() as http:
        assert http.get(run.path).json()["step"] == 1


def wait_for(uds: Path) -> None:
    """Return once a server answers there."""
    deadline = time.monotonic() + 60
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(uds)) == 0:
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that takes nothing")
def test_start_that_nobody_can_read(tmp_path: Path) -> None:
    """A full disk behind the output, and variables that Kubernetes sets for a Service named ema, keep no server from
    starting where it was told to."""
    injected = {
        "EMA_SERVICE_HOST": "10.96.0.7",
        "EMA_SERVICE_PORT": "tcp://10.96.0.7:8470",
        "EMA_PORT": "tcp://10.96.0.7:8470",
        "EMA_SERVICE_SERVICE_HOST": "tcp://10.96.0.7:8470",
    }
    uds = tmp_path / "ema.sock"
    command = [sys.executable, "-m", "ema_service", "serve", "--memory", "--port", "0", "--uds", str(uds)]
    with Path("/dev/full").open("w") as full:
        server = subprocess.Popen(command, stdout=full, stderr=full, env={**os.environ, **injected})
    try:
        wait_for(uds)
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(uds)), base_url="http://localhost") as http:
            assert http.get("/readyz").status_code == 200
    finally:
        server.terminate()
    assert server.wait(30) == 0
