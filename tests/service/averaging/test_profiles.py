"""Profiles against loops over single updates, in exact fractions where the numbers allow it.

Knows arithmetic. Does not know snapshots or what a profile is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_service.averaging.profiles import (
    WIDEST_SIGMA_REL,
    TargetRefused,
    decays_of,
    elementwise,
    gamma_of,
    power_decay,
    power_masses,
    power_product,
    profile_of,
    sigma_rel_of,
)

#: Gaps between updates: mostly of one, some long.
gaps = st.lists(st.integers(1, 3) | st.integers(1, 500), min_size=1, max_size=40)


def litema_steps(decay: float) -> Callable[[int, int], float]:
    return lambda n, gap: math.prod(min(decay, (1 + i) / (10 + i)) for i in range(n + 1, n + gap + 1))


def inverse_gamma_steps(cap: float) -> Callable[[int, int], float]:
    return lambda n, gap: math.prod(min(cap, 1 - (1 + i) ** -(2 / 3)) for i in range(n, n + gap))


def constant_steps(decay: float) -> Callable[[int, int], float]:
    return lambda _, gap: math.prod([decay] * gap)


def by_steps(decays: list[Fraction] | list[float]) -> list[Fraction] | list[float]:
    """The profile, by letting each update fade all earlier weights."""
    profile: list = []
    for decay in decays:
        profile = [weight * decay for weight in profile] + [1 - decay]
    return profile


@pytest.mark.parametrize("gamma", [0, 1, 2, 7, 65, 1000])
def test_sigma_rel_is_the_standard_deviation(gamma: int) -> None:
    """sigma_rel^2 is the variance of tau / t over the profile, whose moments are (gamma + 1) / (gamma + 1 + k)."""
    mean, second = Fraction(gamma + 1, gamma + 2), Fraction(gamma + 1, gamma + 3)

    assert sigma_rel_of(gamma) == pytest.approx(math.sqrt(second - mean**2), rel=1e-15, abs=0.0)


@given(sigma_rel=st.floats(1e-4, 0.288))
def test_gamma_undoes_sigma_rel(sigma_rel: float) -> None:
    """Back and forth agrees to float64's precision, and gamma is above 0."""
    assert gamma_of(sigma_rel) > 0.0
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-14, abs=0.0)


@pytest.mark.parametrize("gamma", [1e-9, 1e-3, 0.72, 6.94, 64.7, 1e9, 1e150])
def test_sigma_rel_undoes_gamma(gamma: float) -> None:
    """From the widest averages to ones of a single update, nothing overflows and the exponent is found again."""
    assert gamma_of(sigma_rel_of(gamma)) == pytest.approx(gamma, rel=1e-13, abs=1e-14)


@pytest.mark.parametrize("sigma_rel", [0.2887, 0.3, 5.0, math.inf])
def test_too_wide_is_refused_with_the_widest(sigma_rel: float) -> None:
    """The message has the bound, the value and the nearest width, and this one can be had."""
    with pytest.raises(TargetRefused, match=r"0\.288675.*0\.2886") as refused:
        gamma_of(sigma_rel)

    assert refused.value.reason == "sigma_rel"
    assert isinstance(refused.value.nearest, float)
    assert 0.0 < gamma_of(refused.value.nearest) < 0.002


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, math.nan, WIDEST_SIGMA_REL])
def test_no_width_is_refused(sigma_rel: float) -> None:
    """What is no positive number, and the bound itself, are refused as well."""
    with pytest.raises(TargetRefused):
        gamma_of(sigma_rel)


