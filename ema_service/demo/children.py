"""Starts the demo's processes, hears what they say, and ends every one of them however the demo ends.

Each child leads its own session, so that Ctrl-C at the terminal reaches the parent only, and the parent decides how all
end; each is tethered to the parent by a pipe (tether.py), so that the child ends even if the parent is killed. Signals
become events in the same queue as the children's lines: nothing interrupts the parent between starting a child and
noting the child down, nor while the parent cleans up.

Knows processes, pipes and signals. Does not know what the children do.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self

#: Seconds that all children together get from SIGTERM to SIGKILL. A server writes its checkpoint in this time.
GRACE = 8.0
#: Lines of a failed child's stderr worth showing.
TAIL = 15


@dataclass(frozen=True, slots=True)
class Said:
    """A child process wrote a line to its output."""

    child: str
    line: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A child closed its output: the child has ended, or hangs."""

    child: str


@dataclass(frozen=True, slots=True)
class Signalled:
    """The parent was asked to stop."""

    signum: int


Event = Said | Ended | Signalled
Events = queue.SimpleQueue[Event]


@contextlib.contextmanager
def caught_signals(events: Events) -> Iterator[None]:
    """Turns SIGINT, SIGTERM and SIGHUP into events within the block. SimpleQueue.put may be called in a signal
    handler."""

    def put(signum: int, _frame: FrameType | None) -> None:
        events.put(Signalled(signum))

    # Python allows handlers in the main thread only; on another thread the caller has its own way of stopping.
    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    main = threading.current_thread() is threading.main_thread()
    former = {signum: signal.signal(signum, put) for signum in caught} if main else {}
    try:
        yield
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


class Children:
    """The child processes; leaving the context ends all of them.

    logs: a folder for their stderr, one file each.
    """

    def __init__(self, events: Events, logs: Path) -> None:
        self._events = events
        self._logs = logs
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._listeners: list[threading.Thread] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(self, name: str, module: str, arguments: Sequence[str], *, threads: int | None = None) -> None:
        """Run ``python -m module`` as a child. threads: how many the child computes with; None: as many as cores."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "COLUMNS": "200"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with self._log(name).open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ema_service.tether", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        self._processes[name] = process
        listener = threading.Thread(target=self._listen, args=(name, process), name=f"hear-{name}", daemon=True)
        listener.start()
        self._listeners.append(listener)

    def status(self, name: str) -> int:
        """How a child ended after closing its output: 0, its exit status, or minus the signal that killed it."""
        try:
            return self._processes[name].wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL  # the child closed its output and hangs; end() will kill it

    def tail(self, name: str) -> str:
        """The last lines that a child wrote to stderr."""
        return "\n".join(self._log(name).read_text(errors="replace").splitlines()[-TAIL:])

    def end(self) -> None:
        """End all children that still run: ask, wait at most GRACE seconds, kill. No child is left, not even a
        zombie."""
        for process in self._processes.values():
            process.terminate()
        deadline = time.monotonic() + GRACE
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            # The whole session, also after its leader's end: the child's own helpers must not stay either.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._close()

    def _close(self) -> None:
        for listener in self._listeners:
            listener.join(timeout=GRACE)
        for process in self._processes.values():
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _listen(self, name: str, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            self._events.put(Said(name, line))
        self._events.put(Ended(name))

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"
