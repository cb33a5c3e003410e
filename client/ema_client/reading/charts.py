"""Charts of a run: a thread asks the service how the run does, every few seconds, and hands the numbers to a logger.

Knows: when to ask, which numbers are new, what happens where the service or the logger fails. Does not know: the client
(what is asked comes as Sources), what the numbers are (health), where they are drawn (loggers).
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from ema_client.errors import EmaError
from ema_client.forks import Home
from ema_client.protocol import History, RunInfo
from ema_client.reading.health import Measured, behind, latest, measurements
from ema_client.reading.loggers import Logger

__all__ = ["Charts", "Sources"]

_log = logging.getLogger("ema_client")

#: Seconds between two looks at the run, which are two small requests each: the first, doubled until the longest.
FIRST_PAUSE, PAUSE = 0.5, 5.0
#: Measurements of the run that are shown of each look: one each second at most, in the long run.
POINTS = 5
#: Seconds that the end of a training, or of the program, waits for the last look.
LAST_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the numbers come from. Calls may raise EmaError, and are made by the charts' own thread.

    info: the run as it stands. history: measurements after a time, at most so many; None: from the beginning, and as
    many as the service gives by default. step: in a trainer, its step; None elsewhere.
    """

    info: Callable[[], RunInfo]
    history: Callable[[float | None, int | None], History]
    step: Callable[[], int] | None = None


class Charts:
    """Hands the numbers of a run to a logger, from start() to stop(), in a thread of its own.

    A service that is away, or refuses, leaves a gap in the charts. What the logger raises is logged once, and the next
    numbers are tried. The end of the program stops the charts; a forked process has none.

    Args:
        run: the run's name, for messages.
        begin: the run as it stood where the charts begin; None: from the run's own beginning on.
        pause: the longest between two looks, in seconds.
    """

    def __init__(
        self, sources: Sources, logger: Logger, *, run: str, begin: RunInfo | None = None, pause: float = PAUSE
    ) -> None:
        self._sources = sources
        self._logger = logger
        self._name = run
        #: Of the newest measurement that was asked for.
        self._since = begin.updated_at if begin else None
        self._pause = pause
        self._home = Home()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"ema-charts-{run}", daemon=True)
        #: The newest numbers of the run, and of what it is behind, that were shown.
        self._newest = latest(begin) if begin else None
        self._behind: Measured | None = None
        self._failed = False

    def start(self) -> None:
        """Begin."""
        atexit.register(self.stop)
        self._thread.start()

    def end(self) -> None:
        """Look once more, and end, without anybody waiting. Called by the garbage collector too, in any thread."""
        self._stopped.set()

    def stop(self, timeout: float = LAST_SECONDS) -> None:
        """Look once more, and end: return when all is drawn, or after ``timeout`` seconds."""
        if self._home.is_here:
            self.end()
            self._thread.join(timeout)

    def _run(self) -> None:
        going_on, pause = True, min(FIRST_PAUSE, self._pause)
        while going_on:
            going_on = not self._stopped.wait(pause)
            pause = min(self._pause, 2 * pause)
            self._look()
        self._guarded(self._logger.close)
        atexit.unregister(self.stop)

    def _look(self) -> None:
        try:
            new = list(self._new())
        except EmaError as error:
            # The trainer's sender tells of the service.
            _log.debug("run %r: nothing for its charts: %s", self._name, error)
            return
        for measured in new:
            self._guarded(partial(self._logger.log, measured))

    def _new(self) -> Iterator[Measured]:
        """The numbers that were not shown yet, in the order of their steps. Raises EmaError."""
        # Ahead of the request: an update that is applied meanwhile must not look as if the run were ahead.
        step, now = self._sources.step() if self._sources.step else None, time.time()
        info = self._sources.info()
        for measured in measurements(self._sources.history(self._since, None if self._since is None else POINTS)):
            self._since = measured.time
            # The run as it stood was shown ahead of its measurement, which comes a moment later.
            if self._newest is None or measured.step != self._newest.step:
                self._newest = measured
                yield measured
        # Not every update is measured, and the newest one is what people look for.
        if (present := latest(info)) and (self._newest is None or present.step > self._newest.step):
            self._newest = present
            yield present
        if step is not None and (lag := behind(info, step, now)) != self._behind:
            self._behind = lag
            yield lag

    def _guarded(self, call: Callable[[], object]) -> None:
        """A call of the logger, behind which there may be any program; its errors are not the training's."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever a function of the user's raises
            if not self._failed:
                self._failed = True
                _log.warning("run %r: its charts could not be drawn: %s: %s", self._name, type(error).__name__, error)
