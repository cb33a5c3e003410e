"""What is kept on disk: one folder, a SQLite catalog of what is in it, and safetensors files.

Knows files, rows and bytes. Does not know torch, updates, or when something should be kept. The journal of pushes,
when it comes, stands here beside the checkpoints.
"""

from __future__ import annotations

from ema_service.storage.catalog import CatalogUnusable, CheckpointRow, RunRow, SnapshotRow
from ema_service.storage.files import TensorFile
from ema_service.storage.store import Store

__all__ = ["CatalogUnusable", "CheckpointRow", "RunRow", "SnapshotRow", "Store", "TensorFile"]
