"""The queue of stretches: simulated lanes of known rates take every byte once, and end at nearly the same time.

Knows a clock that the test moves. Does not know connections.
"""

from __future__ import annotations

import heapq
import random
from itertools import pairwise

import pytest

from ema_client.http.stretches import SMALLEST_BYTES, Stretch, Stretches

MB, MIB = 1e6, 1 << 20


def simulate(
    size: int, rates: list[float], *, breaks: float = 0.0, seed: int = 0, expect_alike: bool = False
) -> tuple[float, list[Stretch], bool]:
    """Seconds until ``size`` bytes have come by lanes of ``rates`` bytes a second, the stretches that came, and whether
    the lanes were alike.

    breaks: how likely a stretch is to break off, at its end.
    """
    now, dice = 0.0, random.Random(seed)
    queue = Stretches(0, size, grain=MIB, clock=lambda: now, expect_alike=expect_alike)
    free, came = [(0.0, lane, None) for lane in range(len(rates))], list[Stretch]()
    end = 0.0
    while free:
        now, lane, brought = heapq.heappop(free)
        if brought is not None and dice.random() < breaks:
            queue.broke(lane)
        elif brought is not None:
            queue.came(lane)
            came.append(brought)
            end = now
        if (taken := queue.take(lane, len(rates))) is not None:
            heapq.heappush(free, (now + taken.size / rates[lane], lane, taken))
        else:
            queue.leaves(lane)
    assert queue.whole
    return end, sorted(came), queue.alike


def test_every_byte_once() -> None:
    """Whatever the rates are, and whatever breaks off; all but the last stretch begin and end at a grain."""
    dice = random.Random(1)
    for seed in range(50):
        size = dice.randrange(1, 3 << 30)
        rates = [dice.uniform(5, 500) * MB for _ in range(dice.randrange(1, 12))]
        _, came, _ = simulate(size, rates, breaks=0.2, seed=seed)

        assert (came[0].start, came[-1].stop) == (0, size)
        assert all(one.stop == other.start for one, other in pairwise(came))
        assert all(stretch.start % MIB == 0 for stretch in came)


def test_a_stretch_that_came_in_part() -> None:
    """Of a stretch that breaks off what came to stay is not carried again; one of which all came is not either."""
    queue = Stretches(0, 3 * MIB, grain=MIB, smallest=MIB)
    taken = queue.take(0, 1, size=2 * MIB)
    assert taken == Stretch(0, 2 * MIB)
    queue.moved(0, MIB + 7)
    queue.reached(taken, MIB)
    assert queue.come == MIB
    assert queue.broke(0) == (False, 7)
    assert (queue.come, queue.queued) == (MIB, 2 * MIB)
    rest = queue.take(0, 1)
    assert rest == Stretch(MIB, 2 * MIB)
    queue.moved(0, MIB)
    queue.reached(rest, 2 * MIB)
    assert queue.broke(0) == (False, 0)
    assert queue.take(0, 1) == Stretch(2 * MIB, 3 * MIB)
    queue.came(0)
    assert queue.whole
    assert queue.come == 3 * MIB


