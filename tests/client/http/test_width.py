"""How many lanes are found, on simulated links; no clocks, no sockets."""

from __future__ import annotations

import random

import pytest

from ema_client.http.width import Seen, Width

SEEDS = 200


def rate_of(lanes: int, flows: int, noise: float, dice: random.Random) -> float:
    """Of a link on which each flow has a share of 1, up to ``flows`` of them."""
    return min(lanes, flows) * max(0.05, dice.gauss(1.0, noise))


def live(width: Width, bodies: int, windows: int, flows: int, noise: float, seed: int, wanted: float = 0.05) -> float:
    """Let bodies go by; returns the time that they took, relative to the best number of lanes."""
    dice, taken = random.Random(seed), 0.0
    for _ in range(bodies):
        width.begins()
        for _ in range(windows):
            lanes = width.lanes
            rate = rate_of(lanes, flows, noise, dice)
            taken += 1 / min(lanes, flows)
            width.saw(Seen(lanes, rate, wanted * lanes))
    return taken * flows / (bodies * windows)


@pytest.mark.parametrize("start", [1, 2])
def test_a_wide_link(start: int) -> None:
    """All lanes that pay are found, within the first two bodies of a few seconds, and kept."""
    for seed in range(SEEDS):
        width = Width(start, 8, cores=16)
        live(width, 2, 8, flows=8, noise=0.05, seed=seed)
        assert width.found == 8, (seed, width.why)
        cost = live(width, 300, 1, flows=8, noise=0.05, seed=seed)
        assert width.found == 8
        assert cost < 1.05


def test_a_noisy_link() -> None:
    """With a quarter of noise the way is longer, and costs little."""
    costs = []
    for seed in range(SEEDS):
        width = Width(1, 8, cores=16)
        costs.append(live(width, 300, 2, flows=8, noise=0.25, seed=seed))
    assert sum(costs) / len(costs) < 1.1
    assert max(costs) < 1.8


def test_a_single_flow() -> None:
    """Nothing is gained by more, and more are tried less and less often."""
    for seed in range(20):
        width, tried, dice = Width(1, 8, cores=16), 0, random.Random(seed)
        for _ in range(7000):
            width.begins()
            tried += width.lanes > 1
            width.saw(Seen(width.lanes, rate_of(width.lanes, 1, 0.02, dice), 0.05))
        assert width.found == 1
        assert tried <= 3 * 6


def test_a_link_that_becomes_narrow() -> None:
    """Fewer lanes are tried now and then, and stay where nothing is lost."""
    for seed in range(20):
        width = Width(1, 8, cores=16)
        live(width, 2, 8, flows=8, noise=0.05, seed=seed)
        live(width, 900, 1, flows=1, noise=0.03, seed=seed)
        assert width.found == 1


@pytest.mark.parametrize(
    ("cores", "ends", "wanted", "grows"), [(2, 2, 0.6, False), (16, 2, 0.6, True), (2, 1, 0.6, True)]
)
def test_the_processors(cores: int, ends: int, wanted: float, grows: bool) -> None:
    """More lanes than processors that could carry them are not even tried; nor where nothing tells."""
    width = Width(1, 8, cores=cores, ends=ends)
    width.begins()
    width.saw(Seen(1, 1.0, None))
    assert (width.lanes, width.why) == (1, "this system does not tell what more would cost")
    width.saw(Seen(1, 1.0, wanted))
    assert (width.lanes > 1, width.crowded) == (grows, not grows)


def test_bounds() -> None:
    """The service's bound holds at once, and a measurement of another number of lanes says nothing."""
    width = Width(2, 8, cores=16)
    live(width, 2, 8, flows=8, noise=0.0, seed=0)
    width.bound(3)
    assert width.lanes == 3
    live(width, 5, 8, flows=8, noise=0.0, seed=0)
    assert width.lanes == 3
    width.bound(1)
    width.saw(Seen(8, 100.0, 0.0))
    assert width.lanes == 1


def test_a_first_body_that_is_slow() -> None:
    """Memory that is used for the first time makes the first bodies slow: what comes after is no gain of its lanes."""
    width = Width(1, 8, cores=16)
    for body in range(20):
        width.begins()
        rate = {1: 1.4e9, 2: 1.1e9}[width.lanes] * (0.3, 0.6, 1.0)[min(body, 2)]
        width.saw(Seen(width.lanes, rate, 0.1))
    assert (width.found, width.lanes) == (1, 1)


def test_slow_flows_are_found_at_once() -> None:
    """Of flows of 100 MB/s no memory is the limit: all lanes that pay are known after as many measurements as there are
    doublings, and one, though they are of the first bodies."""
    width = Width(1, 8, cores=2)
    for _ in range(2):
        width.begins()
        for _ in range(2):
            width.saw(Seen(width.lanes, 100e6 * width.lanes, 0.05))
    assert width.found == 8


def test_when_another_number_may_be_tried() -> None:
    """Lanes are expected to be as they were once no other number of them is being tried, or soon will be."""
    width = Width(1, 8, cores=16)
    settled = []
    for rate in (1.0, 2.0, 4.0, 8.0, 8.0):
        settled.append(width.settled)
        width.begins()
        width.saw(Seen(width.lanes, 100e6 * rate, 0.05))
    assert (settled, width.settled, width.found) == ([False] * 4 + [True], True, 8)


@pytest.mark.parametrize(("one", "wanted", "found"), [(1.3, 1.0, 1), (0.97, 1.0, 1), (0.8, 1.0, 2), (1.3, 0.2, 2)])
def test_fewer_lanes_than_at_the_beginning(one: float, wanted: float, found: int) -> None:
    """Where the processors are the limit, one lane is tried soon, and stays where it brings about what two do."""
    width = Width(2, 8, cores=2, ends=2)
    for _ in range(12):
        width.begins()
        width.saw(Seen(width.lanes, {1: one, 2: 1.0}.get(width.lanes, 1.0), wanted))
    assert width.found == found, width.why


def test_the_lanes_of_the_beginning_are_tried_again() -> None:
    """A service that one lane was enough for may become one that two lanes bring more from, and nothing is too late."""
    width = Width(2, 8, cores=2, ends=2)
    for body in range(700):
        width.begins()
        one = 1.3 if body < 100 else 0.5
        width.saw(Seen(width.lanes, {1: one, 2: 1.0}.get(width.lanes, 1.0), 1.0))
        if body == 50:
            assert width.found == 1
    assert width.found == 2
