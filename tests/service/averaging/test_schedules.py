"""Decay schedules against LitEma itself, against a loop over steps, and against a product in forty digits.

Knows scalars. Does not know tensors of weights, runs or HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ema_client.protocol import MAX_STEP
from ema_service.averaging.schedules import (
    COPY,
    Constant,
    HalfLife,
    InverseGamma,
    LitEma,
    Power,
    Retention,
    Schedule,
    Started,
)

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle

DECAYS = [0.0, 0.5, 0.9, 0.9999, 1.0]
#: Around the end of the warm-up (80 for 0.9, 89,990 for 0.9999) and of what float32 counts exactly (2**24).
COUNTERS = [*range(120), 1_000, *range(89_980, 90_000), *range(2**24 - 12, 2**24 + 12), 2**24 + 2**23 + 1, 2**31 - 12]

#: A float64 as it is, in Decimal.
exactly = Decimal.from_float

counters = st.integers(0, 2**40)
decays = st.floats(0.0, 1.0)

#: One of each kind and more, with an oracle: the decay of update n, n >= 1, in Decimal, written as the definitions are.
ORACLES: dict[str, tuple[Schedule, Callable[[int], Decimal]]] = {
    "litema": (LitEma(0.9999), lambda n: min(exactly(0.9999), Decimal(1 + n) / (10 + n))),
    "litema, low": (LitEma(0.9), lambda n: min(exactly(0.9), Decimal(1 + n) / (10 + n))),
    "constant": (Constant(0.999), lambda _: exactly(0.999)),
    "half-life": (HalfLife(1000.0), lambda _: Decimal(2) ** (Decimal(-1) / 1000)),
    "power": (Power(6.9), lambda n: (1 - Decimal(1) / n) ** exactly(7.9)),
    "uniform": (Power(0.0), lambda n: 1 - Decimal(1) / n),
    "inverse gamma": (InverseGamma(0.9999), lambda n: _inverse_gamma(n - 1, 0.9999, 1.0, 2 / 3)),
    "inverse gamma, uncapped": (InverseGamma(1.0, 1.0, 0.75), lambda n: _inverse_gamma(n - 1, 1.0, 1.0, 0.75)),
    "inverse gamma, slow": (InverseGamma(1.0, 30.0, 0.2), lambda n: _inverse_gamma(n - 1, 1.0, 30.0, 0.2)),
    "inverse gamma, clipped": (
        InverseGamma(0.999, 50.0, 3.0, 0.5),
        lambda n: max(_inverse_gamma(n - 1, 0.999, 50.0, 3.0), exactly(0.5)) if n > 1 else Decimal(0),
    ),
}


def _inverse_gamma(s: int, decay: float, inv_gamma: float, power: float) -> Decimal:
    return min(1 - (1 + s / Decimal(inv_gamma)) ** -Decimal(power), Decimal(decay)) if s > 0 else Decimal(0)


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

        found = LitEma(decay).retention(num_updates)

        assert (found.decay, found.weight) == (expected, weight), f"after {num_updates} updates"


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("num_updates", [0, 7, 2**30])
def test_constant_is_litema_without_its_counter(decay: float, num_updates: int, litema: type[LitEmaOracle]) -> None:
    """constant gives the configured decay, as float32, whatever the counter says: LitEma's with its counter off."""
    expected, weight = (float(scalar) for scalar in litema({}, decay, use_num_updates=False).retention())

    found = Constant(decay).retention(num_updates)

    assert (found.decay, found.weight) == (expected, weight)
    assert expected == torch.tensor(decay, dtype=torch.float32).item()


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
    found = LitEma(decay).retention(num_updates, gap)

    assert found.decay == pytest.approx(decays_of_steps(decay, num_updates, gap), rel=1e-10, abs=0.0)
    assert found.weight == 1.0 - found.decay


@given(decay=decays, num_updates=st.integers(0, 200_000), gap=st.integers(2, 300))
def test_any_gap_is_the_product_of_its_steps(decay: float, num_updates: int, gap: int) -> None:
    """The closed form of the warm-up agrees with the loop for any decay, counter and gap."""
    expected = decays_of_steps(decay, num_updates, gap)

    assert LitEma(decay).retention(num_updates, gap).decay == pytest.approx(expected, rel=1e-10, abs=1e-300)


@given(decay=decays, num_updates=counters, first=st.integers(2, 10**6), second=st.integers(2, 10**6))
def test_gaps_compose(decay: float, num_updates: int, first: int, second: int) -> None:
    """Two gaps one after the other retain what one gap over both would."""
    whole = LitEma(decay).retention(num_updates, first + second).decay
    parts = LitEma(decay).retention(num_updates, first).decay
    parts *= LitEma(decay).retention(num_updates + first, second).decay

    assert parts == pytest.approx(whole, rel=1e-9, abs=1e-300)


