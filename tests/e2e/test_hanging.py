"""Services that hang and connections that fall silent: nobody waits much longer than the ten seconds that are promised,
and nobody gives up to whom bytes come.

Knows a server that is stopped by SIGSTOP (the kernel accepts connections and takes bytes for the process), and relays
that swallow what their connections carry. Does not know how silence is noticed.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ema_client import EmaClient, RemoteEma, RetryPolicy
from ema_client.errors import ConnectionLost, TransportError
from ema_client.http.connection import Timeouts
from ema_client.http.transport import Transport
from ema_client.reading.asked import Asked
from ema_client.reading.pulls import Pulls
from ema_client.reading.to_file import pour, save
from tests.relays import Relay

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


class Tunnel(Relay):
    """fall_silent() lets the connections of before carry nothing any more, unnoticed."""

    def __init__(self, url: str) -> None:
        self._alive = threading.Event()
        self._alive.set()
        super().__init__(url)

    def fall_silent(self) -> None:
        self._alive.clear()
        self._alive = threading.Event()
        self._alive.set()

    def begins(self) -> threading.Event:
        """Set for as long as the connection carries anything."""
        return self._alive

    def carry(self, source: socket.socket, target: socket.socket, _: str, told: threading.Event) -> None:
        while (raw := source.recv(1 << 16)) and told.is_set():
            target.sendall(raw)
        if told.is_set():
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


class Stalling(Relay):
    """A link on which each connection brings ``each`` bytes of answers, and then nothing, for as long as it is open.

    ``left``: bytes of answers that all connections together bring. carried: those that they brought.
    """

    def __init__(self, url: str, each: int, left: int = 1 << 40) -> None:
        self._each = each
        self._left = left
        self.carried = 0
        self._lock = threading.Lock()
        super().__init__(url)

    def carry(self, source: socket.socket, target: socket.socket, way: str, _: None) -> None:
        carried, buffer = 0, memoryview(bytearray(1 << 16))
        while count := source.recv_into(buffer):
            with self._lock:
                count = min(count, self._left, self._each - carried) if way == "down" else count
                self._left -= count if way == "down" else 0
                self.carried += count if way == "down" else 0
            carried += count
            target.sendall(buffer[:count])


#: A call of this policy ends by the first silence in which nothing came.
IMPATIENT = RetryPolicy(attempts=2, base=0.01, cap=0.01)
SOON = Timeouts(transfer=0.3, kept=0.3)
#: Of 24 MiB.
STATE = {"a": torch.arange(1_500_000.0), "b": torch.arange(4_791_456.0)}


def pulled(transport: Transport, run: str, _: Path) -> Mapping[str, Tensor]:
    return Pulls(transport, split_above=1 << 20).pull(Asked(run))


def into_file(transport: Transport, run: str, path: Path) -> Mapping[str, Tensor]:
    save(transport, Asked(run), path, None)
    return load_file(path)


def poured(transport: Transport, run: str, path: Path) -> Mapping[str, Tensor]:
    with path.open("wb") as file:
        pour(transport, Asked(run), file, None)
    return load_file(path)


#: By the way of reading: megabytes that a connection brings. A pull keeps whole blocks of 8 MiB.
READING: dict[str, tuple[Callable[[Transport, str, Path], Mapping[str, Tensor]], int]] = {
    "pull": (pulled, 12_000_000),
    "file": (into_file, 5_000_000),
    "stream": (poured, 5_000_000),
}


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("how", READING)
def test_link_that_falls_silent_again_and_again(
    how: str, lanes: int, server: Any, run_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reading goes on for as long as each try brings something, however often, and for however long, it is silent;
    and most of what came comes once."""
    read, each = READING[how]
    # Of a file, more than the first request brings is fetched ahead by lanes.
    monkeypatch.setattr("ema_client.reading.ordered._LEAD_BYTES", 2 << 20)
    with EmaClient(server.url) as client:
        client.create_run(run_name, STATE)
    with (
        contextlib.closing(Stalling(server.url, each)) as link,
        contextlib.closing(Transport(link.url, retry=IMPATIENT, timeouts=SOON, lanes=lanes)) as transport,
    ):
        came = read(transport, run_name, tmp_path / "w")
        assert link.opened > 2
        assert link.carried < 2 * sum(tensor.nbytes for tensor in STATE.values())
    assert all(torch.equal(came[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize("how", READING)
def test_link_that_falls_silent_for_good(how: str, server: Any, run_name: str, tmp_path: Path) -> None:
    """A reading that brings nothing more ends, wherever it stands."""
    read, each = READING[how]
    with EmaClient(server.url) as client:
        client.create_run(run_name, STATE)
    with (
        contextlib.closing(Stalling(server.url, each, left=2 * each)) as link,
        contextlib.closing(Transport(link.url, retry=IMPATIENT, timeouts=SOON)) as transport,
    ):
        began = time.monotonic()
        with pytest.raises(ConnectionLost, match="silent"):
            read(transport, run_name, tmp_path / "w")
        assert time.monotonic() - began < ABOUT_TEN
