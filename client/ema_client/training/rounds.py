"""What a sender does after a failed try: a pure policy, from the tries so far to the next act.

Tries come in rounds: as many as the retry policy allows, or as many as a round's seconds hold. A round that came to
nothing makes the sender *stuck*: the service counts as away, nobody waits for the sender any more, and the next round
begins after a longer pause.

Knows: errors' ``retryable``, the retry policy, the length of rounds and of pauses. Does not know: threads, clocks,
sleeping, updates, or what is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ema_client.errors import EmaError
from ema_client.http.retry import RetryPolicy

__all__ = ["Again", "Refused", "SendPolicy", "Stuck", "gives_up"]

#: The pause between rounds grows no further after so many rounds that came to nothing.
_MOST_DOUBLINGS = 10


@dataclass(frozen=True, slots=True)
class Again:
    """Try again after ``pause`` seconds."""

    pause: float


@dataclass(frozen=True, slots=True)
class Stuck:
    """The round came to nothing: begin another after ``pause`` seconds, which a flush() may cut short."""

    pause: float


@dataclass(frozen=True, slots=True)
class Refused:
    """Never try again: the service will not apply the update."""


@dataclass(frozen=True, slots=True)
class SendPolicy:
    """How long a sender goes on with one update.

    retry: how often and how soon to try again within a round.
    round_seconds: a round ends after so many seconds, whatever ``retry`` says: a try may hang for as long as a timeout.
    stuck_pause, longest_stuck_pause: upper bounds of the first pause between two rounds, in seconds, and of every
    pause; the bound doubles from round to round.
    """

    retry: RetryPolicy
    round_seconds: float = 15.0
    stuck_pause: float = 2.0
    longest_stuck_pause: float = 30.0

    def after(
        self, attempt: int, error: EmaError, *, elapsed: float, rounds: int, random: Callable[[], float]
    ) -> Again | Stuck | Refused:
        """What follows the failure of try number ``attempt`` (from 0) of a round with ``error``.

        elapsed: seconds since the round began.
        rounds: how many rounds in a row came to nothing before this one.
        random: gives floats in [0, 1), as random.random does.
        """
        if not error.retryable:
            return Refused()
        pause = self.retry.delay(attempt, error, random)
        if pause is None or elapsed > self.round_seconds:
            return Stuck(self._bound(rounds) * random())
        return Again(pause)

    def _bound(self, rounds: int) -> float:
        return min(self.longest_stuck_pause, self.stuck_pause * 2.0 ** min(rounds, _MOST_DOUBLINGS))


def gives_up(*, abandoned: bool, ending: bool, stuck: bool, recalled: bool, borrowed: bool) -> bool:
    """Whether an update that could not be sent yet is given up instead of tried again.

    abandoned: the trainer closed the sender. ending: the trainer is gone, and nobody asks for the update any more.
    stuck: the service is away. recalled: the model needs borrowed memory back. borrowed: the update's memory is
    borrowed.
    """
    return abandoned or (ending and stuck) or (recalled and borrowed)
