"""The state of training runs: layouts, the memory of their shadows, updates, versions, readers.

Knows what an update, a version and an average are, and the memory they lie in. Does not know HTTP or JSON, nor how
files are written (storage) or numbers computed (averaging).
"""

from __future__ import annotations

from ema_service.runs.arena import Arena, Memory
from ema_service.runs.checkpoints import Checkpoints
from ema_service.runs.frozen import FrozenWeights
from ema_service.runs.gathering import Part, Terms
from ema_service.runs.layout import Layout
from ema_service.runs.parts import Parts
from ema_service.runs.persistence import RunFiles
from ema_service.runs.registry import Registry
from ema_service.runs.run import Run, State, Update
from ema_service.runs.staging import Body, Shared, Staged, Staging, UpdateBody
from ema_service.runs.weights import WeightsStream

__all__ = [
    "Arena",
    "Body",
    "Checkpoints",
    "FrozenWeights",
    "Layout",
    "Memory",
    "Part",
    "Parts",
    "Registry",
    "Run",
    "RunFiles",
    "Shared",
    "Staged",
    "Staging",
    "State",
    "Terms",
    "Update",
    "UpdateBody",
    "WeightsStream",
]
