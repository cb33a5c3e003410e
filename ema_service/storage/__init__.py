"""Storage: one folder on disk, with a SQLite catalog of what counts, and safetensors files.

Knows files, rows and bytes. Does not know torch, updates, or when something should be stored.
"""

from __future__ import annotations

from ema_service.storage.catalog import (
    MEMORY,
    TIMELINE_LINES,
    CatalogUnusable,
    CheckpointRow,
    RowChange,
    RunRow,
    ShardRow,
    Shelf,
    SnapshotRow,
    SweepRow,
    TimelineRow,
)
from ema_service.storage.files import TensorFile
from ema_service.storage.memory_files import MemoryFiles, MemoryFilesUnusable
from ema_service.storage.objects import (
    ObjectFile,
    ObjectGone,
    ObjectStore,
    ObjectStoreFailed,
    ObjectStoreUnusable,
    open_objects,
)
from ema_service.storage.slot_files import Extent, SlotFiles, padded_bytes
from ema_service.storage.slots import Slot, Slots
from ema_service.storage.space import DiskSpace
from ema_service.storage.store import Store, memory_prefix, open_store

__all__ = [
    "MEMORY",
    "TIMELINE_LINES",
    "CatalogUnusable",
    "CheckpointRow",
    "DiskSpace",
    "Extent",
    "MemoryFiles",
    "MemoryFilesUnusable",
    "ObjectFile",
    "ObjectGone",
    "ObjectStore",
    "ObjectStoreFailed",
    "ObjectStoreUnusable",
    "RowChange",
    "RunRow",
    "ShardRow",
    "Shelf",
    "Slot",
    "SlotFiles",
    "Slots",
    "SnapshotRow",
    "Store",
    "SweepRow",
    "TensorFile",
    "TimelineRow",
    "memory_prefix",
    "open_objects",
    "open_store",
    "padded_bytes",
]
