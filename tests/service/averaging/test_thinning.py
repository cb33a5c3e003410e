"""The ring's rule against trying every removal, and its errors against synthesis over single updates.

Knows counters and profiles. Does not know files or who writes snapshots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ema_service.averaging.profiles import TargetRefused, decays_of, gamma_of, power_decay, power_product
from ema_service.averaging.synthesis import SnapshotBasis, TrackedAverage
from ema_service.averaging.targets import SigmaRel
from ema_service.averaging.thinning import Ring, errors_of, forecast

PAIR, TRIPLE = (0.05, 0.10), (0.015, 0.03, 0.25)
#: 0.22 is where a ring has most to lose.
WIDTHS = [*np.geomspace(0.015, 0.25, 12).tolist(), 0.22]


def live(ring: Ring, counters: Iterable[int]) -> list[Ring]:
    """The ring after each of these updates; between taking and dropping it holds no more than one too many."""
    rings = []
    for n in counters:
        ring = ring.taken(n) if ring.due(n) else ring
        assert len(ring.times) <= ring.capacity + 1
        if (surplus := ring.surplus()) is not None:
            ring = ring.dropped(surplus)
        assert len(ring.times) <= ring.capacity
        rings.append(ring)
    return rings


def rewound(ring: Ring, to: int) -> Ring:
    """The ring without the times after a rewind's."""
    return replace(ring, times=tuple(time for time in ring.times if time <= to))


def true_errors(sigma_rels: Sequence[float], times: Sequence[int], at: int, updates_a_time: int) -> list[float]:
    """The errors that synthesis has over single updates, with so many for each unit of time."""
    counters = np.arange(1, at * updates_a_time + 1)
    upto = tuple(sorted({*(time for time in times if time < at), at}))
    scaled = tuple(time * updates_a_time for time in upto)
    averages = [TrackedAverage(decays_of(power_decay(gamma_of(width)), counters), scaled) for width in sigma_rels]
    snapshots = SnapshotBasis(counters, averages)
    return [snapshots.solve(SigmaRel(width), scaled[-1], 0.0).error for width in WIDTHS]


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_rels", [(0.1,), PAIR, TRIPLE])
@pytest.mark.parametrize("times", [(), (5,), (1, 2, 3, 10, 40, 41, 55, 60), tuple(range(4, 64, 4))])
def test_errors_are_those_of_synthesis(sigma_rels: tuple[float, ...], times: tuple[int, ...]) -> None:
    """To 1 % where each interval has many updates; with few, a wish is fulfilled better than is said here."""
    found = errors_of(sigma_rels, times, 64, WIDTHS)

    assert found == pytest.approx(true_errors(sigma_rels, times, 64, 250), rel=0.01, abs=1e-9)
    assert (true_errors(sigma_rels, times, 64, 1) <= found * 1.05 + 1e-9).all()


def test_errors_by_inner_products() -> None:
    """One average at one time: the distance of two profiles, from their inner products."""
    a, b = gamma_of(0.1), gamma_of(0.2)
    products = power_product(a, 1, a, 1) - 2 * power_product(a, 1, b, 1) + power_product(b, 1, b, 1)
    expected = math.sqrt(products / power_product(b, 1, b, 1))

    assert errors_of((0.1,), (), 77, (0.2,))[0] == pytest.approx(expected, rel=1e-9, abs=0.0)


@given(scale=st.integers(1, 10**9))
def test_errors_have_no_unit(scale: int) -> None:
    """Ten times the updates between ten times as far times: the same errors."""
    times = (3, 5, 20, 21, 30)

    assert errors_of(TRIPLE, [time * scale for time in times], 33 * scale) == pytest.approx(
        errors_of(TRIPLE, times, 33), rel=1e-9, abs=1e-12
    )


# --- the rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma_rels", "capacity"), [(TRIPLE, 16), (PAIR, 8), ((0.1,), 1), (TRIPLE, 2)])
def test_drops_what_is_missed_least(sigma_rels: tuple[float, ...], capacity: int) -> None:
    """Against working out the errors anew without each time in turn."""
    ring = Ring(sigma_rels, capacity, 10)
    for n in range(10, 3000, 10):
        ring = ring.taken(n) if ring.due(n) else ring
        if (surplus := ring.surplus()) is not None:
            without = [[time for time in ring.times if time != one] for one in ring.times[:-1]]
            costs = [float((errors_of(sigma_rels, times, n) ** 8).sum()) for times in without]
            assert costs[ring.times.index(surplus)] == pytest.approx(min(costs), rel=1e-6, abs=0.0)
            ring = ring.dropped(surplus)


def test_candidates_are_regular_and_grow_rarer() -> None:
    """Every 10 updates up to 320, every 20 up to 640, and so on: a snapshot at each multiple, whatever is kept."""
    ring, taken = Ring(TRIPLE, 16, 10), []
    for n in range(1, 1281):
        if ring.due(n):
            taken.append(n)
            ring = live(ring, [n])[-1]

    assert taken == [*range(10, 321, 10), *range(340, 641, 20), *range(680, 1281, 40)]
    assert [ring.interval(n) for n in (1, 320, 321, 640, 641, 10**6)] == [10, 10, 20, 20, 40, 40960]


