"""A table of what was measured: bounded, the newest rows whole, older ones thinned.

Knows numbers and rows. Does not know what is measured.
"""

from __future__ import annotations

import numpy as np
import pytest

from ema_service.averaging.series import MOST_ROWS, Series, evenly

#: Measurements of a day.
DAY = 24 * 12


def filled(count: int) -> Series:
    series = Series(2)
    for number in range(count):
        series.add((number, number / 7))
    return series


def test_few_rows_are_all_there() -> None:
    """Until the table is full, every row is as it was added."""
    assert filled(MOST_ROWS).rows.tolist() == [[n, n / 7] for n in range(MOST_ROWS)]


@pytest.mark.parametrize("count", [MOST_ROWS + 1, 5_000, 100_000])
def test_old_rows_are_thinned(count: int) -> None:
    """Of any number of rows a bounded one is kept: the first, the newest quarter whole, and of the others the fewer the
    older; in order, and as they were."""
    rows = filled(count).rows
    numbers, newest = rows[:, 0], MOST_ROWS // 4

    assert MOST_ROWS // 2 <= len(rows) <= MOST_ROWS
    assert numbers[-newest:].tolist() == list(range(count - newest, count))
    assert (np.diff(numbers) > 0).all()
    assert rows[:, 1].tolist() == (numbers / 7).tolist()
    assert numbers[0] == 0
    gaps = np.diff(numbers[:-newest])
    assert gaps[: len(gaps) // 4].mean() > 1.5 * gaps[-len(gaps) // 4 :].mean()


def test_a_year() -> None:
    """After a year of a measurement every five minutes, there are rows of its first half, its last month, week, day."""
    year = filled(365 * DAY).rows[:, 0]
    age = year[-1] - year

    for begin, end, least in ((180, 365, 40), (7, 30, 40), (1, 7, 40), (0, 1, 200)):
        assert ((age >= begin * DAY) & (age < end * DAY)).sum() >= least


@pytest.mark.parametrize("most", [1, 2, 7, 500])
def test_evenly(most: int) -> None:
    """At most so many times, the newest among them, none more than twice as far from the next as even ones are."""
    times = np.sort(np.random.default_rng(0).uniform(0, 100, 100_000))
    found = times[evenly(times, most)]

    assert len(found) <= most
    assert found[-1] == times[-1]
    if most > 2:
        assert np.diff(found).max() <= 2 * 100 / (most - 1)
    assert evenly(times[:0], most).size == 0
    assert len(evenly(np.zeros(9), most)) <= max(most, 1)
