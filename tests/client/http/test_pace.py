"""What of a body is a measurement of its lanes: a clock by hand, lanes that are numbers of no thread."""

from __future__ import annotations

import pytest

from ema_client.forks import Lock
from ema_client.http.pace import Pace
from ema_client.http.width import Seen, Width

ONE, TWO = frozenset({-1}), frozenset({-1, -2})


class Watched(Width):
    """A width that says what it saw."""

    def __init__(self) -> None:
        super().__init__(2, 8, cores=2, ends=2)
        self.seen: list[tuple[int, float]] = []

    def saw(self, seen: Seen) -> None:
        self.seen.append((seen.lanes, round(seen.rate)))


class Body:
    """A body whose bytes come when a test says so. ``width`` is told by ``pace``."""

    def __init__(self) -> None:
        self.now, self.width = 0.0, Watched()
        self.pace = Pace(self.width, 0, Lock(), lambda: self.now)

    def come(self, count: int, seconds: float) -> None:
        self.now += seconds
        self.pace.moved(count)


@pytest.mark.parametrize(
    ("before", "between", "after", "seen"),
    [(0, 80, 20, [(2, 1000)]), (10, 70, 20, [(2, 1000)]), (30, 60, 10, []), (10, 40, 50, [])],
)
def test_a_short_body(before: int, between: int, after: int, seen: list[tuple[int, float]]) -> None:
    """A body too short for a window is one measurement, if two lanes carried it but for its first and last bytes."""
    body = Body()
    body.pace.at_work(ONE)
    body.come(before, before / 1000)
    body.pace.at_work(TWO)
    body.come(between, between / 1000)
    body.pace.at_work(ONE)
    body.come(after, after / 1000)
    body.pace.ends()
    assert body.width.seen == seen


def test_a_lane_that_comes_back() -> None:
    """A body that one lane carried alone for a while is no measurement of two."""
    body = Body()
    for lanes in (TWO, ONE, TWO):
        body.pace.at_work(lanes)
        body.come(30, 0.03)
    body.pace.ends()
    assert body.width.seen == []


def test_a_long_body() -> None:
    """A body of some time is measured on its way, anew after each change of its lanes, and not once more at its end."""
    body = Body()
    body.pace.at_work(ONE)
    for _ in range(40):
        body.come(10, 0.01)
    body.pace.at_work(TWO)
    for _ in range(40):
        body.come(20, 0.01)
    body.pace.ends()
    assert [(lanes, round(rate, -3)) for lanes, rate in body.width.seen] == [(1, 1000), (2, 2000)]
