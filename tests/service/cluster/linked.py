"""A cluster whose programs are on machines of a network, each behind a link of its own: coordinator and gateway on one,
each host on one, one more for a host that is started elsewhere, and one for trainers and readers.

Knows the programs' command lines, and which machine each of them is on. Does not know what is tried with links.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from ema_client import EmaClient
from tests.benchmarks.namespaces import Network
from tests.forked import Forked
from tests.service.cluster.processes.coordinating import TOKEN
from tests.waiting import wait_until

__all__ = ["CORE", "SPARE", "TRAINER", "Linked"]

CORE, SPARE, TRAINER = "core", "spare", "trainer"
_PROGRAM = Path(__file__).parent / "processes" / "placed.py"
#: Of the coordinator's port, which is its machine's own.
_PORT = 8469


class Linked:
    """A cluster of so many hosts, until the block ends. All processes end with this one."""

    def __init__(self, folder: Path, hosts: int, *, rate: int | None = None, lease: float | None = None) -> None:
        """rate: of each link, megabits a second. lease: of each host, which then shares its storage with others, where
        locks keep nobody out; None for neither."""
        self.folder, self.of, self._lease = folder, hosts, lease
        machines = [CORE, SPARE, TRAINER, *map(self.machine, range(hosts))]
        self.network = Network(dict.fromkeys(machines, rate))
        self._started: list[Forked] = []
        #: By place, the newest process of a host.
        self.hosts: dict[int, Forked] = {}
        self.url = ""
        (folder / "token").write_text(f"{TOKEN}\n")

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.enter_context(self.network)
            undo.callback(self._end)
            address = self.network.address(CORE)
            secret = ["--cluster-token-file", str(self.folder / "token")]
            self._start(
                CORE, "coordinator", ["cluster", "coordinator", "--host", address, "--port", str(_PORT), *secret]
            )
            self._known = ["--coordinator", f"http://{address}:{_PORT}", *secret]
            for place in range(self.of):
                self.host(place, self.machine(place))
            words = ["cluster", "gateway", "--host", address, "--port", "0", "--insecure-no-auth", *self._known]
            self.url = self._said("gateway", self._start(CORE, "gateway", words))
            for place in range(self.of):
                self.ready(place)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @staticmethod
    def machine(place: int) -> str:
        """Where a host is at first."""
        return f"host-{place}"

    def host(self, place: int, machine: str) -> None:
        """Start a host on a machine, with the data dir of its place. Returns at once."""
        address = self.network.address(machine)
        data = ["--data-dir", str(self.folder / f"data-{place}")]
        flags = ["--shard", f"{place}/{self.of}", "--host", address, "--port", "0", "--insecure-no-auth", *self._known]
        lease = [] if self._lease is None else ["--lease", str(self._lease)]
        program = [] if self._lease is None else ["unlocked"]
        self.hosts[place] = self._start(machine, f"host-{place}", [*program, "serve", *data, *flags, *lease])

    def ready(self, place: int) -> None:
        """Return once a host listens."""
        self._said(f"host-{place}", self.hosts[place])

    @contextlib.contextmanager
    def client(self, *, straight: bool = True) -> Iterator[EmaClient]:
        """Of a trainer or reader on its machine. straight: whatever has some kilobytes goes to the hosts, and nothing
        by way of the gateway; otherwise all does."""
        with self.network.at(TRAINER), EmaClient(self.url) as client:
            client._pushes._stretched_above = client._pulls._pulls._split_above = 1 << (12 if straight else 40)
            yield client

    def log(self, name: str = "*") -> str:
        """What processes have printed: all, or those of a name."""
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{name}.*.log")))

    # ----------------------------------------------------------------------------------------------------------------

    def _start(self, machine: str, name: str, words: Sequence[str]) -> Forked:
        log = self.folder / f"{name}.{len(self._started)}.log"
        log.touch()
        self._started.append(Forked([str(_PROGRAM), self.network.namespace(machine), *words], log))
        return self._started[-1]

    def _said(self, name: str, process: Forked) -> str:
        """The address that a program says."""
        log = self.folder / f"{name}.{self._started.index(process)}.log"
        wait_until(lambda: "listens on" in log.read_text() or process.poll() is not None, f"{name} to listen")
        found = re.search(r"listens on (\S+)", log.read_text())
        assert found, log.read_text()
        return found[1]

    def _end(self) -> None:
        for process in self._started:
            process.kill()
        for process in self._started:
            process.wait(30)