@pytest.mark.parametrize(
    ("rates", "worth"),
    [([100] * 8, 0.9), ([100, 100, 60, 20], 0.8), ([100, 20], 0.8), ([100] * 7 + [20], 0.8), ([50], 1.0)],
)
@pytest.mark.parametrize("size", [256 * MIB, 8 << 30])
def test_lanes_end_together(size: int, rates: list[float], worth: float) -> None:
    """Slow lanes leave the end to fast ones: at least so much of the rates' sum is reached."""
    seconds, came, _ = simulate(size, [rate * MB for rate in rates])

    assert size / seconds >= worth * sum(rates) * MB
    assert len(came) <= 4 * len(rates) * max(1, (size // (64 * SMALLEST_BYTES)).bit_length() + 4)


def test_lanes_that_were_alike() -> None:
    """Lanes that are expected to be alike have two requests each, and lose little where they are not."""
    seconds, came, alike = simulate(256 * MIB, [100 * MB] * 8, expect_alike=True)
    assert (len(came), alike) == (16, True)
    assert 256 * MIB / seconds >= 0.99 * 800 * MB

    seconds, _, alike = simulate(256 * MIB, [100 * MB] * 7 + [50 * MB], expect_alike=True)
    assert not alike
    assert 256 * MIB / seconds >= 0.7 * 750 * MB


class Clocked:
    """A queue of 40 MiB by a clock that the test moves; lane 0 has brought 8 MiB in a tenth of a second."""

    def __init__(self) -> None:
        self.now = 0.0
        self.queue = Stretches(0, 40 * MIB, grain=MIB, clock=lambda: self.now)
        self.queue.take(0, 2, size=8 * MIB)
        self.now = 0.1
        self.queue.came(0)

    def taken(self, size: int, carried: int) -> Stretch:
        """The rest, which lane 1 takes, but for what lane 0 brings of it; ``carried`` bytes go over lane 1 at once."""
        late = self.queue.take(1, 2, size=size * MIB)
        assert late is not None
        while self.queue.take(0, 2):
            self.queue.came(0)
        self.queue.leaves(0)
        self.queue.moved(1, carried * MIB)
        return late


@pytest.mark.parametrize(("carried", "seconds"), [(0, 1.0), (3, 1.0), (8, 1.05)])
def test_a_lane_that_stands_still(carried: int, seconds: float) -> None:
    """Is late after a second, in the middle and before its first byte; with the answer still to come, after the seconds
    that the service may take for it as well."""
    clock = Clocked()
    clock.taken(8, carried)
    clock.now += seconds - 0.1
    assert clock.queue.late(0) is None
    clock.now += 0.2
    assert clock.queue.late(0) == 1


def test_a_lane_that_crawls() -> None:
    """Is late where another lane would bring all of its stretch in half the time that the rest takes, and a second."""
    clock = Clocked()
    clock.taken(32, 16)
    for _ in range(20):
        clock.now += 0.5
        clock.queue.moved(1, MIB // 4)
        if (late := clock.queue.late(0)) is not None:
            break
    assert late == 1
    # Half of 32 MiB came at once; the lane would have brought the rest by its average in about as long again.
    assert 1.5 <= clock.now <= 3.0

    clock = Clocked()
    clock.taken(32, 16)
    for _ in range(8):
        clock.now += 0.25
        clock.queue.moved(1, 2 * MIB - 1)
        assert clock.queue.late(0) is None


def test_no_help_before_a_stretch_has_come() -> None:
    """A service that has taken no stretch yet may take none of another lane either."""
    now = 0.0
    queue = Stretches(0, 8 * MIB, grain=MIB, clock=lambda: now)
    assert queue.take(0, 2) is not None
    assert queue.take(1, 2) is None
    queue.leaves(1)
    now = 60.0
    assert queue.late(1) is None


def test_a_late_lane_gives_up() -> None:
    """Its stretch is in the queue once it has ended, at most so often."""
    clock = Clocked()
    late = clock.taken(8, 3)
    clock.now += 60
    tries = 0
    while clock.queue.late(0) is not None:
        tries += 1
        assert clock.queue.abandon(1, 0) is None
        assert clock.queue.late(0) is None
        assert clock.queue.broke(1) == (False, 3 * MIB)
        assert clock.queue.take(1, 2) == late
        clock.queue.moved(1, 3 * MIB)
        clock.now += 60
    assert tries == 3


def test_a_stretch_of_two_lanes() -> None:
    """Where a lane waits for its answer both have the stretch: one brings it, the other carried for nothing."""
    for first, second in ((0, 1), (1, 0)):
        clock = Clocked()
        late = clock.taken(8, 8)
        clock.now += 60
        assert clock.queue.abandon(1, 0) is late
        assert clock.queue.late(0) is clock.queue.late(1) is None
        clock.queue.moved(0, 8 * MIB)
        assert clock.queue.came(first) == ([second], 0)
        assert clock.queue.whole
        assert not clock.queue.has(second)
        assert clock.queue.came(second) == ([], 8 * MIB)
        assert clock.queue.come == 40 * MIB


def test_of_two_lanes_one_breaks_off() -> None:
    """The other one still has the stretch, and may be late with it once more."""
    clock = Clocked()
    late = clock.taken(8, 8)
    clock.now += 60
    assert clock.queue.abandon(1, 0) is late
    clock.queue.moved(0, 5 * MIB)
    assert clock.queue.broke(0) == (True, 5 * MIB)
    assert clock.queue.queued == 0
    assert clock.queue.late(0) == 1
    assert clock.queue.came(1) == ([], 0)
    assert clock.queue.whole
