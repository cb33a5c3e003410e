"""Storage: one folder on disk, with a SQLite catalog of what counts, and safetensors files.

Knows files, rows and bytes. Does not know torch, updates, or when something should be stored.
"""

from __future__ import annotations

from ema_service.storage.catalog import CatalogUnusable, CheckpointRow, RunRow, SnapshotRow
from ema_service.storage.files import TensorFile
from ema_service.storage.slot_files import Extent, SlotFiles, padded_bytes
from ema_service.storage.slots import Slot, Slots
from ema_service.storage.store import Store

__all__ = [
    "CatalogUnusable",
    "CheckpointRow",
    "Extent",
    "RunRow",
    "Slot",
    "SlotFiles",
    "Slots",
    "SnapshotRow",
    "Store",
    "TensorFile",
    "padded_bytes",
]
