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
    queue.reached(taken, MIB)
    assert queue.come == MIB
    assert queue.broke(0) == MIB
    assert (queue.come, queue.queued) == (MIB, 2 * MIB)
    rest = queue.take(0, 1)
    assert rest == Stretch(MIB, 2 * MIB)
    queue.reached(rest, 2 * MIB)
    assert queue.broke(0) == MIB
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
