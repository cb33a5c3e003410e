"""Persistence: one run on disk. Its versions, the way back from them, its snapshots, its history.

Knows how states become rows and files, and back. Never imports ``runs``: what it learns it returns, and who decides
hands it what is to be kept.
"""

from __future__ import annotations

from ema_service.persistence.history import History
from ema_service.persistence.memory_versions import MemoryVersions
from ema_service.persistence.restoring import Restored
from ema_service.persistence.snapshots import Snapshots
from ema_service.persistence.versions import Versions

__all__ = ["History", "MemoryVersions", "Restored", "Snapshots", "Versions"]