@pytest.mark.parametrize(
    "ring", [live(Ring(TRIPLE, 16, 3), range(1, 500))[-1], live(Ring(TRIPLE, 16, 3), range(7, 3000, 7))[-1]]
)
def test_first_update_past_a_multiple_is_taken(ring: Ring) -> None:
    """Updates that stand for several steps rarely hit a multiple: the next one after it is taken instead."""
    interval = ring.interval(ring.times[-1])
    following = (ring.times[-1] // interval + 1) * interval

    assert not ring.due(following - 1)
    assert ring.due(following + 1)


@pytest.mark.parametrize("sigma_rels", [TRIPLE, PAIR])
def test_goes_on_from_what_is_stored(sigma_rels: tuple[float, ...]) -> None:
    """Built again after each update from the interval and the times, it decides as the one that lived on."""
    counters = np.cumsum(np.random.default_rng(0).integers(1, 5, 2000)).tolist()
    whole = live(Ring(sigma_rels, 12, 4), counters)

    for n, before, after in zip(counters[1:], whole, whole[1:], strict=False):
        assert live(Ring(sigma_rels, 12, 4, tuple(before.times)), [n]) == [after]


def test_ends_between_taking_and_dropping() -> None:
    """With one too many on disk, a ring built again from what is stored drops the same one."""
    ring = live(Ring(TRIPLE, 4, 1), range(1, 5))[-1].taken(5)
    surplus = ring.surplus()

    assert surplus is not None
    assert Ring(TRIPLE, 4, 1, ring.times).surplus() == surplus
    assert ring.dropped(surplus).surplus() is None


def test_rewind_forgets_the_other_branch() -> None:
    """Candidates follow the times that are left as they did before."""
    ring = rewound(live(Ring(TRIPLE, 16, 1), range(1, 400))[-1], to=200)

    assert ring.times[-1] == 192
    after = live(ring, range(201, 600))
    assert after[-1].times[-1] == 576 == after[-1].interval(599) * 18


@given(
    gaps=st.lists(st.integers(1, 4) | st.integers(1, 300), max_size=150),
    capacity=st.integers(1, 9),
    every=st.integers(1, 20),
    back=st.lists(st.integers(0, 149), max_size=2),
)
@settings(max_examples=40, deadline=None)
def test_any_life(gaps: list[int], capacity: int, every: int, back: list[int]) -> None:
    """Whatever comes, with rewinds: times ascend, are updates of this branch, and none is taken before it is due."""
    ring, counters = Ring(TRIPLE, capacity, every), np.cumsum(gaps, dtype=int).tolist()
    for point in back:
        live_to = counters[point] if point < len(counters) else 0
        rings = live(ring, counters)
        ring = rewound(rings[-1], live_to) if rings else ring
        counters = [n for n in counters if n > live_to]
    rings = live(ring, counters)
    for ring, n in zip(rings, counters, strict=True):
        assert list(ring.times) == sorted(set(ring.times))
        assert not ring.times or ring.times[-1] <= n
        assert n // ring.interval(n) == (ring.times[-1] if ring.times else 0) // ring.interval(n)


@pytest.mark.parametrize("values", [((), 16, 1), ((0.1, 0.1), 16, 1), ((0.1,), 0, 1), ((0.1,), 16, 0)])
def test_what_makes_no_ring(values: tuple[tuple[float, ...], int, int]) -> None:
    """No average, one twice, no room, no interval."""
    with pytest.raises(ValueError, match="a ring needs"):
        Ring(*values)


def test_width_that_no_average_has() -> None:
    """Refused when the ring is made, not when it is first full."""
    with pytest.raises(TargetRefused, match="sigma_rel"):
        Ring((0.05, 0.3), 16, 1)


# --- the errors of a ring -------------------------------------------------------------------------------------------


def test_error_of_sixteen_times_at_every_length() -> None:
    """At most 0.009 for every target, wherever between 16 and 256 intervals the training ends."""
    every = 8
    rings = live(Ring(TRIPLE, 16, every), range(1, 256 * every + 1))

    for n, ring in enumerate(rings, 1):
        if n >= 16 * every:
            assert errors_of(TRIPLE, ring.times, n, WIDTHS).max() <= 0.009, n


def test_error_of_long_trainings() -> None:
    """The same up to half a million intervals; the pattern repeats with each doubling."""
    found = forecast(TRIPLE, 16, 2**19, 1)

    assert 0.005 < found.at_end <= found.at_worst <= 0.009


@pytest.mark.parametrize("length", [16, 17, 40, 100])
def test_error_of_sixteen_times_in_single_updates(length: int) -> None:
    """The same by synthesis itself, over the updates of a training that ends after this many intervals."""
    every = 25
    ring = live(Ring(TRIPLE, 16, every), range(1, length * every + 1))[-1]

    assert max(true_errors(TRIPLE, ring.times, length * every, 1)) <= 0.009


def test_forecast_is_what_happens() -> None:
    """The errors at the end and the largest on the way are those of a ring that lives through the training."""
    rings = live(Ring(TRIPLE, 8, 10), range(1, 1111))
    targets = WIDTHS
    errors = [float(errors_of(TRIPLE, ring.times, n, targets).max()) for n, ring in enumerate(rings, 1)]

    found = forecast(TRIPLE, 8, 1110, 10, targets)

    assert found.at_end == errors[-1]
    assert found.at_worst == pytest.approx(max(errors[79:]), rel=0.03)


def test_forecast_of_a_training_that_is_over_at_once() -> None:
    """Fewer updates than the ring has times: all there is to tell is the end."""
    found = forecast(TRIPLE, 16, 30, 10)

    targets = np.geomspace(0.015, 0.25, 25).tolist()
    assert found.at_end == found.at_worst == pytest.approx(errors_of(TRIPLE, (10, 20), 30, targets).max())


def test_more_averages_need_fewer_times() -> None:
    """The trade that a plan shows: three averages at 16 times are nearer than two at 32, on a quarter less disk."""
    assert forecast(TRIPLE, 16, 10**4, 100).at_worst < forecast(PAIR, 32, 10**4, 100).at_worst / 5
