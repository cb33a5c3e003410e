"""The threads of a server: a request that is given up outlasts the work it began; averaging behind the receiving.

Knows the event loop. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ema_service.api.workers import Behind, Workers

WAIT_SECONDS = 30.0


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.close()


@pytest.mark.parametrize("kind", ["compute", "block"])
def test_given_up_request_waits_for_its_work(kind: str, workers: Workers) -> None:
    """Cancelled, it ends only once its work has: the memory that the work uses is the request's until then."""
    begun, may_end = threading.Event(), threading.Event()
    ended: list[str] = []

    def work() -> None:
        begun.set()
        assert may_end.wait(WAIT_SECONDS)
        ended.append("work")

    async def request() -> None:
        try:
            await getattr(workers, kind)(work)
        finally:
            ended.append("request")

    async def play() -> None:
        task = asyncio.ensure_future(request())
        await asyncio.get_running_loop().run_in_executor(None, begun.wait)
        task.cancel()
        await asyncio.sleep(0.05)
        assert ended == []
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(play())
    assert ended == ["work", "request"]


def test_errors_of_work_are_raised(workers: Workers) -> None:
    """What the work raises is raised to who awaits it."""

    def work() -> None:
        raise ValueError("of the work")

    with pytest.raises(ValueError, match="of the work"):
        asyncio.run(workers.compute(work))


def test_behind_on_the_receiving_thread_works_at_once() -> None:
    """Where the caller may take its time every count is passed on as it comes."""
    counts: list[int] = []
    with ThreadPoolExecutor(1) as threads:
        behind = Behind(threads, counts.append)
        for arrived in (1, 2, 3):
            behind.here(arrived)

    assert counts == [1, 2, 3]


def test_behind_on_the_event_loop_gathers_counts() -> None:
    """A thread is woken for enough bytes only, one call at a time, and is told the latest count."""
    counts: list[int] = []
    working, may_go_on = threading.Event(), threading.Event()

    def advance(arrived: int) -> None:
        counts.append(arrived)
        working.set()
        assert may_go_on.wait(WAIT_SECONDS)

    mebibyte = 1 << 20
    with ThreadPoolExecutor(2) as threads:
        behind = Behind(threads, advance)
        behind.elsewhere(7 * mebibyte)
        assert not counts
        behind.elsewhere(8 * mebibyte)
        assert working.wait(WAIT_SECONDS)
        for arrived in range(9, 40):
            behind.elsewhere(arrived * mebibyte)
        may_go_on.set()

    assert counts == [8 * mebibyte, 39 * mebibyte]
