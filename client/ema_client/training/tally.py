"""What became of a trainer's updates: counted, logged in few lines, and the first failure held for flush().

Knows: numbers, texts of log lines, the order of failures. Does not know: sending, or who waits for what.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace

from ema_client.errors import EmaError

__all__ = ["Stats", "Tally"]

_log = logging.getLogger("ema_client")


@dataclass(frozen=True, slots=True)
class Stats:
    """What became of the updates so far.

    sent: applied by the service. skipped: not sent, as earlier updates were on their way or the service was away.
    failed: refused by the service, such as updates with NaN.
    """

    sent: int = 0
    skipped: int = 0
    failed: int = 0


class Tally:
    """The account of a publisher. Thread-safe. name: of the run and the service, for log lines."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._stats = Stats()
        self._skips_in_a_row = 0
        self._failures_in_a_row = 0
        self._failure: EmaError | None = None
        self._untold_failures = 0

    @property
    def stats(self) -> Stats:
        return self._stats

    def skipped(self, why: str) -> None:
        """An update was left out before its making."""
        with self._lock:
            self._stats = replace(self._stats, skipped=self._stats.skipped + 1)
            self._skips_in_a_row += 1
            if _worth_a_line(self._skips_in_a_row):
                _log.warning("%s: %d updates skipped in a row; %s", self._name, self._skips_in_a_row, why)

    def given_up(self) -> None:
        """An update from the queue is not sent after all."""
        with self._lock:
            self._stats = replace(self._stats, skipped=self._stats.skipped + 1)

    def sent(self, *, was_stuck: bool, counted: bool = True) -> None:
        """The service applied an update. was_stuck: the service was away until then.

        counted: whether it is one of the trainer's updates.
        """
        with self._lock:
            if was_stuck:
                _log.warning("%s: updates are applied again; %d were skipped", self._name, self._skips_in_a_row)
            self._skips_in_a_row = self._failures_in_a_row = 0
            self._stats = replace(self._stats, sent=self._stats.sent + counted)

    def failed(self, step: int | None, error: EmaError) -> None:
        """The service refused the update of ``step``; without a step, initial weights.

        Of several failures the first is held for raise_failure() and the others are counted: a training that nobody
        watches must not grow by its failures.
        """
        what = "initial weights" if step is None else f"step {step}"
        error.add_note(f"update of {what}, {self._name}")
        with self._lock:
            self._failures_in_a_row += 1
            if _worth_a_line(self._failures_in_a_row):
                _log.error("%s: %s failed: %s", self._name, what, error)
            self._failure = self._failure or error
            self._untold_failures += 1
            self._stats = replace(self._stats, failed=self._stats.failed + 1)

    def raise_failure(self) -> None:
        """Raise the first failure since the latest call, with a note of how many came after it."""
        with self._lock:
            failure, self._failure = self._failure, None
            more, self._untold_failures = self._untold_failures - 1, 0
        if failure is not None:
            if more:
                failure.add_note(f"{more} updates failed after it; see the log")
            try:
                raise failure
            finally:
                del failure


def _worth_a_line(count: int) -> bool:
    """1, 2, 4, 8 and so on: a long outage is told in few lines."""
    return count & (count - 1) == 0
