"""When to try again: a pure policy from (attempt, error) to a delay or to "stop".

Exponential backoff with full jitter (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/): many
trainers that lose one server must not come back in step.

Knows: errors' ``retryable`` and ``retry_after``. Does not know: clocks, sleeping, sockets, or what was attempted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ema_client.errors import EmaError, StepNotReached

__all__ = ["RetryPolicy"]

#: The longest pause that a server may ask for inside a call, in seconds; longer pauses are left to the caller.
LONGEST_RETRY_AFTER = 30.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how soon to try again.

    attempts: tries in all; 1 never tries again.
    base: upper bound of the first pause in seconds; the bound doubles from pause to pause.
    cap: upper bound of every pause in seconds.

    The defaults pause for at most 0.25 + 0.5 + 1 + 2 + 2 + 2 + 2 = 9.75 s in all, on average for half as long.
    """

    attempts: int = 8
    base: float = 0.25
    cap: float = 2.0

    def delay(self, attempt: int, error: EmaError, random: Callable[[], float], *, waited: float = 0.0) -> float | None:
        """Seconds to pause after try number ``attempt`` (from 0) failed with ``error``; None to give up.

        attempt, waited: of the tries in a row that brought nothing, where a call brings what it asks for bit by bit.

        random: gives floats in [0, 1), as random.random does.
        waited: seconds of pauses and of silence so far. A call waits for no longer than its pauses alone would be at
        their longest, in whatever it waits: that is the deadline of the call with all its tries.
        """
        if attempt + 1 >= self.attempts or not _worth_trying(error) or waited > self.longest:
            return None
        # 62: a float holds 2.0**62; nobody needs the exponent of attempt number two thousand.
        jittered = random() * min(self.cap, self.base * 2.0 ** min(attempt, 62))
        return jittered if error.retry_after is None else error.retry_after + jittered

    @property
    def longest(self) -> float:
        """Seconds that the pauses take in all at their longest."""
        growing = min(self.attempts - 1, 62)
        bounds = (min(self.cap, self.base * 2.0**attempt) for attempt in range(growing))
        return sum(bounds) + self.cap * (self.attempts - 1 - growing)


def _worth_trying(error: EmaError) -> bool:
    if isinstance(error, StepNotReached):
        # The server has waited for as long as the caller asked.
        return False
    return error.retryable and (error.retry_after is None or error.retry_after <= LONGEST_RETRY_AFTER)
