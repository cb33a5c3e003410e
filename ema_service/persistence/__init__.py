"""Persistence: one run on disk. Its versions, how a restart finds them, its snapshots, here and on an object store, its
ring, its timeline, its sweeps.

Knows how states become rows and files, and how rows and files become states. Never imports ``runs``: what the disk
tells is returned, and the caller decides what is to be kept.
"""

from __future__ import annotations

from ema_service.persistence.memory_versions import MemoryVersions
from ema_service.persistence.offload import Offload
from ema_service.persistence.restoring import Restored
from ema_service.persistence.ring import StoredRing
from ema_service.persistence.ring_shelf import RingSnapshot
from ema_service.persistence.shard_ring import ShardRing
from ema_service.persistence.shard_versions import ShardMemoryVersions, ShardVersions
from ema_service.persistence.snapshots import Snapshots
from ema_service.persistence.sweeps import Sweeps
from ema_service.persistence.timeline import (
    Timeline,
    Told,
    told_accepted,
    told_average_added,
    told_average_removed,
    told_decay,
    told_reset,
    told_rewind,
    told_writer,
)
from ema_service.persistence.versions import Versions

__all__ = [
    "MemoryVersions",
    "Offload",
    "Restored",
    "RingSnapshot",
    "ShardMemoryVersions",
    "ShardRing",
    "ShardVersions",
    "Snapshots",
    "StoredRing",
    "Sweeps",
    "Timeline",
    "Told",
    "Versions",
    "told_accepted",
    "told_average_added",
    "told_average_removed",
    "told_decay",
    "told_reset",
    "told_rewind",
    "told_writer",
]
