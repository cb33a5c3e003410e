"""Servers that stand for the hosts of a cluster: each has a run of its own over a shard's tensors, and a coordinator
was told where they are.

Knows how to start them, and how a layout is cut. Does not know gateways. Nothing is decided here: each server applies
what it is sent.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx
from torch import Tensor

from ema_service.cluster import Arrival, encode
from tests.conftest import PlainRun, ServerProcess
from tests.forked import Forked
from tests.service.cluster.processes.coordinating import TOKEN
from tests.service.cluster.servers import cut
from tests.waiting import wait_until

__all__ = ["PlainHosts", "pushed"]

_SECONDS = 30.0


class PlainHosts:
    """k servers, a coordinator that has their addresses, and a gateway.

    gateway: a plain client of it; url: where it is.
    """

    def __init__(self, folder: Path, start_server: Callable[..., ServerProcess], count: int) -> None:
        self._folder = folder
        self._started: list[Forked] = []
        self._streams: list[threading.Thread] = []
        self._opened: list[httpx.Client] = []
        self._ended = threading.Event()
        self.token_file = folder / "token"
        self.token_file.write_text(TOKEN + "\n")
        self.servers = [start_server() for _ in range(count)]
        flags = ["--cluster-token-file", str(self.token_file)]
        self.coordinator, self.coordinator_url = self.program("coordinator", "--port", "0", *flags)
        for place in range(count):
            self.arrive(place)
        self.process, self.url = self.program("gateway", "--port", "0", "--coordinator", self.coordinator_url, *flags)
        self.gateway = httpx.Client(base_url=self.url, timeout=_SECONDS)

    def program(self, name: str, *flags: str) -> tuple[Forked, str]:
        """Start a program of the cluster; it and its URL."""
        log = self._folder / f"{name}-{len(self._started)}.log"
        log.touch()
        process = Forked(["-m", "ema_service", "cluster", name, *flags], log)
        self._started.append(process)
        wait_until(lambda: "listens on" in log.read_text() or process.poll() is not None, "an address", _SECONDS)
        found = re.search(r"listens on (http://\S+)", log.read_text())
        assert found, log.read_text()
        return process, found[1]

    def arrive(self, place: int) -> None:
        """Tell the coordinator where a server is, and go on listening as its host would."""
        arrival = encode(Arrival(place, len(self.servers), self.servers[place].url))
        there = threading.Event()

        def listen() -> None:
            path = f"{self.coordinator_url}/v1/runs/-directory/shards/{place}/link"
            headers = {"Authorization": f"Bearer {TOKEN}"}
            with (
                contextlib.suppress(httpx.TransportError),  # the coordinator's end
                httpx.stream("POST", path, content=arrival, headers=headers, timeout=_SECONDS) as answer,
            ):
                assert answer.status_code == 200
                there.set()
                for _ in answer.iter_lines():
                    if self._ended.is_set():
                        return

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        self._streams.append(thread)
        assert there.wait(_SECONDS)

    def runs(self, name: str, tensors: Mapping[str, Tensor], *, begun: bool = True, **config: object) -> list[PlainRun]:
        """Make a run whose shards are runs of the servers."""
        runs = [PlainRun(server.http(), name) for server in self.servers]
        self._opened += [run.http for run in runs]
        for run, part in zip(runs, cut(tensors, len(runs)), strict=True):
            assert run.create(part, **config).status_code == 201
            if begun:
                assert run.begin(part).status_code == 200
        return runs

    def end(self) -> None:
        """End all but the servers."""
        self._ended.set()
        for http in (self.gateway, *self._opened):
            http.close()
        for process in reversed(self._started):
            process.kill()
            process.wait(_SECONDS)
        for thread in self._streams:
            thread.join(_SECONDS)


def pushed(runs: Sequence[PlainRun], tensors: Mapping[str, Tensor], step: int) -> None:
    """Push an update to each server by itself."""
    for run, part in zip(runs, cut(tensors, len(runs)), strict=True):
        assert run.push(step, part).status_code == 200
