"""Charts of the EMA in the loggers that a framework's Trainer has: handed over on the training's own thread.

A framework's loggers are not made for several threads, so the thread that asks the service only leaves its numbers
here, and the callback takes them between two steps.

Knows: the word "trainer" of ``log_to``. Does not know: frameworks, loggers, the service.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from ema_client.reading.loggers import check_log_to

__all__ = ["TRAINER", "Waiting", "resolved"]

#: What ``log_to`` of a callback says for the loggers of the framework's Trainer.
TRAINER = "trainer"
#: Of numbers that nobody takes so many stay, the newest.
_MOST = 1000


class Waiting:
    """Numbers that wait for the framework's loggers. One thread puts, one takes."""

    def __init__(self) -> None:
        self._numbers: deque[tuple[dict[str, float], int]] = deque(maxlen=_MOST)

    def __call__(self, values: dict[str, float], step: int) -> None:
        """Put values of a step."""
        self._numbers.append((values, step))

    def take(self) -> list[tuple[dict[str, float], int]]:
        """Values and their steps that came since the latest call, in that order. Waits for nothing."""
        return [self._numbers.popleft() for _ in range(len(self._numbers))]


def resolved(log_to: Any) -> Any:
    """What RemoteEma is given for a callback's ``log_to``. Raises UsageError for what names no logger."""
    if log_to == TRAINER:
        return Waiting()
    if log_to is not None:
        check_log_to(log_to)
    return log_to
