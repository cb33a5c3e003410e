"""Lanes as threads: every stretch is carried once, however many lanes there are from moment to moment. No sockets."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable

import pytest

from ema_client.errors import ConnectionLost, EmaError, NonFinite, Overloaded, Superseded
from ema_client.forks import Lock
from ema_client.http import cancelling
from ema_client.http.lanes import Moved, carry_all
from ema_client.http.pace import Pace
from ema_client.http.stretches import Stretch, Stretches
from tests.waiting import wait_until

KIB = 1 << 10
SIZE = 300 * KIB + 7


class Fickle(Pace):
    """Another number of lanes at each look."""

    def __init__(self, seed: int) -> None:
        super().__init__(None, 1, Lock())
        self._dice = random.Random(seed)

    @property
    def lanes(self) -> int:
        return self._dice.choice((1, 1, 2, 5))


class Carried:
    """What was carried, by a function that fails as ``fault`` says."""

    def __init__(self, fault: Callable[[Stretch], EmaError | None] = lambda _: None) -> None:
        self.stretches: list[Stretch] = []
        self.moved = 0
        self._fault = fault
        self._lock = threading.Lock()

    def carry(self, stretch: Stretch, moved: Moved) -> None:
        for _ in range(0, stretch.size, KIB):
            moved(min(KIB, stretch.size))
        moved(stretch.size - KIB * -(-stretch.size // KIB) if stretch.size >= KIB else 0)
        if (fault := self._fault(stretch)) is not None:
            raise fault
        with self._lock:
            self.stretches.append(stretch)

    def tell(self, count: int) -> None:
        with self._lock:
            self.moved += count

    @property
    def is_whole(self) -> bool:
        came = sorted(self.stretches)
        joined = all(one.stop == other.start for one, other in itertools.pairwise(came))
        return joined and (came[0].start, came[-1].stop, self.moved) == (0, SIZE, SIZE)


def queue() -> Stretches:
    return Stretches(0, SIZE, grain=KIB, smallest=KIB)


@pytest.mark.parametrize("seed", range(20))
def test_a_number_that_changes(seed: int) -> None:
    """Lanes come and go, the last one stays: nothing is left, nothing is carried twice."""
    carried = Carried()
    carry_all(queue(), carried.carry, Fickle(seed), moved=carried.tell)
    assert carried.is_whole


@pytest.mark.parametrize("fault", [ConnectionLost("gone"), Overloaded("no more")])
def test_faults_of_one_lane(fault: EmaError) -> None:
    """Each stretch fails once, on whichever lane: all of it comes, by one call or by one more with the same queue."""
    failed: set[int] = set()
    lock = threading.Lock()

    def once(stretch: Stretch) -> EmaError | None:
        with lock:
            if stretch.start in failed or len(failed) > 20:
                return None
            failed.add(stretch.start)
        return fault

    carried, left = Carried(once), queue()
    for _ in range(40):
        try:
            carry_all(left, carried.carry, Pace.fixed(4), moved=carried.tell)
        except type(fault):
            continue
        break
    assert carried.is_whole


def test_a_fault_of_the_whole() -> None:
    """Ends all lanes, and is raised once none is at work."""
    carried = Carried(lambda stretch: NonFinite("NaN") if stretch.start > SIZE // 2 else None)
    with pytest.raises(NonFinite):
        carry_all(queue(), carried.carry, Pace.fixed(4))
    assert_no_lane()


def test_a_defect() -> None:
    """What is no error of the service, on any lane, reaches the caller."""

    def defect(_: Stretch) -> EmaError | None:
        if threading.current_thread() is not threading.main_thread():
            raise ZeroDivisionError
        return None

    def slow(stretch: Stretch, moved: Moved) -> None:
        threading.Event().wait(0.001)
        Carried(defect).carry(stretch, moved)

    with pytest.raises(ZeroDivisionError):
        carry_all(queue(), slow, Pace.fixed(4))


class Still(Carried):
    """One stretch, the last to begin, stands still ``after`` so many bytes until its lane is cancelled; or, once
    ``freed``, comes."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after
        self.freed = threading.Event()
        self.tried: list[int] = []
        self.fault: EmaError | None = None

    def carry(self, stretch: Stretch, moved: Moved) -> None:
        with self._lock:
            self.tried.append(stretch.start)
            stands = stretch.stop == SIZE and self.tried.count(stretch.start) == 1
        if not stands:
            if self.fault is not None and stretch.stop == SIZE:
                self.freed.set()
                raise self.fault
            super().carry(stretch, moved)
            return
        moved(self.after if self.after < KIB else stretch.size)
        while not self.freed.wait(0.01):
            moved(0)
        moved(0)
        with self._lock:
            self.stretches.append(stretch)


def assert_no_lane() -> None:
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ema lane")]


@pytest.mark.parametrize("after", [0, 5, KIB], ids=["before the first byte", "in the middle", "before the answer"])
def test_a_lane_that_stands_still(after: int) -> None:
    """Another one carries its stretch; told are the bytes of one of them."""
    still = Still(after)
    carry_all(queue(), still.carry, Pace.fixed(4), moved=still.tell)
    assert still.is_whole
    assert len(still.tried) == len(set(still.tried)) + 1
    assert_no_lane()


@pytest.mark.parametrize("fault", [Superseded("by the other"), ConnectionLost("gone"), Overloaded("no more")])
def test_an_answer_that_comes_after_all(fault: EmaError) -> None:
    """A lane that waits for its answer is not given up before another one has brought the stretch, whatever that one
    meets."""
    still = Still(KIB)
    still.fault = fault
    carry_all(queue(), still.carry, Pace.fixed(4), moved=still.tell)
    assert still.is_whole


def test_bodies_that_are_not_helped() -> None:
    """A lane that waits for something other than its connection is left alone."""
    still = Still(5)
    threading.Timer(3.0, still.freed.set).start()
    carry_all(queue(), still.carry, Pace.fixed(4), helped=False)
    assert len(still.tried) == len(set(still.tried))


class Silent:
    """A connection that brings nothing until it is interrupted."""

    def __init__(self) -> None:
        self.interrupted = threading.Event()
        self.interrupt = self.interrupted.set

    def read(self) -> None:
        cancelling.hold(self)
        self.interrupted.wait(10)
        raise ConnectionLost("interrupted")


def test_a_fault_ends_a_lane_that_stands_still() -> None:
    """Nothing is waited for that nobody wants."""
    silent: list[Silent] = []

    def carry(stretch: Stretch, _: Moved) -> None:
        if stretch.start == 0:
            wait_until(lambda: silent)
            raise NonFinite("NaN")
        silent.append(Silent())
        silent[-1].read()

    with pytest.raises(NonFinite):
        carry_all(queue(), carry, Pace.fixed(4))
    assert_no_lane()
    assert all(each.interrupted.is_set() for each in silent)
