"""The benchmark's processes: started, waited for until they say where they listen, and ended whatever happens.

Each process is tethered to this one by a pipe (ema_service.tether), so that it ends even if this one is killed,
and leads a session of its own, so that Ctrl-C at the terminal reaches this process only.

Knows processes and signals. Does not know what the children do.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Self

from ema_service.bench import machine

__all__ = ["BenchFailed", "Child", "Service", "Stopped", "stoppable", "undisturbed"]

#: Seconds that a process has to get ready: importing torch on a busy machine takes ten.
START_SECONDS = 90.0
STOP_SECONDS = 10.0
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LISTENS = re.compile(r"listens on (\S+)")


class BenchFailed(Exception):
    """The benchmark cannot go on; the text says why."""


class Stopped(BaseException):
    """The user, or the system, asked the benchmark to stop. Like KeyboardInterrupt, not an Exception."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within the block, SIGINT, SIGTERM and SIGHUP raise Stopped, so that every ``with`` and ``finally`` does its
    work."""

    def stop(signum: int, _frame: FrameType | None) -> None:
        raise Stopped(signum)

    with _handlers(stop):
        yield


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Within the block, SIGINT, SIGTERM and SIGHUP wait: cleaning up is finished even for an impatient user.

    By a handler and not by SIG_IGN, which a child started within the block would inherit.
    """
    waiting: list[int] = []
    with _handlers(lambda signum, _frame: waiting.append(signum)):
        yield
    if waiting:
        signal.raise_signal(waiting[0])


@contextlib.contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    former = {signum: signal.signal(signum, handler) for signum in _ENDING}
    try:
        yield
    finally:
        for signum, earlier in former.items():
            signal.signal(signum, earlier)


class Child:
    """``python -m module arguments``: running within the ``with`` block, gone after it.

    path: a folder to find the module in. says: a sentence of the child to wait for, by default ``listens on ADDRESS``;
    its first group becomes ``said``. Entering raises BenchFailed, with the child's output, where the child ends or
    stays silent for ``patience`` seconds instead.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        *,
        path: Path | None = None,
        says: re.Pattern[str] = LISTENS,
        patience: float = START_SECONDS,
    ) -> None:
        self._module = module
        self._says = says
        self._patience = patience
        self._command = [sys.executable, "-m", "ema_service.tether", module, *arguments]
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if path is not None:
            former = os.environ.get("PYTHONPATH")
            self._environment["PYTHONPATH"] = os.pathsep.join([str(path), former] if former else [str(path)])
        self._clean = contextlib.ExitStack()
        self.said = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        """Everything that the child printed so far."""
        return Path(self._log.name).read_text(errors="replace")

    def kill(self) -> None:
        """End the child as ``kill -9`` does, and wait for its end."""
        self._process.kill()
        self._process.wait()

    def peak_bytes(self) -> int | None:
        """Most memory that the child ever had resident, see machine.peak_bytes()."""
        return machine.peak_bytes(self.pid)

    def __enter__(self) -> Self:
        with undisturbed():
            self._log = self._clean.enter_context(tempfile.NamedTemporaryFile(prefix="ema-bench-"))
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                env=self._environment,
                start_new_session=True,
            )
            self._clean.callback(self._end)
        try:
            self.said = self._wait()
        except BaseException:
            self._clean.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with undisturbed():
            self._clean.close()

    def _wait(self) -> str:
        deadline = time.monotonic() + self._patience
        while not (found := self._says.search(self.log)):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BenchFailed(f"{self._module} did not get ready:\n{self.log}")
            time.sleep(0.02)
        return found[1]

    def _end(self) -> None:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


class Service(Child):
    """``ema-service serve`` of the benchmark's own; ``url`` and ``uds`` reach it.

    data_dir: where runs are kept; None: ``--memory``. program, path: as for Child, to run something else in its place.
    """

    def __init__(
        self,
        *arguments: str,
        data_dir: Path | None = None,
        program: str = "ema_service",
        path: Path | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ema-bench-")
        socket = Path(self._folder.name) / "ema.sock"
        self.uds = f"unix://{socket}"
        where = ["--memory"] if data_dir is None else ["--data-dir", str(data_dir)]
        super().__init__(program, ["serve", *where, "--port", "0", "--uds", str(socket), *arguments], path=path)
        self._clean.callback(self._folder.cleanup)

    @property
    def url(self) -> str:
        return self.said
