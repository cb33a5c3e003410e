"""A trainer's steps, and which of them are sent.

Knows: numbers. Does not know: models, updates, the service.
"""

from __future__ import annotations

__all__ = ["Cadence"]


class Cadence:
    """Counts the calls of update(), and lets each ``every``-th send. Not thread-safe.

    step: the trainer's step, of the latest call. sent: the step of the latest call that was due.
    """

    def __init__(self, every: int, step: int = 0) -> None:
        self._every = every
        self.begin_at(step)

    def begin_at(self, step: int) -> None:
        """Count on from ``step``, which is as good as sent."""
        self._first = self.step = self.sent = step

    @property
    def begun(self) -> bool:
        """Whether a call was counted since the beginning."""
        return self.step != self._first

    @property
    def due(self) -> bool:
        """Whether the next call sends."""
        return (self.step + 1 - self._first) % self._every == 0

    def advance(self, due: bool | None = None) -> int:
        """Count a call; returns the step. due: whether the call sends, by default as ``due`` says."""
        due = self.due if due is None else due
        self.step += 1
        if due:
            self.sent = self.step
        return self.step
