"""Runs: who decides. The ledger of each, the order in which an update is prepared and committed, parts, the registry.

Knows steps, writers and versions. Does not know HTTP, how bytes are averaged (shadows) or kept (persistence).
"""

from __future__ import annotations

from ema_service.runs.gathering import Part, Terms
from ema_service.runs.parts import Parts
from ema_service.runs.registry import Registry
from ema_service.runs.run import Run, Update

__all__ = ["Part", "Parts", "Registry", "Run", "Terms", "Update"]
