"""The state of training runs: layouts, the memory of their shadows, updates, versions, readers.

Knows what an update, a version and an average are, and the memory they lie in. Does not know HTTP or JSON, nor how
files are written (storage) or numbers computed (averaging).
"""

from __future__ import annotations

from ema_service.runs.checkpoints import Checkpoints
from ema_service.runs.gathering import Part, Terms
from ema_service.runs.parts import Parts
from ema_service.runs.persistence import RunFiles
from ema_service.runs.registry import Registry
from ema_service.runs.run import Run, State, Update

__all__ = [
    "Checkpoints",
    "Part",
    "Parts",
    "Registry",
    "Run",
    "RunFiles",
    "State",
    "Terms",
    "Update",
]
