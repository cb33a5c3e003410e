"""The end of a host that may have been replaced: nobody hears it any more, or a later process of the host is there.

A host that is cut off goes on for as long as its machine does: 120 seconds after the engine had called it dead, as seen
with Ray, while a successor of it starts elsewhere. So a host with a *lease* ends itself after so many seconds without a
word of a coordinator and without a word of the engine that started it. One of the two is enough to go on: a coordinator
that is being restarted ends no host, nor does a head node that is away.

It ends at once, without a word to its readers and without checkpoints: by then its data dir may be another process's,
and what it answered is kept. So it ends as by SIGKILL, which every run but those of durability ``memory`` outlives.

Who replaced it is looked for on a thread of its own: where the host's storage is away as well, the look never ends.

Knows a clock and two threads. Does not know who says a word, or how a host learns that it was replaced.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

__all__ = ["ENDED", "Lease"]

_log = logging.getLogger(__name__)

#: The exit status of a host that ended itself: EX_TEMPFAIL of sysexits(3), for whoever may start it again.
ENDED = 75
#: Most seconds between two looks.
_LOOK_SECONDS = 0.5
#: Seconds for a look that is under way to end: one at storage that is away does not.
_JOIN_SECONDS = 5.0


class Lease:
    """Looks, on two threads, whether this process may go on; from start() to close()."""

    def __init__(
        self,
        seconds: float | None,
        heard: Callable[[], float],
        replaced: Callable[[], str],
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """seconds: without a word of anybody, after which the process ends; None for as many as it takes. heard: when
        the latest word came, by time.monotonic(). replaced: by whom, empty by nobody. end: called with the exit status
        where the process may not go on."""
        self._seconds = seconds
        self._heard = heard
        self._end = end
        self._closed = threading.Event()
        looks = {"ema-lease": self._unheard, "ema-replaced": replaced}
        self._threads = [
            threading.Thread(target=self._look, args=(look,), name=name, daemon=True) for name, look in looks.items()
        ]

    def start(self) -> None:
        """Begin to look. The lease counts from now on, whoever was heard before."""
        self._began = time.monotonic()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        for thread in self._threads:
            if thread.ident:
                thread.join(_JOIN_SECONDS)

    def _look(self, look: Callable[[], str]) -> None:
        """Look until there is a reason to end the process."""
        pause = min(_LOOK_SECONDS, self._seconds / 4) if self._seconds else _LOOK_SECONDS
        while not self._closed.wait(pause):
            if why := look():
                _log.critical("this host ends at once: %s", why)
                self._end(ENDED)
                return

    def _unheard(self) -> str:
        """Why the lease is over, empty where it is not."""
        if self._seconds is None:
            return ""
        silence = time.monotonic() - max(self._began, self._heard())
        if silence <= self._seconds:
            return ""
        return (
            f"for {silence:.1f} seconds it has heard neither a coordinator nor what started it, and may have been "
            "replaced elsewhere"
        )
