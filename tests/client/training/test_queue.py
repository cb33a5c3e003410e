"""The queue between the trainer's thread and the sending thread, both played by the test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ema_client.errors import ServiceUnreachable
from ema_client.http.body import Body
from ema_client.training.queue import SLOTS, UpdateQueue
from ema_client.training.updates import Update

T = TypeVar("T")
PATIENCE = 20.0
GONE = ServiceUnreachable("gone")


def update(step: int, *, borrowed: bool = False, done: Callable[[], None] = lambda: None) -> Update:
    return Update(step, Body(0, lambda: ()), lambda: None, done, borrowed)


def waits(future: Future[T]) -> bool:
    """Whether a call has not returned a moment later."""
    return not threading.Event().wait(0.05) and not future.done()


def test_room_and_order() -> None:
    """Two updates have room; the first stays first until it is removed, and gives its memory back then."""
    queue, back = UpdateQueue(), []
    for step in range(SLOTS):
        assert queue.has_room(wait=False)
        queue.put(update(step, done=lambda step=step: back.append(step)))  # type: ignore[misc]
    assert not queue.has_room(wait=False)
    first, second = queue.unsent(0), queue.unsent(1)
    assert first is not None
    assert second is not None
    assert (first.step, second.step, queue.pending, back) == (0, 1, 2, [])
    assert queue.unsent(2, 0.01) is None
    queue.remove(first)

    assert (queue.pending, back, queue.has_room(wait=False)) == (1, [0], True)


def test_waiting_for_room_ends_with_room_or_with_the_service() -> None:
    """Room is waited for, but not while the service is away, and not for a thread that has broken down."""
    queue = UpdateQueue()
    with ThreadPoolExecutor(1) as trainer:
        for step in range(SLOTS):
            queue.put(update(step))
        waiting = trainer.submit(queue.has_room, wait=True)
        assert waits(waiting)
        queue.remove(queue.left()[0])
        assert waiting.result(PATIENCE)
        queue.put(update(2))
        waiting = trainer.submit(queue.has_room, wait=True)
        queue.get_stuck(GONE, after_round=True)
        assert not waiting.result(PATIENCE)
        queue.get_through()
        waiting = trainer.submit(queue.has_room, wait=True)
        assert waits(waiting)
        queue.break_down(GONE)
        assert not waiting.result(PATIENCE)
        queue.remove(queue.left()[0])
        assert not queue.has_room(wait=True), "a broken queue took an update"


def test_a_flush_waits_for_a_round_of_its_own() -> None:
    """A sender that was stuck before is given another round; its pause is cut short."""
    queue, sent = UpdateQueue(), update(1)
    queue.put(sent)
    queue.get_stuck(GONE, after_round=True)
    with ThreadPoolExecutor(2) as threads:
        pausing = threads.submit(queue.pause, sent, 1e6)
        assert waits(pausing)
        flushing = threads.submit(queue.wait_until_empty, None)
        assert pausing.result(PATIENCE)
        assert waits(flushing)
        queue.get_stuck(GONE, after_round=True)
        assert flushing.result(PATIENCE) == (1, GONE)
    assert queue.rounds == 2


def test_a_flush_has_its_time() -> None:
    """After ``timeout`` seconds it tells what is pending."""
    queue = UpdateQueue()
    queue.put(update(1))

    assert queue.wait_until_empty(0.01) == (1, None)
    queue.remove(queue.left()[0])
    assert queue.wait_until_empty(0.01) == (0, None)


def test_news_of_the_service_are_told_once() -> None:
    """That the service went away is news once, and so is that it is back."""
    queue = UpdateQueue()

    assert [queue.get_stuck(GONE, after_round=True) for _ in range(3)] == [True, False, False]
    assert (queue.stuck, queue.rounds) == (GONE, 3)
    assert [queue.get_through() for _ in range(2)] == [True, False]
    assert (queue.stuck, queue.rounds) == (None, 0)


def test_borrowed_memory_is_recalled() -> None:
    """recall() ends the pause of a borrowed update, and returns when the update is gone; copies are left alone."""
    queue, borrowed = UpdateQueue(), update(1, borrowed=True)
    queue.put(borrowed)
    with ThreadPoolExecutor(2) as threads:
        pausing = threads.submit(queue.pause, borrowed, 1e6)
        recalling = threads.submit(queue.recall)
        assert not pausing.result(PATIENCE)
        assert waits(recalling)
        queue.remove(borrowed)
        recalling.result(PATIENCE)
    queue.put(update(2))
    queue.recall()

    assert queue.pending == 1


def test_the_end_sends_what_is_pending_or_abandons_it() -> None:
    """After end() the sender is given what is there, then None; abandoned, None at once, and no pause is waited for."""
    queue, last = UpdateQueue(), update(1)
    queue.put(last)
    queue.end(abandon=False)
    assert queue.ending
    assert queue.unsent(0) is last
    assert queue.pause(last, 0.0)
    queue.end(abandon=True)

    assert queue.unsent(0) is None
    assert not queue.pause(last, 1e6)
    queue.remove(last)
    queue.end(abandon=False)
    assert queue.unsent(0) is None
