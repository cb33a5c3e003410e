"""Keeps processes running: each that ends is started again, after a pause that grows, until all are told to end.

    program's output --> a line each, with the program's name before it --> the caller
    standard input <-- held open for as long as the program is to run (ema_service.tether)

So a program ends with its supervisor, however that ends, and also on another machine, behind whatever carries standard
input there. Each program leads its own session: Ctrl-C at the terminal reaches the supervisor alone.

Knows processes, pipes and signals. Does not know what the programs do.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import TypeAlias

from ema_service.tether import GRACE

__all__ = ["Ended", "Events", "Program", "Signalled", "Supervisor", "caught_signals"]

#: Seconds before the first restart, and the most: doubled at each end that comes early.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 2.0
#: Seconds after which a process has lived, for one that cannot start has ended by then: its next end is a first one.
_LIVED = 3.0


@dataclass(frozen=True, slots=True)
class Program:
    """What is to be kept running. said_first: written to its standard input, which then stays open. for_good: the exit
    status after which it is not started again."""

    name: str
    command: Sequence[str]
    said_first: bytes = b""
    for_good: int | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """A process has ended. status: as Popen has it."""

    name: str
    status: int


@dataclass(frozen=True, slots=True)
class Signalled:
    """The supervisor was asked to stop."""


Event: TypeAlias = Ended | Signalled
Events: TypeAlias = "queue.SimpleQueue[Event]"


@contextlib.contextmanager
def caught_signals(events: Events) -> Iterator[None]:
    """Turns SIGINT, SIGTERM and SIGHUP into events within the block: nothing interrupts what starts or ends a process.

    In a thread other than the main one nothing changes.
    """

    def put(_number: int, _frame: FrameType | None) -> None:
        events.put(Signalled())

    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    main = threading.current_thread() is threading.main_thread()
    former = {number: signal.signal(number, put) for number in caught} if main else {}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@dataclass(slots=True)
class _Kept:
    """A program, and its process of now. early: ends in a row that came early. due: when to start it again."""

    program: Program
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    early: int = 0
    due: float | None = None
    readers: list[threading.Thread] = field(default_factory=list)


class Supervisor:
    """Programs that are kept running. Leaving the context ends all, the last started first.

    say: called with a program's name and a line of its output, on a thread of each program. may_start: whether a
    program that has ended may be started again now; asked until it may.
    """

    def __init__(
        self, events: Events, say: Callable[[str, str], None], may_start: Callable[[], bool] = lambda: True
    ) -> None:
        self._events = events
        self._say = say
        self._may_start = may_start
        self._kept: dict[str, _Kept] = {}

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(*reversed(self._kept))

    def keep(self, program: Program) -> None:
        """Start a program, and keep it running. Raises OSError where it cannot be started."""
        kept = self._kept[program.name] = _Kept(program)
        self._start(kept)

    def next(self, seconds: float) -> Event | None:
        """The next event, or None after so many seconds. Starts again meanwhile what has ended."""
        until = time.monotonic() + seconds
        while True:
            self._start_due()
            wait = max(0.0, min([until, *(each.due for each in self._kept.values() if each.due)]) - time.monotonic())
            try:
                event = self._events.get(timeout=wait)
            except queue.Empty:
                if time.monotonic() >= until:
                    return None
                continue
            if isinstance(event, Ended):
                self._note(event)
            return event

    def pids(self) -> list[int]:
        """The processes that run, in the order in which the programs were given."""
        return [each.process.pid for each in self._kept.values() if each.process]

    def tell(self, name: str, word: bytes) -> None:
        """Write to the standard input of a program, where its process runs: a sign of life (ema_service.tether)."""
        process = self._kept[name].process
        if process and process.stdin:
            with contextlib.suppress(OSError):  # the process is gone, and that is an event
                process.stdin.write(word)
                process.stdin.flush()

    def end(self, *names: str) -> None:
        """End programs, all at once: ask, wait for GRACE seconds at the most, kill. No process is left."""
        ending = [each for name in names if (each := self._kept.pop(name, None))]
        for each in ending:
            if each.process and each.process.stdin:
                with contextlib.suppress(OSError):  # what was to be said first, where the process is gone
                    each.process.stdin.close()
        deadline = time.monotonic() + GRACE
        for each in ending:
            if each.process:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    each.process.wait(max(0.0, deadline - time.monotonic()))
                _kill(each.process)
        for each in ending:
            for reader in each.readers:
                reader.join(GRACE)

    # ----------------------------------------------------------------------------------------------------------------

    def _start_due(self) -> None:
        for each in self._kept.values():
            if each.due is not None and each.due <= time.monotonic():
                if self._may_start():
                    self._start(each)
                else:
                    each.due = time.monotonic() + _FIRST_PAUSE

    def _start(self, kept: _Kept) -> None:
        process = subprocess.Popen(
            kept.program.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"},
            start_new_session=True,
        )
        kept.process, kept.began, kept.due = process, time.monotonic(), None
        if process.stdin:
            with contextlib.suppress(BrokenPipeError):  # it ended at once, and that is an event
                process.stdin.write(kept.program.said_first)
                process.stdin.flush()
        reader = threading.Thread(target=self._read, args=(kept.program.name, process), daemon=True)
        reader.start()
        kept.readers = [each for each in kept.readers if each.is_alive()] + [reader]

    def _read(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Say what a process prints, until it ends."""
        for line in process.stdout or ():
            self._say(name, line.decode(errors="replace").rstrip("\n"))
        if process.stdout:
            process.stdout.close()
        self._events.put(Ended(name, process.wait()))

    def _note(self, event: Ended) -> None:
        """Have a program started again in a while."""
        kept = self._kept.get(event.name)
        if kept is None or kept.process is None:
            return
        _kill(kept.process)
        kept.process = None
        if event.status == kept.program.for_good:
            return
        kept.early = 0 if time.monotonic() - kept.began > _LIVED else kept.early + 1
        pause = min(_FIRST_PAUSE * 2.0 ** min(max(kept.early - 1, 0), 10), _LONGEST_PAUSE)
        kept.due = time.monotonic() + pause


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and whatever it started, and let go of it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        with contextlib.suppress(OSError):
            process.stdin.close()
