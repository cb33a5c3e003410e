"""The end of the program: what is on its way is waited for, and no thread outlives the interpreter.

Knows: atexit, forks, which publishers run. Does not know: updates, or how a publisher ends.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import weakref
from typing import Protocol

from ema_client.forks import Lock, tell_in_child

__all__ = ["PROGRAM", "ProgramEnd"]

#: Seconds that a thread with nothing more to do is given to end.
LAST_SECONDS = 1.0


class _Ending(Protocol):
    def end_with_program(self, began: float) -> None:
        """Send what is pending, for a bounded time from ``began`` (time.monotonic) on, and end. Does not raise."""


class ProgramEnd:
    """The publishers to wait for at the end of the program, all within the same time. Thread-safe."""

    def __init__(self) -> None:
        self._running: set[_Ending] = set()
        #: Threads of ended publishers too, as long as they live.
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self._lock = Lock()

    @property
    def running(self) -> frozenset[_Ending]:
        """The publishers watched now."""
        return frozenset(self._running)

    def watch(self, publisher: _Ending, thread: threading.Thread) -> None:
        """Wait for ``publisher``, whose ``thread`` is about to start, at the end of the program."""
        with self._lock:
            self._threads.add(thread)
            if not self._running:
                # Anew, so that finish() runs before what was registered meanwhile, such as the closing of connections.
                atexit.unregister(self.finish)
                atexit.register(self.finish)
            self._running.add(publisher)

    def forget(self, publisher: _Ending) -> None:
        """Do not wait for ``publisher``, which has ended."""
        with self._lock:
            self._running.discard(publisher)

    def finish(self) -> None:
        """End all publishers, which share one time limit, and wait for their threads."""
        began = time.monotonic()
        for publisher in list(self._running):
            # Whoever presses Ctrl-C once more at the end wants the end.
            with contextlib.suppress(KeyboardInterrupt):
                publisher.end_with_program(began)
        # A thread that frees a tensor while the interpreter ends crashes the interpreter. A thread that hangs in a
        # socket frees nothing, and is not waited for any longer.
        for thread in list(self._threads):
            thread.join(LAST_SECONDS)

    def after_fork(self) -> None:
        """Wait for nothing: a forked process has none of the threads."""
        self._running.clear()
        self._threads.clear()


#: The end of the program.
PROGRAM = ProgramEnd()
tell_in_child(PROGRAM)