@given(
    a=st.integers(0, 20),
    b=st.integers(0, 20),
    s=st.floats(0.1, 10.0),
    t=st.floats(0.1, 10.0),
    low=st.floats(0.0, 5.0),
    length=st.floats(0.01, 20.0),
)
def test_inner_product_is_the_integral(a: int, b: int, s: float, t: float, low: float, length: float) -> None:
    """Against a quadrature that is exact for these polynomials, over an interval and over all times."""
    for over in ((low, low + length), None):
        start, end = (0.0, min(s, t)) if over is None else (min(low, s, t), min(low + length, s, t))
        nodes, weights = np.polynomial.legendre.leggauss(24)
        tau = (start + end) / 2 + (end - start) / 2 * nodes
        product = (a + 1) * tau**a / s ** (a + 1) * (b + 1) * tau**b / t ** (b + 1)
        expected = float((product * weights).sum() * (end - start) / 2)

        assert power_product(a, s, b, t, over) == pytest.approx(expected, rel=1e-11, abs=1e-13)


@given(gaps=gaps, gamma=st.integers(0, 12))
def test_discrete_power_average_is_the_integrated_profile(gaps: list[int], gamma: int) -> None:
    """At any gaps: the recursion in exact fractions, its arrays, and the integrals over the updates' gaps agree."""
    counters = np.cumsum(gaps)
    before = counters - gaps
    exact = by_steps([Fraction(int(n), int(m)) ** (gamma + 1) for n, m in zip(before, counters, strict=True)])

    profile, retained = profile_of(decays_of(power_decay(gamma), counters))
    masses = power_masses(gamma, before.astype(float), counters.astype(float), float(counters[-1]))

    expected = [float(weight) for weight in exact]
    np.testing.assert_allclose(profile, expected, rtol=1e-12)
    np.testing.assert_allclose(masses, expected, rtol=1e-12)
    assert retained == 0.0


@pytest.mark.parametrize("n", [999_983, 1_000_003, 123_456_789])
def test_narrow_spans_are_exact(n: int) -> None:
    """A millionth update's share is right to 13 digits, where the difference of two powers has ten."""
    gamma = 65
    exact = 1 - Fraction(n - 1, n) ** (gamma + 1)

    found = power_masses(gamma, np.array([n - 1.0]), np.array([float(n)]), n)[0]

    assert found == pytest.approx(float(exact), rel=1e-13, abs=0.0)


@pytest.mark.parametrize("first", [0, 1, 50])
@pytest.mark.parametrize("steps", [litema_steps(0.98), inverse_gamma_steps(0.995), constant_steps(0.97)])
def test_any_recursion_at_irregular_gaps(steps: Callable[[int, int], float], first: int) -> None:
    """Retentions over gaps give what a loop over single steps gives, with the weights of a gap's steps together."""
    gaps = np.random.default_rng(0).integers(1, 9, 120)
    counters = first + np.cumsum(gaps) - gaps[0]
    single = np.arange(first, counters[-1] + 1)
    each = [0.0] + [steps(int(n), 1) for n in single[:-1] - first]
    expected = np.add.reduceat(by_steps(each), np.concatenate(([0], np.searchsorted(single, counters)[:-1] + 1)))

    profile, retained = profile_of(decays_of(elementwise(steps), counters, start=first))

    np.testing.assert_allclose(profile, expected, rtol=1e-12)
    assert retained == 0.0
    assert math.fsum(profile) == pytest.approx(1.0, abs=1e-14)


def test_a_late_average_begins_with_a_copy() -> None:
    """Nothing before its start weighs anything, its counter begins there, and gaps may span the start."""
    counters = np.array([3, 6, 9, 12, 15])
    decays = decays_of(power_decay(2.0), counters, start=8)

    assert decays.tolist() == [0.0, 0.0, 0.0, (1 / 4) ** 3, (4 / 7) ** 3]
    assert decays_of(elementwise(constant_steps(0.5)), counters, start=9).tolist() == [0.0, 0.0, 0.0, 0.125, 0.125]


@given(decays=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=60))
def test_profile_and_retention_sum_to_one(decays: list[float]) -> None:
    """Whatever the decays: each weight is the loop's, and with what is retained they make 1."""
    profile, retained = profile_of(np.array(decays))

    np.testing.assert_allclose(profile, by_steps(decays), rtol=1e-12, atol=1e-300)
    assert retained == pytest.approx(math.prod(decays), rel=1e-12, abs=1e-300)
    assert math.fsum([*profile, retained]) == pytest.approx(1.0, abs=1e-14)
