"""More than the server can take: what it acknowledges is there, the rest is told when to come again, memory is bounded.

``make soak`` offers it for a minute.

Knows 64 connections that push as fast as they are let. Does not know the server's code.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

CONNECTIONS = 64
#: How long they push, and where soaking is asked for at most. Longer changes nothing but the certainty.
SECONDS, SOAK_SECONDS = 4.0, 60.0
#: Each body is sent in pieces with a pause between, so that it holds its staging for half a second at least: four at a
#: time are eight a second, and 64 connections offer four times what can be let in while they wait.
PIECES, PAUSE = 4, 0.15
GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"
ELEMENTS = 500_000
STAGING = 4 * 4 * ELEMENTS
#: Beside the budgets: what interpreter, threads and sockets take for 64 connections.
REST = 100 << 20
#: By how much memory may grow: what is in use, as much that is kept for reuse, and the rest.
ALLOWED = 2 * STAGING + REST


@dataclass
class Pusher:
    """One connection with a run of its own; what it was answered."""

    run: PlainRun
    port: int
    acknowledged: list[int] = field(default_factory=list)
    refused: int = 0
    others: list[str] = field(default_factory=list)

    def push_until(self, stop: threading.Event) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        for step in range(1, 10_000):
            if stop.is_set():
                break
            self._push(connection, step)
        connection.close()

    def _push(self, connection: http.client.HTTPConnection, step: int) -> None:
        body = body_of(step)
        connection.putrequest("PUT", f"{self.run.path}/updates/{step}")
        connection.putheader("Content-Length", str(len(body)))
        connection.putheader("Expect", "100-continue")
        connection.endheaders()
        if connection.sock.recv(len(GO_ON), socket.MSG_PEEK) == GO_ON:
            connection.sock.recv(len(GO_ON))
            self._send(connection, body)
        answer = connection.getresponse()
        result = json.loads(answer.read())
        if answer.status == 200 and result["applied"]:
            self.acknowledged.append(step)
        elif answer.status == 503 and result["code"] == "overloaded" and int(answer.headers["Retry-After"]) >= 1:
            self.refused += 1
            connection.close()  # it still expects the body
        else:
            self.others.append(f"{answer.status} {result}")

    def _send(self, connection: http.client.HTTPConnection, body: bytes) -> None:
        size = -(-len(body) // PIECES)
        for at in range(0, len(body), size):
            connection.send(body[at : at + size])
            time.sleep(PAUSE)


def body_of(step: int) -> bytes:
    return save({"w": torch.full((ELEMENTS,), float(step))})


class Watch(threading.Thread):
    """Looks at memory, readiness and the budget's own figure until told to stop."""

    def __init__(self, server: ServerProcess, run: PlainRun) -> None:
        super().__init__()
        self._server, self._run, self._stopped = server, run, threading.Event()
        self.peak, self.staging, self.slowest, self.waiting = 0, 0.0, 0.0, 0.0
        self.statuses: set[int] = set()

    def run(self) -> None:
        with self._server.http() as http:
            while not self._stopped.wait(0.1):
                began = time.monotonic()
                self.statuses.add(http.get("/readyz").status_code)
                self.slowest = max(self.slowest, time.monotonic() - began)
                text = http.get("/metrics").text
                self.staging = max(self.staging, metric(text, "ema_staging_bytes"))
                self.waiting = max(self.waiting, metric(text, "ema_waiting_pushes"))
                self.peak = max(self.peak, resident_bytes(self._server))

    def stop(self) -> None:
        self._stopped.set()
        self.join(30)


def metric(text: str, name: str) -> float:
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{name} ")))


def resident_bytes(server: ServerProcess) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


@contextlib.contextmanager
def watching(server: ServerProcess, run: PlainRun) -> Iterator[Watch]:
    watch = Watch(server, run)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()


@pytest.mark.timeout(150)  # with the lives' 750 s the 15 minutes that `make soak` takes at most
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read in /proc")
def test_more_than_the_server_can_take(
    start_server: Callable[..., ServerProcess],
    plain_run_at: Callable[..., PlainRun],
    soak_seconds: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """64 connections offer several times what fits: nothing acknowledged is missing, and nothing else is there.

    The refused are told when to come again, memory keeps within the budgets, and readiness is answered all the while.
    """
    seconds = max(SECONDS, min(SOAK_SECONDS, soak_seconds))
    server = start_server("--staging-bytes", str(STAGING), memory=True)
    port = urlsplit(server.url).port or 0
    with server.http() as http:
        start = {"w": torch.zeros(ELEMENTS)}
        runs = [plain_run_at(http, f"r{i}", start, decay=0.0, use_num_updates=False) for i in range(CONNECTIONS)]
        pushers = [Pusher(run, port) for run in runs]
        before, stop = resident_bytes(server), threading.Event()
        with watching(server, runs[0]) as watch, ThreadPoolExecutor(CONNECTIONS) as threads:
            work = [threads.submit(pusher.push_until, stop) for pusher in pushers]
            time.sleep(seconds)
            stop.set()
            for each in work:
                each.result(60)

        acknowledged = sum(len(pusher.acknowledged) for pusher in pushers)
        refused = sum(pusher.refused for pusher in pushers)
        grown = watch.peak - before
        if soak_seconds:
            with capsys.disabled():
                print(  # noqa: T201 - for whoever soaks
                    f"{seconds:.0f} s of overload: {acknowledged} acknowledged, {refused} refused; memory grew by "
                    f"{grown >> 20} MiB of {ALLOWED >> 20} allowed, staging took {int(watch.staging) >> 20} of "
                    f"{STAGING >> 20}; readiness {watch.statuses}, within {watch.slowest:.2f} s"
                )

        assert [other for pusher in pushers for other in pusher.others] == []
        assert refused > CONNECTIONS / 4
        assert acknowledged > seconds
        for pusher in pushers:
            assert pusher.run.info()["version"] == f"1.{len(pusher.acknowledged)}"
            latest = float(pusher.acknowledged[-1]) if pusher.acknowledged else 0.0
            assert torch.equal(pusher.run.weights()["w"], torch.full((ELEMENTS,), latest))
        assert metric(http.get("/metrics").text, "ema_staging_bytes") == 0
    assert watch.staging <= STAGING
    assert watch.waiting > CONNECTIONS / 4
    assert grown < ALLOWED
    assert watch.statuses == {200}
    assert watch.slowest < 2
