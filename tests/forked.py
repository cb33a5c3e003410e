"""Processes in a second less: forked from one that has loaded what each of them would load first (preloaded.py).

Servers, and ranks of trainers, are so. What runs in each is what ``python -m ema_service`` or ``python FILE`` runs, in
a process of its own that is killed and ends like any other; spared are the start of the interpreter, the imports, and
the loading of the compiled loops. The command itself is started by tests/e2e/test_bench.py and test_demo.py.

Knows processes and how Python is told what to run. Does not know flags, or when a server is ready.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Forked"]

# pytest is the main module of whoever asks, and multiprocessing imports that in each process.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pytest", "tests.preloaded"])


class Forked:
    """A process, with as much of subprocess.Popen as servers need. It is ended at the latest when the tests are.

    command: what follows ``python``: a file or "-m" and a module, then the arguments. log: where its output goes.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._process = _CONTEXT.Process(target=_run, args=(list(command), dict(os.environ), str(log)), daemon=True)
        self._process.start()
        self.pid = self._process.pid or 0

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """The exit status. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(command: list[str], environ: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(environ)
    for stream, output in ((sys.stdout, 1), (sys.stderr, 2)):
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, output)
        os.close(descriptor)
        stream.reconfigure(line_buffering=True)  # type: ignore[attr-defined]  # typed as what a test may put there
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
