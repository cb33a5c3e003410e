"""Which calls of update() send. Pure: numbers only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ema_client.training.cadence import Cadence


def sent(cadence: Cadence, calls: int) -> list[int]:
    """The steps of the calls that are due."""
    found = []
    for _ in range(calls):
        due = cadence.due
        step = cadence.advance()
        if due:
            found.append(step)
    return found


def test_every_call_and_every_third() -> None:
    """1 sends each call, 3 each third, with the steps counted all the same."""
    assert sent(Cadence(1), 4) == [1, 2, 3, 4]
    third = Cadence(3)
    assert sent(third, 8) == [3, 6]
    assert (third.step, third.sent) == (8, 6)


def test_a_run_that_goes_on() -> None:
    """The cadence begins at the run's step, also after going back."""
    cadence = Cadence(3, 100)
    assert sent(cadence, 7) == [103, 106]
    cadence.begin_at(50)

    assert (cadence.step, cadence.sent) == (50, 50)
    assert sent(cadence, 4) == [53]


@given(st.integers(1, 20), st.integers(0, 10**9), st.integers(0, 100))
def test_as_many_as_there_are(every: int, first: int, calls: int) -> None:
    """Of n calls, n // every send, the latest of them is remembered, and a step that only counts is not."""
    cadence = Cadence(every, first)
    steps = sent(cadence, calls)

    assert steps == list(range(first + every, first + calls + 1, every))
    assert cadence.sent == (steps[-1] if steps else first)


def test_somebody_else_decides() -> None:
    """A call whose being due is told is counted as any other, and remembered if it sends."""
    cadence = Cadence(3)
    assert [cadence.advance(due) for due in (True, False, None, True)] == [1, 2, 3, 4]
    assert cadence.sent == 4
