"""What is measured of a shard: the groups are those of the whole run, and norms are told, also after a restart.

Knows Measurements. Does not know a run, or files (tests/service/api/routes/test_history.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from ema_client.protocol import AverageConfig
from ema_service.memory import Layout
from ema_service.persistence.measured import StoredMeasurements
from ema_service.runs.measurements import Measured, Measurements
from ema_service.shadows import Average, Member, Version

#: A whole run has one group too many for tensors to be groups, so its groups are what comes before the first point.
WHOLE = [*(f"block.{at}" for at in range(24)), "step.a"]


def of_a_shard(layout: Layout) -> Measurements:
    """The measurements of a shard that has some of the whole run's tensors, of one update."""
    made = Measurements("r", layout, WHOLE)
    average = Average(Member(AverageConfig()), 0.9, 0.9, 0)
    sums = np.array([[4.0, 16.0, 9.0], [1.0, 9.0, 1.0], [9.0, 36.0, 4.0]])
    made.note(Measured(Version("x", 1, 7, 7, 7, b"", (average,), 100.0), sums, 100))
    return made


def test_groups_are_those_of_the_whole(layout_of: Callable[..., Layout]) -> None:
    """And each is told with its norm, so that what the shards measured can be put together; kept like all else."""
    layout = layout_of({name: torch.ones(3) for name in ("block.0", "block.1", "step.a")})
    made = of_a_shard(layout)
    kept: list[bytes] = []
    made.save(kept.append)
    after = Measurements("r", layout, WHOLE)
    after.restore(StoredMeasurements.load(kept[0]))

    for each in (made, after):
        told = each.history("ema", since=0.0, points=10)
        assert told.groups == {"block": (round(math.sqrt(5 / 25), 7),), "step": (0.5,)}
        assert told.group_norms == {"block": (5.0,), "step": (6.0,)}
        assert told.columns.step == (7,)
        distances = each.distances("ema")
        assert distances.tensors == {"block.0": 0.5, "block.1": 0.3333333, "step.a": 0.5}
        assert distances.norms == {"block.0": 4.0, "block.1": 3.0, "step.a": 6.0}


def test_a_run_that_is_no_shard_tells_no_norms(layout_of: Callable[..., Layout]) -> None:
    """Nobody puts them together."""
    layout = layout_of({name: torch.ones(3) for name in ("block.0", "block.1", "step.a")})
    made = Measurements("r", layout)
    assert made.history("ema", since=0.0, points=10).group_norms == {}
    assert made.distances("ema").norms == {}
