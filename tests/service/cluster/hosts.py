"""Processes of one cluster: coordinators and shards on real ports, their trainer, and what their disks have to show.

Knows how to start, end and ask them. Does not know what is tried with them.
"""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from ema_service.cluster import Change, Record, decode, encode
from tests.forked import Forked
from tests.service.cluster.processes.coordinating import TOKEN
from tests.service.cluster.processes.holding import RUN
from tests.waiting import wait_until

__all__ = ["Disk", "Hosts", "Push"]

_PROGRAMS = Path(__file__).parent / "processes"
_SECONDS = 30.0


class Disk(NamedTuple):
    """What a shard has durably. log: outcomes, by revision."""

    record: Record
    log: list[str]


class Hosts:
    """k shards and their coordinators.

    acknowledged: keys of updates that a trainer was told are committed. of_shard: each shard's newest process. ports:
    of coordinators, in the order of their start.
    """

    def __init__(
        self, folder: Path, shards: int = 2, *, program: str = "holding.py", words: Sequence[str] = (), talk: str = RUN
    ) -> None:
        """program: that a shard runs. words: the last of its arguments. talk: the name of the talk about the run."""
        self.folder = folder
        self._program, self._words, self._talk = program, words, talk
        self.shards = shards
        self.acknowledged: set[str] = set()
        self._started: list[Forked] = []
        self.of_shard: dict[int, Forked] = {}
        self.ports: list[int] = []

    # --- processes --------------------------------------------------------------------------------------------------

    def coordinate(self, port: int = 0, kill: str = "") -> Forked:
        """Start a coordinator. kill: where it ends itself, as in ``say 3``."""
        log = self._log("coordinator")
        process = self._coordinator = self._start([str(_PROGRAMS / "coordinating.py"), str(port), *kill.split()], log)
        wait_until(lambda: re.search(r"port \d+\n", log.read_text()) or process.poll() is not None, "a port")
        found = re.search(r"port (\d+)\n", log.read_text())
        assert found, log.read_text()
        if int(found[1]) not in self.ports:
            self.ports.append(int(found[1]))
        return process

    def hold(self, place: int, kill: str = "") -> Forked:
        """Start a shard, which talks to every coordinator that was started so far. kill: as in ``after vote 1``."""
        urls = ",".join(f"http://127.0.0.1:{port}" for port in self.ports)
        words = [str(self.folder), str(place), str(self.shards), urls, *self._words]
        point = kill.rsplit(" ", 1) if kill else []
        process = self._start([str(_PROGRAMS / self._program), *words, *point], self._log(f"shard-{place}"))
        self.of_shard[place] = process
        return process

    def kill(self, place: int) -> None:
        """End a shard's process."""
        self.of_shard[place].kill()
        self.of_shard[place].wait(_SECONDS)

    def kill_coordinator(self) -> None:
        """End the coordinator that was started last."""
        self._coordinator.kill()
        self._coordinator.wait(_SECONDS)

    def coordinator_is_gone(self) -> bool:
        """Whether the coordinator that was started last has ended."""
        return self._coordinator.poll() is not None

    def end(self) -> None:
        """End all that runs."""
        for process in self._started:
            process.kill()
            process.wait(_SECONDS)

    def log(self) -> str:
        """What all processes have printed."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def _log(self, name: str) -> Path:
        path = self.folder / f"{name}-{len(self._started)}.log"
        path.touch()
        return path

    def _start(self, command: list[str], log: Path) -> Forked:
        self._started.append(Forked(command, log))
        return self._started[-1]

    # --- what they have and say -------------------------------------------------------------------------------------

    def disk(self, place: int) -> Disk:
        """What a shard has durably."""
        path = self.folder / f"{place}.json"
        found = json.loads(path.read_text()) if path.exists() else {"record": encode(Record()), "log": []}
        return Disk(decode(found["record"], Record), found["log"])

    def disks(self) -> list[Disk]:
        return [self.disk(place) for place in range(self.shards)]

    def agreed(self) -> list[str]:
        """The keys that led to the revision of all shards, once nothing is under way any more; with what was promised
        looked at."""

        def settled() -> bool:
            disks = self.disks()
            return all(disk.record.vote is None and disk.log == disks[0].log for disk in disks)

        wait_until(settled, f"all to be resolved:\n{self.disks()}\n{self.log()}", _SECONDS)
        disks = self.disks()
        keys = [outcome.split()[0] for outcome in disks[0].log]
        assert len(set(keys)) == len(keys), "a key led to two revisions"
        assert self.acknowledged <= set(keys), "what was acknowledged is lost"
        assert {disk.record.revision for disk in disks} == {len(keys)}
        assert len({disk.record.made for disk in disks}) == 1
        return keys

    def ask(self, method: str, path: str, port: int | None = None, **more: Any) -> httpx.Response:
        """One request to a coordinator, with the token."""
        headers: Mapping[str, str] = more.pop("headers", {"Authorization": f"Bearer {TOKEN}"})
        url = f"http://127.0.0.1:{port or self.ports[0]}{path}"
        return httpx.request(method, url, headers=headers, timeout=_SECONDS, **more)

    def change(self, key: str, change: str) -> Any:
        """Ask for a change, again at each failure, and return what became of it."""
        while True:
            try:
                answer = self.ask("POST", f"/v1/runs/{self._talk}/changes", content=encode(Change(key, change)))
            except httpx.TransportError:
                continue
            if answer.status_code == 200:
                return answer.json()["answer"]

    def push(self, place: int, step: int, key: str) -> Push:
        """Send one slice of an update, and go on sending until it is answered."""
        return Push(self, place, step, key)

    def push_all(self, step: int, key: str) -> None:
        """Send all slices of an update until all shards say that it is committed."""
        for push in [self.push(place, step, key) for place in range(self.shards)]:
            assert push.answer() == {"committed": True, "reason": ""}


class Push:
    """A slice that a trainer sends until it is answered: committed, or refused."""

    def __init__(self, hosts: Hosts, place: int, step: int, key: str) -> None:
        self._hosts = hosts
        self._path = str(hosts.folder / f"{place}.sock")
        self._line = json.dumps({"step": step, "key": key}).encode() + b"\n"
        self._key = key
        self._given_up = False
        self._answer: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def answer(self) -> dict[str, Any]:
        """What became of the slice."""
        self._thread.join(_SECONDS)
        assert self._answer is not None, f"{self._key} was not answered:\n{self._hosts.disks()}\n{self._hosts.log()}"
        return self._answer

    def answered(self) -> bool:
        return self._answer is not None

    def give_up(self) -> None:
        """The trainer is gone, once it has sent the slice once."""
        self._given_up = True

    def _send(self) -> None:
        wait = threading.Event()
        while True:
            answer = self._once()
            if answer and (answer["committed"] or answer["reason"] not in ("", "storage_failed")):
                if answer["committed"]:
                    self._hosts.acknowledged.add(self._key)
                self._answer = answer
            if self._answer or self._given_up:
                return
            wait.wait(0.02)

    def _once(self) -> dict[str, Any] | None:
        """Send the slice once. None where the host ended meanwhile."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_SECONDS)
            try:
                sock.connect(self._path)
                sock.sendall(self._line)
                said = sock.makefile("rb").read()
            except OSError:
                return None
        return json.loads(said) if said else None
