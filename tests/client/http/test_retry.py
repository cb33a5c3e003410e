"""The retry policy: pure, so it is tested with numbers and no waiting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_client import errors
from ema_client.errors import ConnectionLost, EmaError, Overloaded, ServiceUnreachable, StepNotReached
from ema_client.http.retry import LONGEST_RETRY_AFTER, RetryPolicy

ALMOST_ONE = 1 - 2**-53


def test_pauses_double_up_to_the_cap() -> None:
    """With the largest jitter, pauses are base, twice base, ... up to cap; after the last try there is none."""
    policy = RetryPolicy(attempts=6, base=0.25, cap=2.0)
    lost = ConnectionLost("gone")

    delays = [policy.delay(attempt, lost, lambda: 1.0) for attempt in range(7)]

    assert delays == [0.25, 0.5, 1.0, 2.0, 2.0, None, None]


def test_jitter_is_full() -> None:
    """The pause is uniform between nothing and its bound."""
    policy = RetryPolicy()

    assert policy.delay(2, ConnectionLost("gone"), lambda: 0.0) == 0.0
    assert policy.delay(2, ConnectionLost("gone"), lambda: 0.5) == 0.5


def test_default_gives_up_within_ten_seconds_of_pauses() -> None:
    """A server that is not there is reported after ten seconds of pauses at most, however the dice fall."""
    policy = RetryPolicy()
    pauses = [policy.delay(attempt, ServiceUnreachable("gone"), lambda: ALMOST_ONE) for attempt in range(100)]

    given_pauses = [pause for pause in pauses if pause is not None]
    assert len(given_pauses) == policy.attempts - 1
    assert 5.0 < sum(given_pauses) <= 10.0


@pytest.mark.parametrize("cls", [errors.BY_CODE[code] for code in sorted(errors.BY_CODE)])
def test_only_retryable_errors_are_tried_again(cls: type[EmaError]) -> None:
    """An error is tried again if and only if its class says so, but for a step already waited for."""
    delay = RetryPolicy().delay(0, cls("x"), lambda: 0.5)

    assert (delay is not None) == (cls.retryable and cls is not StepNotReached)


def test_retry_after_is_honoured() -> None:
    """The pause is never shorter than the server asked for, and jitter comes on top of it."""
    busy = Overloaded("full", retry_after=7.0)

    assert RetryPolicy().delay(0, busy, lambda: 0.0) == 7.0
    assert RetryPolicy(base=0.5).delay(0, busy, lambda: 1.0) == 7.5


def test_a_long_retry_after_is_the_callers_to_wait_for() -> None:
    """A server that asks for minutes is not waited for inside a call."""
    assert RetryPolicy().delay(0, Overloaded("full", retry_after=LONGEST_RETRY_AFTER), lambda: 0.0) is not None
    assert RetryPolicy().delay(0, Overloaded("full", retry_after=LONGEST_RETRY_AFTER + 1), lambda: 0.0) is None


def test_one_deadline_for_pauses_and_silences() -> None:
    """A call that has waited for as long as its pauses may take makes no further try, in whatever it waited."""
    policy = RetryPolicy()

    assert policy.longest == 9.75
    assert policy.delay(0, ConnectionLost("silent"), lambda: 0.5, waited=9.7) is not None
    assert policy.delay(0, ConnectionLost("silent"), lambda: 0.5, waited=10.0) is None
    assert RetryPolicy(attempts=1_000_000, base=1.0, cap=2.0).longest == 1.0 + 2.0 * 999_998


def test_one_attempt_never_tries_again() -> None:
    """attempts=1 is the policy of a caller that has its own."""
    assert RetryPolicy(attempts=1).delay(0, ConnectionLost("gone"), lambda: 0.0) is None


@given(st.integers(0, 10_000), st.floats(0, ALMOST_ONE), st.floats(0.001, 10), st.floats(0.001, 100))
def test_delay_is_bounded_for_any_attempt(attempt: int, dice: float, base: float, cap: float) -> None:
    """However late the attempt, the pause is finite and within the cap."""
    delay = RetryPolicy(attempts=20_000, base=base, cap=cap).delay(attempt, ConnectionLost("gone"), lambda: dice)

    assert delay is not None
    assert 0 <= delay <= cap
