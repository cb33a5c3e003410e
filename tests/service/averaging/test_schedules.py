"""Decay schedules against LitEma itself and against a loop over steps.

Knows scalars. Does not know tensors of weights, runs or HTTP.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ema_client.protocol import MAX_STEP
from ema_service.averaging.schedules import SCHEDULES, constant
from ema_service.averaging.schedules import litema as litema_schedule

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle

DECAYS = [0.0, 0.5, 0.9, 0.9999, 1.0]
#: Around the end of the warm-up (80 for 0.9, 89,990 for 0.9999) and of what float32 counts exactly (2**24).
COUNTERS = [*range(120), 1_000, *range(89_980, 90_000), *range(2**24 - 12, 2**24 + 12), 2**24 + 2**23 + 1, 2**31 - 12]

counters = st.integers(0, 2**40)
decays = st.floats(0.0, 1.0)


def decays_of_steps(decay: float, num_updates: int, gap: int) -> float:
    """The product of the decays of the next ``gap`` steps, one by one in float64."""
    return math.prod(min(decay, (1 + i) / (10 + i)) for i in range(num_updates + 1, num_updates + gap + 1))


@pytest.mark.parametrize("decay", DECAYS)
def test_litema_is_litema_to_the_bit(decay: float, litema: type[LitEmaOracle]) -> None:
    """With the counter on, decay and weight equal LitEma's float32 scalars exactly at every counter."""
    for num_updates in COUNTERS:
        oracle = litema({}, decay)
        oracle.num_updates.fill_(num_updates)
        expected, weight = (float(scalar) for scalar in oracle.retention())

        found = litema_schedule(decay, num_updates)

        assert (found.decay, found.weight) == (expected, weight), f"after {num_updates} updates"


@pytest.mark.parametrize("decay", DECAYS)
def test_litema_without_counter_is_litema_to_the_bit(decay: float, litema: type[LitEmaOracle]) -> None:
    """With the counter off (-1), litema has no warm-up: LitEma's float32 decay from the first update on."""
    expected, weight = (float(scalar) for scalar in litema({}, decay, use_num_updates=False).retention())

    found = litema_schedule(decay, -1)

    assert (found.decay, found.weight) == (expected, weight)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("num_updates", [-1, 0, 7, 2**30])
def test_constant_ignores_the_counter(decay: float, num_updates: int) -> None:
    """constant gives the configured decay, as float32, whatever the counter says."""
    expected = torch.tensor(decay, dtype=torch.float32)

    found = constant(decay, num_updates)

    assert (found.decay, found.weight) == (expected.item(), (1.0 - expected).item())


@pytest.mark.parametrize(
    ("decay", "num_updates", "gap"),
    [
        (0.9, 0, 2),
        (0.9, 0, 79),
        (0.9, 70, 30),  # crosses from the warm-up to the cap
        (0.9, 79, 2),
        (0.9, 80, 2),
        (0.5, 0, 100),
        (0.5, 7, 2),  # (1 + 8) / (10 + 8) is the cap itself
        (0.9999, 89_900, 200),
        (0.9999, 0, 100_000),
        (0.9999, 2**24, 50),
        (1.0, 3, 1_000),  # never leaves the warm-up
        (0.0, 3, 5),
        (0.05, 0, 3),  # below the first warm-up factor
    ],
)
def test_gap_is_the_product_of_its_steps(decay: float, num_updates: int, gap: int) -> None:
    """Over a gap the retention is the product of the decays of the steps in it, through warm-up and cap."""
    found = litema_schedule(decay, num_updates, gap)

    assert found.decay == pytest.approx(decays_of_steps(decay, num_updates, gap), rel=1e-10, abs=0.0)
    assert found.weight == 1.0 - found.decay


@given(decay=decays, num_updates=st.integers(0, 200_000), gap=st.integers(2, 300))
def test_any_gap_is_the_product_of_its_steps(decay: float, num_updates: int, gap: int) -> None:
    """The closed form of the warm-up agrees with the loop for any decay, counter and gap."""
    expected = decays_of_steps(decay, num_updates, gap)

    assert litema_schedule(decay, num_updates, gap).decay == pytest.approx(expected, rel=1e-10, abs=1e-300)


@given(decay=decays, num_updates=counters, first=st.integers(2, 10**6), second=st.integers(2, 10**6))
def test_gaps_compose(decay: float, num_updates: int, first: int, second: int) -> None:
    """Two gaps one after the other retain what one gap over both would."""
    whole = litema_schedule(decay, num_updates, first + second).decay
    parts = litema_schedule(decay, num_updates, first).decay
    parts *= litema_schedule(decay, num_updates + first, second).decay

    assert parts == pytest.approx(whole, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("name", SCHEDULES)
@given(decay=decays, num_updates=st.integers(-1, 2**30))
def test_gap_of_one_is_no_gap(name: str, decay: float, num_updates: int) -> None:
    """A gap of one step is exactly the plain update, and the product form agrees with it to float32's precision."""
    schedule = SCHEDULES[name]
    plain = schedule(decay, num_updates)

    assert schedule(decay, num_updates, 1) == plain
    following = schedule(decay, num_updates + 1 if num_updates >= 0 else -1)
    assert schedule(decay, num_updates, 2).decay == pytest.approx(plain.decay * following.decay, rel=3e-7, abs=1e-37)


@given(decay=decays, gap=st.integers(2, 10_000))
def test_constant_over_a_gap(decay: float, gap: int) -> None:
    """constant over a gap is decay to the power of the gap; litema with the counter off is the same."""
    assert constant(decay, 5, gap).decay == pytest.approx(decay**gap)
    assert litema_schedule(decay, -1, gap) == constant(decay, -1, gap)


@pytest.mark.parametrize("name", SCHEDULES)
@given(
    decay=decays,
    num_updates=st.one_of(st.integers(-1, MAX_STEP), st.integers(MAX_STEP - 20, MAX_STEP)),
    gap=st.one_of(st.integers(1, 3), st.integers(1, MAX_STEP)),
)
@example(decay=0.9999, num_updates=MAX_STEP, gap=1)
@example(decay=0.9999, num_updates=MAX_STEP - 5, gap=1)
def test_retention_is_a_fraction(name: str, decay: float, num_updates: int, gap: int) -> None:
    """For every counter and gap the protocol allows, decay and weight lie in 0..1: an update is always a mean."""
    found = SCHEDULES[name](decay, num_updates, gap)

    assert 0.0 <= found.decay <= 1.0
    assert 0.0 <= found.weight <= 1.0
