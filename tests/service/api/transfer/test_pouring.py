"""Weights that a thread writes to the socket while they are taken as fast as it does: the same bytes, the same ends.

Knows a real server, plain sockets and HTTP. Does not know who writes.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from ema_service.api.transfer.pouring import Pouring
from ema_service.api.transfer.streams import PlainStream
from ema_service.threads import Threads
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

#: 24 MiB in three tensors of uneven sizes: many pieces, none at a tensor's end.
STATE = {
    name: torch.randn(size, generator=torch.Generator().manual_seed(size))
    for name, size in {"a": 3_000_001, "b": 17, "c": 3_291_439}.items()
}
WAIT_SECONDS = 30.0


@pytest.fixture
def run(start_server: Callable[..., ServerProcess], plain_run: Callable[..., PlainRun]) -> PlainRun:
    return plain_run(start_server("--body-timeout", "2", memory=True), STATE)


def equal(weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(weights[name], tensor) for name, tensor in STATE.items())


def metric(run: PlainRun, name: str) -> float:
    lines = run.http.get("/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name))


@contextlib.contextmanager
def reading(run: PlainRun, request: str) -> Iterator[socket.socket]:
    """A connection on which this was asked for."""
    address = (run.http.base_url.host, run.http.base_url.port or 80)
    with socket.create_connection(address, timeout=WAIT_SECONDS) as connection:
        connection.sendall(f"{request} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        yield connection


def rest_of(connection: socket.socket, received: bytes = b"") -> tuple[bytes, bytes]:
    """Head and body of an answer."""
    data = bytearray(received)
    while b"\r\n\r\n" not in data:
        data += connection.recv(1 << 16)
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    length = int(next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))[15:])
    while len(body) < length:
        piece = connection.recv(1 << 20)
        assert piece, f"{len(body)} of {length} bytes came"
        body += piece
    return head, body


def test_whole_again_and_in_ranges(run: PlainRun) -> None:
    """One connection: whole weights, the same again, parts that begin and end anywhere, a small answer in between."""
    path = f"{run.path}/weights"
    before = metric(run, "ema_sent_bytes_total")
    whole = run.http.get(path).content
    cuts = [0, 1, 12_345_678, 12_345_678 + (1 << 20), len(whole) - 3, len(whole)]
    parts = [run.http.get(path, headers={"Range": f"bytes={a}-{b - 1}"}).content for a, b in pairwise(cuts)]

    assert equal(load(whole))
    assert run.info()["status"] == "ready"
    assert run.http.get(path).content == whole == b"".join(parts)
    assert metric(run, "ema_sent_bytes_total") - before == 3 * len(whole)


def test_cast_on_the_way(run: PlainRun) -> None:
    """A cast is made as it is sent, by whoever sends."""
    weights = load(run.http.get(f"{run.path}/weights", params={"dtype": "BF16"}).content)

    assert all(torch.equal(weights[name], tensor.bfloat16()) for name, tensor in STATE.items())


def test_reader_that_rests(run: PlainRun) -> None:
    """One that takes nothing for a while, several times, gets every byte; so does who asks next on the connection."""
    with reading(run, f"GET {run.path}/weights") as connection:
        received = b""
        for _ in range(4):
            time.sleep(0.3)
            received += connection.recv(3 << 20)
        _, body = rest_of(connection, received)
        connection.sendall(f"GET {run.path}/weights HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        _, again = rest_of(connection)

    assert equal(load(body))
    assert again == body


def test_reader_that_takes_nothing_is_cut(run: PlainRun) -> None:
    """After the deadline, as one whom no thread served: its version is free, and the threads are others'."""
    with reading(run, f"GET {run.path}/weights"):
        wait_until(lambda: metric(run, "ema_slow_readers_total") == 1)
        wait_until(lambda: metric(run, "ema_frozen_bytes") == 0)

    assert equal(load(run.http.get(f"{run.path}/weights").content))


def test_readers_that_hang_up(run: PlainRun) -> None:
    """In the middle, more of them than there are threads: nothing of theirs is held, and others are served."""
    for _ in range(12):
        with reading(run, f"GET {run.path}/weights") as connection:
            connection.recv(1 << 16)
    wait_until(lambda: metric(run, "ema_frozen_bytes") == 0)

    assert equal(load(run.http.get(f"{run.path}/weights").content))


def test_many_at_once(run: PlainRun) -> None:
    """More readers than threads, fast and slow ones, while updates go on: each gets one version, whole."""
    ended = threading.Event()

    def pull(number: int) -> bool:
        if number % 3:
            return equal(load(httpx.get(f"{run.http.base_url}{run.path}/weights", timeout=WAIT_SECONDS).content))
        with reading(run, f"GET {run.path}/weights") as connection:
            time.sleep(0.2)
            return equal(load(rest_of(connection)[1]))

    def push() -> int:
        step = 0
        while not ended.is_set():
            step += 1
            run.push(step, STATE).raise_for_status()
        return step

    with ThreadPoolExecutor(13) as threads:
        pushing = threads.submit(push)
        try:
            pulled = list(threads.map(pull, range(24)))
        finally:
            ended.set()
        assert pushing.result() > 0

    assert all(pulled)


def test_pieces_that_fail() -> None:
    """What the making of a piece raises is raised, and the descriptor is closed."""
    here, there = socket.socketpair()

    def pieces() -> Iterator[memoryview]:
        yield memoryview(b"x" * 100)
        raise MemoryError("no room to cast")

    with here, there:
        descriptor = here.dup().detach()
        pouring = Pouring(PlainStream(descriptor), memoryview(b""), pieces())
        with pytest.raises(MemoryError):
            pouring.run()
        assert there.recv(1000) == b"x" * 100
        again: Any = socket.socket(fileno=here.dup().detach())
        with again:
            assert again.fileno() == descriptor


def test_given_up() -> None:
    """Told to stop, it ends although the reader goes on reading."""
    here, there = socket.socketpair()
    with here, there, Threads(1, "test") as threads:
        here.setblocking(False)
        piece = memoryview(bytes(1 << 16))
        pouring = Pouring(PlainStream(here.dup().detach()), piece, iter(lambda: piece, None))
        working = threads.submit(pouring.run)
        for _ in range(20):
            there.recv(1 << 16)
        pouring.stopped = True
        working.result(WAIT_SECONDS)

    assert pouring.sent > 0
