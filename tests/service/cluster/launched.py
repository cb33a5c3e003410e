"""A cluster that ``ema-service cluster up`` has started, all of it processes: where it is, who is who, and their ends.

Knows the command, and what it prints. Does not know what is tried with a cluster.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx

from tests.waiting import wait_until

__all__ = ["Launched", "gone"]

_SECONDS = 60.0


class Launched:
    """One launcher's process. url: of the gateway, once start() has returned."""

    def __init__(self, folder: Path, *flags: str, programs: Path | None = None) -> None:
        """programs: a folder that the path of commands begins with."""
        self.folder = folder
        self.url = ""
        self._flags = flags
        self._programs = programs
        self._log = folder.parent / f"{folder.name}.log"

    @property
    def log(self) -> str:
        """Everything that was printed so far."""
        return self._log.read_text() if self._log.exists() else ""

    def start(self) -> Launched:
        """Start, or start again over the same folder, and wait until all are ready."""
        self._log.write_text("")
        path = os.environ["PATH"]
        environment = {**os.environ, "PATH": f"{self._programs}:{path}" if self._programs else path}
        with self._log.open("a") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log, env=environment)
        wait_until(lambda: self._announced() or self.process.poll() is not None, "the cluster", _SECONDS)
        assert self.process.poll() is None, self.log
        return self

    def _announced(self) -> bool:
        found = re.search(r"cluster of \d+ hosts?, listens on (https?://\S+)", self.log)
        self.url = found[1] if found else ""
        return bool(found)

    def command(self) -> Sequence[str]:
        """The command line."""
        up = ["-m", "ema_service", "cluster", "up", "--dir", str(self.folder), "--port", "0", *self._flags]
        return [sys.executable, *up]

    def http(self) -> httpx.Client:
        """A plain client of the gateway."""
        return httpx.Client(base_url=self.url, timeout=_SECONDS)

    def processes(self) -> dict[str, int]:
        """name -> the process, of all that the launcher keeps."""
        named = {}
        for pid in _children(self.process.pid):
            words = _command(pid)
            if "coordinator" in words:
                named["coordinator"] = pid
            elif "gateway" in words:
                named["gateway"] = pid
            elif "--replica-of" in words:
                place = words[words.index("--replica-of") + 1].split("/")[0]
                number = sum(name.endswith(f"of host {place}") for name in named)
                named[f"replica {number} of host {place}"] = pid
            elif "--shard" in words:
                named[f"host {words[words.index('--shard') + 1].split('/')[0]}"] = pid
        return named

    def kill(self, name: str, *, wait: bool = True) -> None:
        """SIGKILL one of the processes; the launcher starts it again. wait: for its end."""
        wait_until(lambda: name in self.processes(), f"{name} to be there")
        before = self.processes()[name]
        os.kill(before, signal.SIGKILL)
        if not wait:
            return
        wait_until(lambda: self.processes().get(name) != before, f"the end of {name}")

    def stop(self) -> int:
        """End the launcher as an operator would, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_SECONDS)

    def end(self) -> None:
        """No process of it is left."""
        children = _children(self.process.pid)
        self.process.kill()
        self.process.wait(_SECONDS)
        for pid in children:
            wait_until(lambda pid=pid: gone(pid), f"the end of {pid}", _SECONDS)


def gone(pid: int) -> bool:
    """Whether a process is there no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def _children(pid: int) -> list[int]:
    """The children of a process, started by any of its threads."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(each) for each in task.read_text().split()]
        except FileNotFoundError:
            continue
    return found


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except FileNotFoundError:
        return []
