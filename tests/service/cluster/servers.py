"""Hosts of one cluster: servers on real ports with data dirs of their own, a coordinator, and a trainer of plain HTTP.

Knows how to start, kill and ask them, and how a trainer cuts its parameters. Does not know what is tried with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from safetensors.torch import load, save
from torch import Tensor

from ema_service.cluster import LayoutMap
from ema_service.memory import Layout
from tests.conftest import ServerProcess
from tests.service.cluster.hosts import Hosts
from tests.service.cluster.processes.coordinating import TOKEN
from tests.service.conftest import specs_of

__all__ = ["Servers", "cut"]

_SECONDS = 60.0
_PROGRAM = str(Path(__file__).parent / "processes" / "serving.py")


def cut(
    tensors: Mapping[str, Tensor], hosts: int, parameters: Mapping[str, Tensor] | None = None
) -> list[dict[str, Tensor]]:
    """The slice of each host. parameters: of the run, where ``tensors`` have other dtypes."""
    shards = LayoutMap(Layout(specs_of(parameters or tensors)), hosts).shards
    return [
        {name: tensors[name][tuple(slice(*axis) for axis in box)].contiguous() for name, box in shard.boxes.items()}
        for shard in shards
    ]


class Servers:
    """k hosts, by place, and their coordinator."""

    def __init__(self, folder: Path, of: int, *arguments: str) -> None:
        """arguments: more flags of each host."""
        self.folder, self.of, self._arguments = folder, of, arguments
        self.coordinators = Hosts(folder)
        self.hosts: dict[int, ServerProcess] = {}
        self.token_file = folder / "token"
        self.token_file.write_text(f"{TOKEN}\n")

    # --- processes --------------------------------------------------------------------------------------------------

    def start(self) -> Servers:
        """Start the coordinator and all hosts."""
        self.coordinate()
        for place in range(self.of):
            self.host(place)
        return self

    def coordinate(self, kill: str = "") -> None:
        """Start a coordinator, or one again at the port of the first."""
        ports = self.coordinators.ports
        self.coordinators.coordinate(ports[0] if ports else 0, kill)

    def host(self, place: int, *arguments: str, kill: str = "") -> ServerProcess:
        """Start a host, or start it again on its data dir. kill: where it ends itself, as in ``after vote 1``."""
        folder = self.folder / f"host-{place}"
        folder.mkdir(exist_ok=True)
        urls = [f"--coordinator=http://127.0.0.1:{port}" for port in self.coordinators.ports]
        member = (f"--shard={place}/{self.of}", f"--cluster-token-file={self.token_file}", *urls)
        program = (_PROGRAM, kill) if kill else ("-m", "ema_service")
        server = ServerProcess(folder, (*member, *self._arguments, *arguments), folder / "data", program)
        self.hosts[place] = server
        try:
            return server.start()
        except RuntimeError:
            if not kill:  # it may be told before the host is there
                raise
            return server

    def kill(self, place: int) -> None:
        self.hosts[place].kill()

    def end(self) -> None:
        """End all that runs."""
        for server in self.hosts.values():
            if server.process.poll() is None:
                server.kill()
        self.coordinators.end()

    def log(self) -> str:
        """What all have printed."""
        return "".join(f"--- host {place}\n{host.log}" for place, host in self.hosts.items()) + self.coordinators.log()

    # --- what is asked of them --------------------------------------------------------------------------------------

    def once(self, place: int, method: str, path: str, **more: Any) -> httpx.Response:
        """One request to a host."""
        return httpx.request(method, self.hosts[place].url + path, timeout=_SECONDS, **more)

    def ask(self, place: int, method: str, path: str, **more: Any) -> httpx.Response:
        """One request to a host, again while the host is away or says to come again."""
        until = time.monotonic() + _SECONDS
        while True:
            try:
                response = self.once(place, method, path, **more)
                if response.status_code != 503:
                    return response
                said = response.text
            except httpx.TransportError as fault:
                said = repr(fault)
            assert time.monotonic() < until, f"{method} {path}: {said}\n{self.log()}"
            time.sleep(0.05)

    def ask_all(self, method: str, path: str, contents: Sequence[bytes] | None = None, **more: Any) -> list[Any]:
        """One request to each host, at once. contents: by place."""
        with ThreadPoolExecutor(self.of) as threads:
            bodies = [{"content": content} for content in contents] if contents else [{}] * self.of
            asked = [threads.submit(self.ask, p, method, path, **body, **more) for p, body in enumerate(bodies)]
            return [each.result() for each in asked]

    def create(self, tensors: Mapping[str, Tensor], place: int = 0, run: str = "r", **config: Any) -> httpx.Response:
        layout = [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in specs_of(tensors)]
        return self.ask(place, "POST", "/v1/runs", json={"run": run, "layout": layout, **config})

    def push(self, path: str, tensors: Mapping[str, Tensor], key: str, run: str = "r", **headers: str) -> list[Any]:
        """Send each host its slice of the initial weights, or of an update, until all have answered."""
        bodies = [save(part) for part in cut(tensors, self.of)]
        return self.ask_all("PUT", f"/v1/runs/{run}/{path}", bodies, headers={"Ema-Push": key, **headers})

    def infos(self, run: str = "r") -> list[dict[str, Any]]:
        return [response.raise_for_status().json() for response in self.ask_all("GET", f"/v1/runs/{run}")]

    def shadows(self, run: str = "r") -> list[dict[str, Tensor]]:
        """What each host has."""
        return [
            load(response.raise_for_status().content) for response in self.ask_all("GET", f"/v1/runs/{run}/weights")
        ]

    def at_all(self, path: str) -> set[int]:
        """With which statuses the hosts answer a question."""
        return {response.status_code for response in self.ask_all("GET", path)}

    def wait_for_end(self, place: int) -> None:
        """Wait until a host has ended itself."""
        self.until(lambda: self.hosts[place].process.poll() is not None, f"the end of host {place}")

    def folders(self, place: int) -> list[str]:
        """The folders of runs in a host's data dir."""
        return sorted(folder.name for folder in (self.folder / f"host-{place}" / "data" / "runs").iterdir())

    def until(self, what: Callable[[], bool], why: str) -> None:
        """Wait for something to be so."""
        until = time.monotonic() + _SECONDS
        while not what():
            assert time.monotonic() < until, f"{why}\n{self.log()}"
            time.sleep(0.02)
