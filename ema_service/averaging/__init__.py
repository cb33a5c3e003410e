"""Pure numerics of the exponential moving average: decay schedules, the kernel that averages flat memory, digests, and
the weights of snapshots whose sum is another average.

Knows arithmetic, and torch where values lie on a device. Does not know runs, names, layouts, files, sockets or clocks.
"""

from __future__ import annotations

from ema_service.averaging.digest import BLOCK_BYTES, GULP_BYTES, Accumulators, BlockDigest, Digest
from ema_service.averaging.distances import Squares
from ema_service.averaging.fused import can_measure, prepare, prepare_measuring
from ema_service.averaging.kernel import average_into, averaging, cast_into, casting, digesting, finite, prepare_for
from ema_service.averaging.profiles import TargetRefused
from ema_service.averaging.schedules import Retention, Schedule
from ema_service.averaging.summing import add_weighted
from ema_service.averaging.synthesis import (
    SnapshotBasis,
    Synthesis,
    TrackedAverage,
    approximate,
    check,
    soup,
)
from ema_service.averaging.targets import ConstantDecay, ConstantHalfLife, SigmaRel, Target, Window
from ema_service.averaging.thinning import Ring, forecast
from ema_service.averaging.xxh3 import NO_DIGEST

__all__ = [
    "BLOCK_BYTES",
    "GULP_BYTES",
    "NO_DIGEST",
    "Accumulators",
    "BlockDigest",
    "ConstantDecay",
    "ConstantHalfLife",
    "Digest",
    "Retention",
    "Ring",
    "Schedule",
    "SigmaRel",
    "SnapshotBasis",
    "Squares",
    "Synthesis",
    "Target",
    "TargetRefused",
    "TrackedAverage",
    "Window",
    "add_weighted",
    "approximate",
    "average_into",
    "averaging",
    "can_measure",
    "cast_into",
    "casting",
    "check",
    "digesting",
    "finite",
    "forecast",
    "prepare",
    "prepare_for",
    "prepare_measuring",
    "soup",
]
