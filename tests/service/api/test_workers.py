"""The threads of a server: a request that is given up outlasts the work it began; averaging behind the receiving.

Knows the event loop. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import anyio
import pytest

from ema_service.api.workers import Behind, Workers

WAIT_SECONDS = 30.0


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.close()


def cancel_once(task: asyncio.Task[None]) -> None:
    task.cancel()


def cancel_again_and_again(task: asyncio.Task[None]) -> None:
    """As the task group of a streamed answer does, until the task ends."""
    if not task.done():
        task.cancel()
        asyncio.get_running_loop().call_later(0.005, cancel_again_and_again, task)


@pytest.mark.parametrize("cancel", [cancel_once, cancel_again_and_again])
@pytest.mark.parametrize("kind", ["compute", "block"])
def test_given_up_request_waits_for_its_work(
    kind: str, cancel: Callable[[asyncio.Task[None]], None], workers: Workers
) -> None:
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
        cancel(task)
        await asyncio.sleep(0.05)
        assert ended == []
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(play())
    assert ended == ["work", "request"]


def test_given_up_stream_waits_without_spinning(workers: Workers) -> None:
    """In a task group, as starlette streams an answer, the event loop rests while the work is waited for."""
    begun, may_end = threading.Event(), threading.Event()
    ended: list[str] = []

    def work() -> None:
        begun.set()
        assert may_end.wait(WAIT_SECONDS)
        ended.append("work")

    async def stream() -> None:
        try:
            await workers.block(work)
        finally:
            ended.append("stream")

    async def play() -> float:
        async with anyio.create_task_group() as group:
            group.start_soon(stream)
            await asyncio.get_running_loop().run_in_executor(None, begun.wait)
            group.cancel_scope.cancel()
            before = time.thread_time()
            threading.Timer(0.5, may_end.set).start()
        return time.thread_time() - before

    spent = asyncio.run(play())
    assert ended == ["work", "stream"]
    assert spent < 0.25


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
