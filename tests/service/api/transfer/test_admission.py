"""Waiting for room: first come, first served, not for long, and nobody else waits because of it.

Knows a server whose staging holds two pushes. Does not know the server's code, but for the length of the wait.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from safetensors.torch import save

from ema_service.api.transfer.admission import WAIT_SECONDS
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

#: A push takes 4 MB of staging: two fit, three do not.
TENSORS = {"w": torch.zeros(1_000_000)}
BODY = save(TENSORS)
FLAGS = ("--staging-bytes", "10000000", "--frozen-bytes", "5000000")
#: More than the sockets between a server and a reader hold.
LARGE = {"w": torch.zeros(2_200_000)}


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess]) -> Iterator[ServerProcess]:
    running = server_class(tmp_path_factory.mktemp("tight"), FLAGS).start()
    yield running
    running.stop()
    assert "Traceback" not in running.log


@pytest.fixture
def runs(tight: ServerProcess, plain_run: Callable[..., PlainRun], run_name: str) -> list[PlainRun]:
    """Runs of their own, so that no push supersedes another."""
    return [plain_run(tight, TENSORS, name=f"{run_name}-{number}") for number in range(6)]


class Push:
    """A push of the first step whose body is sent when told."""

    def __init__(self, server: ServerProcess, run: PlainRun, **headers: str) -> None:
        address = urlsplit(server.url)
        self.connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
        self.connection.putrequest("PUT", f"{run.path}/updates/1")
        for name, value in {"Content-Length": str(len(BODY)), **headers}.items():
            self.connection.putheader(name, value)
        self.connection.endheaders()

    def finish(self) -> tuple[int, Any]:
        self.connection.send(BODY)
        return self.answer()

    def answer(self) -> tuple[int, Any]:
        answer = self.connection.getresponse()
        return answer.status, json.loads(answer.read())

    def hang_up(self) -> None:
        self.connection.close()


def metric(run: PlainRun, name: str) -> float:
    lines = run.http.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


@pytest.fixture
def push(tight: ServerProcess, runs: list[PlainRun]) -> Iterator[Callable[..., Push]]:
    """Begin a push. All are ended after the test, and nothing of them is left."""
    begun: list[Push] = []

    def begin(run: PlainRun, **headers: str) -> Push:
        begun.append(Push(tight, run, **headers))
        return begun[-1]

    yield begin
    for each in begun:
        each.hang_up()
    wait_until(lambda: metric(runs[0], "ema_staging_bytes") == 0 == metric(runs[0], "ema_waiting_pushes"))


@pytest.fixture
def full(runs: list[PlainRun], push: Callable[..., Push]) -> list[Push]:
    """The two pushes that take all the staging; only their headers have come."""
    held = [push(run) for run in runs[:2]]
    wait_until(lambda: metric(runs[0], "ema_staging_bytes") == 8_000_000)
    return held


def test_a_push_waits_for_room(runs: list[PlainRun], full: list[Push], push: Callable[..., Push]) -> None:
    """What does not fit now is not refused: it is asked for its body, and applied, as soon as there is room."""
    third = push(runs[2], Expect="100-continue")
    wait_until(lambda: metric(runs[0], "ema_waiting_pushes") == 1)
    third.connection.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):  # while it waits it is not told to go on
        third.connection.sock.recv(1)
    third.connection.sock.settimeout(30)

    assert full[0].finish()[0] == 200
    assert third.connection.sock.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
    status, result = third.finish()

    assert (status, result["applied"]) == (200, True)


def test_first_come_first_served(runs: list[PlainRun], full: list[Push], push: Callable[..., Push]) -> None:
    """Those who wait are let in in the order in which they came, one for each place that comes free."""
    order: list[int] = []

    def wait_and_push(number: int) -> int:
        waiting = push(runs[number], Expect="100-continue")
        began = waiting.connection.sock.recv(25)
        order.append(number)
        return waiting.finish()[0] if b"100" in began else 0

    with ThreadPoolExecutor(4) as threads:
        waiting: list[Future[int]] = []
        for number in range(2, 6):
            waiting.append(threads.submit(wait_and_push, number))
            wait_until(lambda: metric(runs[0], "ema_waiting_pushes") == len(waiting))
        assert full[0].finish()[0] == 200
        assert [future.result(30) for future in waiting] == [200] * 4

    assert order == [2, 3, 4, 5]


def test_the_wait_is_bounded(runs: list[PlainRun], full: list[Push], push: Callable[..., Push]) -> None:
    """Where no room comes the answer is 503 with Retry-After, counted, before a byte of the body was asked for.

    Meanwhile requests that need no staging are answered at once.
    """
    before = time.monotonic()
    third = push(runs[2], Expect="100-continue")
    wait_until(lambda: metric(runs[0], "ema_waiting_pushes") == 1)
    slowest = 0.0
    for _ in range(20):
        asked = time.monotonic()
        assert runs[0].pull().status_code == 200
        slowest = max(slowest, time.monotonic() - asked)
    answer = third.connection.getresponse()
    waited = time.monotonic() - before
    problem = json.loads(answer.read())

    assert (answer.status, problem["code"], problem["retryable"]) == (503, "overloaded", True)
    assert int(answer.headers["Retry-After"]) >= 1
    assert "staging_bytes" in problem["detail"]
    assert WAIT_SECONDS - 0.1 < waited < WAIT_SECONDS + 5
    assert slowest < WAIT_SECONDS / 2
    assert 'ema_errors_total{code="overloaded"}' in runs[0].http.get("/metrics").text
    assert full[0].finish()[0] == 200


def test_who_hangs_up_leaves_the_queue(runs: list[PlainRun], full: list[Push], push: Callable[..., Push]) -> None:
    """A client that goes away while it waits takes no place; the one behind it is next."""
    gone = push(runs[2], Expect="100-continue")
    wait_until(lambda: metric(runs[0], "ema_waiting_pushes") == 1)
    behind = push(runs[3], Expect="100-continue")
    wait_until(lambda: metric(runs[0], "ema_waiting_pushes") == 2)
    gone.hang_up()
    wait_until(lambda: metric(runs[0], "ema_waiting_pushes") == 1)

    assert full[0].finish()[0] == 200
    assert behind.connection.sock.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert behind.finish()[0] == 200
    assert runs[2].info()["step"] is None


def test_what_never_fits_does_not_wait(runs: list[PlainRun], full: list[Push], push: Callable[..., Push]) -> None:
    """A push larger than the whole budget is 413 at once, even where others wait."""
    large = {"w": torch.zeros(3_000_000)}
    run = runs[0].__class__(runs[0].http, f"{runs[0].name}-large")
    run.create(large).raise_for_status()
    push(runs[2])
    began = time.monotonic()
    answer = run.begin(large)

    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    assert "--staging-bytes" in answer.json()["hint"]
    assert time.monotonic() - began < WAIT_SECONDS / 2
    assert full


@contextlib.contextmanager
def slow_reader(server: ServerProcess, run: PlainRun) -> Iterator[socket.socket]:
    """A connection on which a run was asked for and nothing is read yet."""
    address = urlsplit(server.url)
    with socket.socket() as reading:
        reading.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reading.settimeout(30)
        reading.connect((address.hostname, address.port))
        reading.sendall(f"GET {run.path}/weights HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        wait_until(lambda: metric(run, "ema_frozen_bytes") > 0)
        yield reading


def test_a_reader_waits_for_room(
    tight: ServerProcess, runs: list[PlainRun], plain_run: Callable[..., PlainRun], run_name: str
) -> None:
    """A read that does not fit the readers' budget waits for the reader before it, and is then answered."""
    slow = plain_run(tight, LARGE, name=f"{run_name}-slow")
    with slow_reader(tight, slow) as reading:
        answers: list[httpx.Response] = []
        waiting = threading.Thread(target=lambda: answers.append(runs[1].pull()))
        waiting.start()
        wait_until(lambda: metric(runs[0], "ema_waiting_readers") == 1)
        assert not answers
        while reading.recv(1 << 20):
            pass
        waiting.join(30)

    assert [answer.status_code for answer in answers] == [200]
    assert metric(runs[0], "ema_waiting_readers") == 0
