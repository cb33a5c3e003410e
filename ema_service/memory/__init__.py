"""Memory: layouts, the arenas that hold shadows, the pool of host memory, staging and frozen versions.

Knows bytes, dtypes, devices and budgets. Does not know runs, updates, files or sockets.
"""

from __future__ import annotations

from ema_service.memory.arena import Arena, Memory
from ema_service.memory.devices import pick_device
from ema_service.memory.file_pool import FilePool
from ema_service.memory.frozen import FrozenWeights
from ema_service.memory.layout import Layout
from ema_service.memory.staging import Shared, Staged, Staging

__all__ = ["Arena", "FilePool", "FrozenWeights", "Layout", "Memory", "Shared", "Staged", "Staging", "pick_device"]
