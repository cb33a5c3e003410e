"""What every test shares: real servers, each a process of its own on a real port.

Knows how to start, stop and kill ``ema-service serve``. Does not know what a test wants of it.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

_START_SECONDS = 60.0
_STOP_SECONDS = 60.0
_LISTENS = re.compile(r"listens on (http://\S+)")


@dataclass
class ServerProcess:
    """A running server. ``url`` and ``uds`` (unix://...) reach it; ``data_dir`` is None with --memory."""

    folder: Path
    arguments: tuple[str, ...] = ()
    data_dir: Path | None = None
    url: str = ""
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def uds(self) -> str:
        return f"unix://{self.folder / 'ema.sock'}"

    @property
    def log(self) -> str:
        """Everything it printed so far."""
        return (self.folder / "log").read_text()

    def start(self) -> ServerProcess:
        """Start, or start again on the same data dir, and wait until it accepts connections."""
        where = ["--data-dir", str(self.data_dir)] if self.data_dir else ["--memory"]
        command = [sys.executable, "-m", "ema_service", "serve", "--port", "0", *where, *self.arguments]
        command += ["--uds", str(self.folder / "ema.sock")]
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        deadline = time.monotonic() + _START_SECONDS
        while not (found := _LISTENS.search(self.log)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the server did not start:\n{self.log}")
            time.sleep(0.02)
        self.url = found.group(1)
        return self

    def stop(self) -> int:
        """End it gracefully, as an operator would, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_STOP_SECONDS)

    def kill(self) -> None:
        """SIGKILL: nothing of it runs after this."""
        self.process.kill()
        self.process.wait(_STOP_SECONDS)

    def http(self) -> httpx.Client:
        """A plain HTTP client of it, with none of our client's code."""
        return httpx.Client(base_url=self.url, timeout=30)


@pytest.fixture
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    """Start servers with flags of one's own; ``memory=True`` for --memory. All are ended after the test."""
    started: list[ServerProcess] = []

    def start(*arguments: str, memory: bool = False) -> ServerProcess:
        folder = tmp_path_factory.mktemp("server")
        server = ServerProcess(folder, arguments, None if memory else folder / "data")
        started.append(server.start())
        return server

    yield start
    for server in started:
        if server.process.poll() is None:
            server.kill()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server with a data dir for all tests that can share it; use ``run_name`` for a run of one's own."""
    folder = tmp_path_factory.mktemp("server")
    running = ServerProcess(folder, data_dir=folder / "data").start()
    yield running
    if running.process.poll() is None:
        running.stop()


_numbers = itertools.count()


@pytest.fixture
def run_name() -> str:
    """A name no other test has."""
    return f"run-{os.getpid()}-{next(_numbers)}"
