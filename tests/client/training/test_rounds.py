"""What a sender does after a failed try: a pure policy, so it is tested with numbers and no waiting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_client import errors
from ema_client.errors import ConnectionLost, EmaError, NonFinite, Overloaded, ServiceUnreachable, StepNotReached
from ema_client.http.retry import LONGEST_RETRY_AFTER, RetryPolicy
from ema_client.training.rounds import Again, Refused, SendPolicy, Stuck, gives_up

ALMOST_ONE = 1 - 2**-53
POLICY = SendPolicy(RetryPolicy(attempts=3, base=0.5, cap=2.0))
DICE = st.floats(0, ALMOST_ONE)


def after(
    attempt: int,
    error: EmaError,
    *,
    elapsed: float = 0.0,
    rounds: int = 0,
    dice: float = 1.0,
) -> Again | Stuck | Refused:
    return POLICY.after(attempt, error, elapsed=elapsed, rounds=rounds, random=lambda: dice)


def test_a_round_is_the_retry_policys() -> None:
    """Within a round the pauses are the retry policy's; its last try is the round's."""
    gone = ServiceUnreachable("gone")

    assert [after(attempt, gone) for attempt in range(3)] == [Again(0.5), Again(1.0), Stuck(2.0)]


def test_a_refusal_ends_it() -> None:
    """What the service refuses is not tried again, whichever try it was."""
    assert after(0, NonFinite("NaN")) == after(2, NonFinite("NaN"), rounds=7, elapsed=1e9) == Refused()


def test_a_round_has_its_seconds() -> None:
    """A try that took longer than a round may is the last one, however many are left."""
    assert after(0, ConnectionLost("silence"), elapsed=POLICY.round_seconds) == Again(0.5)
    assert after(0, ConnectionLost("silence"), elapsed=POLICY.round_seconds + 0.1) == Stuck(2.0)


def test_pauses_between_rounds_double() -> None:
    """2, 4, 8, 16, 30 and 30 seconds at most, and as much jitter as there may be."""
    gone = ServiceUnreachable("gone")

    assert [after(2, gone, rounds=rounds) for rounds in range(6)] == [Stuck(float(s)) for s in (2, 4, 8, 16, 30, 30)]
    assert after(2, gone, rounds=3, dice=0.0) == Stuck(0.0)


def test_a_service_that_asks_for_a_long_pause_is_away() -> None:
    """The pause that a server asks for is within the round, or else the round's end."""
    assert after(0, Overloaded("full", retry_after=7.0)) == Again(7.5)
    assert after(0, Overloaded("full", retry_after=LONGEST_RETRY_AFTER + 1)) == Stuck(2.0)


@given(
    st.sampled_from([errors.BY_CODE[code] for code in sorted(errors.BY_CODE)]),
    st.integers(0, 50),
    st.floats(0, 1e6),
    st.integers(0, 10_000),
    DICE,
)
def test_every_failure_has_an_answer(
    cls: type[EmaError], attempt: int, elapsed: float, rounds: int, dice: float
) -> None:
    """For any error, try and time: a refusal if and only if the error is for good, and pauses that are bounded."""
    decided = after(attempt, cls("x"), elapsed=elapsed, rounds=rounds, dice=dice)

    assert isinstance(decided, Refused) == (not cls.retryable)
    if isinstance(decided, Again):
        assert attempt + 1 < POLICY.retry.attempts
        assert elapsed <= POLICY.round_seconds
        assert cls is not StepNotReached
        assert 0 <= decided.pause <= POLICY.retry.cap
    if isinstance(decided, Stuck):
        assert 0 <= decided.pause <= POLICY.longest_stuck_pause


@given(st.lists(st.tuples(st.floats(0, 30), DICE), min_size=200, max_size=200))
def test_no_round_lasts_for_ever(tries: list[tuple[float, float]]) -> None:
    """However long each try takes and however the dice fall, a service that stays away makes the sender stuck again
    and again, after as many tries as the retry policy has at most."""
    attempt, elapsed, rounds, lengths = 0, 0.0, 0, []
    for seconds, dice in tries:
        elapsed += seconds
        decided = after(attempt, ServiceUnreachable("gone"), elapsed=elapsed, rounds=rounds, dice=dice)
        attempt += 1
        if isinstance(decided, Stuck):
            lengths.append(attempt)
            attempt, elapsed, rounds = 0, 0.0, rounds + 1

    assert rounds >= len(tries) // POLICY.retry.attempts
    assert max(lengths) <= POLICY.retry.attempts


@pytest.mark.parametrize(
    ("expected", "facts"),
    [
        (False, set()),
        (True, {"abandoned"}),
        (True, {"abandoned", "borrowed"}),
        (False, {"ending"}),
        (False, {"stuck"}),
        (True, {"ending", "stuck"}),
        (False, {"recalled"}),
        (False, {"borrowed", "stuck"}),
        (True, {"recalled", "borrowed"}),
    ],
)
def test_when_an_update_is_given_up(expected: bool, facts: set[str]) -> None:
    """Closed; or nobody comes back to a service that is away; or the model needs the memory back."""
    names = ("abandoned", "ending", "stuck", "recalled", "borrowed")

    assert gives_up(**{name: name in facts for name in names}) is expected
