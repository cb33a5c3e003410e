"""Runs of strides, against lists of them.

Knows integers. Does not know runs of trainings.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from ema_service.averaging.strides import Strides

LISTS = some.lists(some.integers(1, 3), max_size=40)


def made(strides: list[int]) -> Strides:
    found = Strides()
    for stride in strides:
        found.append(stride)
    return found


def as_list(strides: Strides) -> list[int]:
    return np.diff(strides.counters(0, strides.updates), prepend=0).tolist()


@given(LISTS, some.integers(0, 1000), some.integers(0, 50))
def test_counters(strides: list[int], begin: int, updates: int) -> None:
    """The counter after each update is the beginning and all strides up to there."""
    expected = [begin + sum(strides[: i + 1]) for i in range(min(updates, len(strides)))]
    assert made(strides).counters(begin, updates).tolist() == expected
    assert made(strides).distance == sum(strides)
    assert made(strides).updates == len(strides)


@given(LISTS)
def test_runs_are_all_there_is(strides: list[int]) -> None:
    """From its runs an equal one is made, and neighbours of one run have different strides."""
    runs = made(strides).runs
    assert as_list(Strides(runs)) == strides
    assert np.all(np.diff(runs[:, 0]) != 0)
    again = Strides(runs)
    again.append(7)
    assert as_list(again) == [*strides, 7]


@given(LISTS, some.integers(0, 50))
def test_cut(strides: list[int], updates: int) -> None:
    """What is cut off is as if it had never been."""
    found = made(strides)
    found.cut(updates)
    assert as_list(found) == strides[:updates]
    assert found.updates == min(updates, len(strides))


@given(some.integers(1, 50), some.integers(0, 500))
def test_spread(count: int, more: int) -> None:
    """Unknown strides are as even as integers are, and lead to where the counter is."""
    found = made([9])
    found.spread(count + more, count)
    strides = as_list(found)[1:]
    assert (len(strides), sum(strides)) == (count, count + more)
    assert max(strides) - min(strides) <= 1


@pytest.mark.parametrize("stride", [1, 7])
def test_regular_training_is_one_run(stride: int) -> None:
    """A million equal strides take no more room than one."""
    found = made([stride] * 1000)
    found.append(stride, 999_000)
    assert found.runs.tolist() == [[stride, 1_000_000]]
    assert list(accumulate([stride] * 5)) == found.counters(0, 5).tolist()
