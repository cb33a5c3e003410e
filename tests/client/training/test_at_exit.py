"""The end of the program, with publishers played by the test."""

from __future__ import annotations

import threading
import time

from ema_client.training.at_exit import ProgramEnd


class Ending:
    """A publisher: when it was told to end, and what it raises then."""

    def __init__(self, fault: BaseException | None = None) -> None:
        self.began: list[float] = []
        self.fault = fault

    def end_with_program(self, began: float) -> None:
        self.began.append(began)
        if self.fault:
            raise self.fault


def test_all_end_within_one_time() -> None:
    """Each publisher is told the same beginning, so that two that hang take no longer than one."""
    program, first, second = ProgramEnd(), Ending(), Ending()
    for publisher in (first, second):
        program.watch(publisher, threading.Thread())
    before = time.monotonic()
    program.finish()

    assert first.began == second.began
    assert before <= first.began[0] <= time.monotonic()


def test_ctrl_c_ends_the_waiting_for_one_only() -> None:
    """Whoever presses Ctrl-C at the end gets on to the next publisher, and then out."""
    program = ProgramEnd()
    publishers = [Ending(KeyboardInterrupt()), Ending(KeyboardInterrupt())]
    for publisher in publishers:
        program.watch(publisher, threading.Thread())
    program.finish()

    assert all(publisher.began for publisher in publishers)


def test_threads_are_joined_for_a_bounded_time() -> None:
    """A thread that ends is waited for; one that hangs is left after a second."""
    program, quick, release = ProgramEnd(), threading.Thread(target=time.sleep, args=(0.2,)), threading.Event()
    hanging = threading.Thread(target=release.wait, daemon=True)
    for thread in (quick, hanging):
        program.watch(Ending(), thread)
        thread.start()
    before = time.monotonic()
    program.finish()

    assert not quick.is_alive()
    assert hanging.is_alive()
    assert time.monotonic() - before < 10
    release.set()
    hanging.join(20)


def test_what_has_ended_is_not_told() -> None:
    """A publisher that is forgotten is not told to end; a forked process, which forgets all, tells none."""
    program, ended, running = ProgramEnd(), Ending(), Ending()
    for publisher in (ended, running):
        program.watch(publisher, threading.Thread())
    program.forget(ended)
    assert program.running == {running}
    program.after_fork()
    program.finish()

    assert (ended.began, running.began) == ([], [])
