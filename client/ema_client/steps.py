"""Steps of runs: the latest step that one client pushed or saw, and the wait for a step that another rank sends.

Knows: what a RunInfo says of the run's step. Does not know: the service (whoever waits says how the run is asked for),
updates.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ema_client.errors import RunNotFound, StepNotReached
from ema_client.forks import Lock
from ema_client.protocol import RunInfo

__all__ = ["Steps", "await_step"]

#: Pause between two questions for a step that another rank sends, in seconds.
_POLL_SECONDS = 0.02


class Steps:
    """The latest step of each run, as far as the client has pushed or seen it. Thread-safe."""

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}
        self._lock = Lock()

    def latest(self, run: str) -> int | None:
        """The latest step of a run; None where none is known."""
        with self._lock:
            return self._steps.get(run)

    def remember(self, run: str, step: int) -> None:
        """Take ``step`` for the latest of a run."""
        with self._lock:
            self._steps[run] = step

    def forget(self, run: str) -> None:
        """Take no step for the latest of a run any more: the service knows better."""
        with self._lock:
            self._steps.pop(run, None)

    def seen(self, info: RunInfo) -> RunInfo:
        """Take the step of a run as it stands for the latest; returns ``info``."""
        if info.step is None:
            self.forget(info.run)
        else:
            self.remember(info.run, info.step)
        return info


def await_step(run: str, step: int, asked: Callable[[], RunInfo], *, wait: float) -> RunInfo:
    """The run, once it has reached ``step``. asked: the run as it stands, asked of the service.

    Raises StepNotReached after ``wait`` seconds, RunNotFound where there is no run by then, and what ``asked`` raises.
    """
    deadline = time.monotonic() + wait
    while True:
        try:
            info = asked()
            reached = info.step
        except RunNotFound:
            # Another rank is about to create the run.
            if time.monotonic() > deadline:
                raise
            reached = None
        if reached is not None and reached >= step:
            return info
        if time.monotonic() > deadline:
            raise StepNotReached(
                f"run {run!r} is at step {reached}, not at {step}, after {wait:g} seconds",
                hint="a part of the update is missing or was refused: see the other ranks' messages",
            )
        time.sleep(_POLL_SECONDS)
