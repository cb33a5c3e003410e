"""Pure numerics of the exponential moving average: decay schedules, the kernel that averages flat memory, digests.

Knows torch and arithmetic. Does not know runs, names, layouts, files, sockets or clocks.
"""

from __future__ import annotations

from ema_service.averaging.digest import BLOCK_BYTES, GULP_BYTES, Accumulators, BlockDigest, Digest
from ema_service.averaging.fused import prepare
from ema_service.averaging.kernel import average_into, averaging, cast_into, casting, digesting, finite
from ema_service.averaging.schedules import SCHEDULES, Retention, Schedule

__all__ = [
    "BLOCK_BYTES",
    "GULP_BYTES",
    "SCHEDULES",
    "Accumulators",
    "BlockDigest",
    "Digest",
    "Retention",
    "Schedule",
    "average_into",
    "averaging",
    "cast_into",
    "casting",
    "digesting",
    "finite",
    "prepare",
]