@given(decay=decays, gap=st.integers(2, 10_000))
def test_constant_over_a_gap(decay: float, gap: int) -> None:
    """constant over a gap is decay to the power of the gap."""
    assert Constant(decay).retention(5, gap).decay == pytest.approx(decay**gap)


# --- every schedule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("start", [None, 0, 3, 1000])
def test_any_gap_is_the_product_of_its_steps_to_twelve_digits(name: str, start: int | None) -> None:
    """Over any gap, from any counter and with any start, the retention is the product of every step's decay."""
    schedule, decay_of = ORACLES[name]
    tried = schedule if start is None else Started(schedule, start)  # type: ignore[arg-type]
    shift = 0 if start is None else start + (0 if isinstance(schedule, Power | InverseGamma) else 1)
    for num_updates, gap in [(0, 2), (1, 2), (2, 7), (7, 100), (1001, 50), (1020, 9), (1500, 400), (4000, 500)]:
        with localcontext(prec=40):
            steps = range(num_updates + 1, num_updates + gap + 1)
            copied = start is not None and steps[0] <= start + 1
            expected = Decimal(0) if copied else math.prod(decay_of(n - shift) for n in steps)
            found = tried.retention(num_updates, gap)
            error = abs(Decimal(found.decay) - expected) / max(expected, exactly(1e-300))

        assert error <= 1e-12, f"{num_updates} + {gap}: {found.decay}, not {expected}"
        assert found.weight == pytest.approx(1.0 - found.decay, abs=1e-15)


@pytest.mark.parametrize("name", ORACLES)
def test_single_steps(name: str) -> None:
    """A gap of one step is the plain update: to the precision of its program's scalars, the definition."""
    schedule, decay_of = ORACLES[name]
    single = 6e-8 if isinstance(schedule, LitEma | Constant) else 1e-12
    for num_updates in [0, 1, 2, 7, 100, 1023, 1024, 1025, 4000, 90_000]:
        with localcontext(prec=40):
            expected = float(decay_of(num_updates + 1))

        assert schedule.retention(num_updates) == schedule.retention(num_updates, 1)
        assert schedule.retention(num_updates).decay == pytest.approx(expected, rel=single, abs=0.0)


@pytest.mark.parametrize("name", ORACLES)
def test_a_start_copies_once_more(name: str) -> None:
    """Up to and including the first update after ``start`` nothing is retained; from there the schedule begins."""
    schedule, _ = ORACLES[name]
    started = Started(schedule, 5)  # type: ignore[arg-type]
    copies = isinstance(schedule, Power | InverseGamma)

    assert all(started.retention(n).decay == 0.0 for n in range(6))
    assert all(started.retention(n, 10).decay == 0.0 for n in range(6))
    assert started.retention(6).decay > 0.0
    assert started.retention(6).decay == pytest.approx(schedule.retention(1 if copies else 0).decay, rel=6e-8)


def test_scalars_of_a_started_litema_are_wide() -> None:
    """LitEma has no start, and EMAModel, whose warm-up it is, computes in float64."""
    assert Started(LitEma(0.9999, single=False), 0).retention(7) == Retention(
        (1 + 7) / (10 + 7), 1 - (1 + 7) / (10 + 7)
    )
    assert Started(Constant(0.9, single=False), 0).retention(7) == Retention(0.9, 1 - 0.9)


def test_first_updates_that_copy() -> None:
    """The first update of a power average is the average, whatever the initial weights were; so is a start's."""
    assert Power(6.9).retention(0) == Power(0.0).retention(0, 50) == Started(Constant(0.5), 4).retention(4) == COPY


@pytest.mark.parametrize("name", ORACLES)
@given(
    num_updates=st.one_of(st.integers(0, MAX_STEP), st.integers(MAX_STEP - 20, MAX_STEP)),
    gap=st.one_of(st.integers(1, 3), st.integers(1, MAX_STEP)),
)
@example(num_updates=MAX_STEP, gap=1)
@example(num_updates=MAX_STEP - 5, gap=1)
@example(num_updates=1, gap=MAX_STEP)
def test_retention_is_a_fraction(name: str, num_updates: int, gap: int) -> None:
    """For every counter and gap the protocol allows, decay and weight lie in 0..1: an update is always a mean."""
    found = ORACLES[name][0].retention(num_updates, gap)

    assert 0.0 <= found.decay <= 1.0
    assert 0.0 <= found.weight <= 1.0


@given(decay=decays, num_updates=counters, gap=st.integers(1, MAX_STEP))
def test_litema_of_any_decay_is_a_fraction(decay: float, num_updates: int, gap: int) -> None:
    """So it is for every decay."""
    for found in (LitEma(decay).retention(num_updates, gap), Constant(decay).retention(num_updates, gap)):
        assert 0.0 <= found.decay <= 1.0
        assert 0.0 <= found.weight <= 1.0
