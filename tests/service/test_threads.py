"""Threads: finished work holds nothing.

Knows futures and weak references. Does not know what a server does on its threads.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ema_service.threads import Threads


class Large:
    """Stands for the memory of a version."""

    def use(self, value: int) -> int:
        if value < 0:
            raise ValueError(value)
        return value


@pytest.fixture
def threads() -> Iterator[Threads]:
    with Threads(1, "test") as threads:
        yield threads


def alive_when_done(pool: ThreadPoolExecutor) -> bool:
    """Whether what the work refers to is still alive when its result can be seen first."""
    large, go_on = Large(), threading.Event()
    seen: list[bool] = []
    reference = weakref.ref(large)
    future = pool.submit(lambda held: held.use(go_on.wait(30) and 7), large)
    future.add_done_callback(lambda _: seen.append(reference() is not None))
    del large
    go_on.set()
    assert future.result() == 7
    pool.submit(int).result()  # the callback has run
    return seen[0]


def test_work_is_let_go_before_its_result_is_seen(threads: Threads) -> None:
    """With the standard pool it is held a moment longer, in which the next push would be given new memory."""
    assert not alive_when_done(threads)
    with ThreadPoolExecutor(1) as standard:
        assert alive_when_done(standard)


def test_arguments_results_and_errors_pass_through(threads: Threads) -> None:
    """As with the standard pool."""
    assert threads.submit(Large().use, 3).result() == 3
    assert threads.submit(Large().use, value=4).result() == 4
    assert list(threads.map(Large().use, [1, 2, 3])) == [1, 2, 3]
    with pytest.raises(ValueError, match="-1"):
        threads.submit(Large().use, -1).result()
