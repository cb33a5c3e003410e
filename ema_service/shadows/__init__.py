"""Shadows: the bytes of one run on this host. A next version is prepared beside the current one, then committed.

Knows arenas, the pass over a push's parameters, and the facts of a version. Does not decide which version comes next
(runs), nor write versions to disk (persistence).
"""

from __future__ import annotations

from ema_service.shadows.shadows import Preparation, Prepared, Shadows
from ema_service.shadows.state import Average, Descent, Member, Plan, Setup, State, Version

__all__ = ["Average", "Descent", "Member", "Plan", "Preparation", "Prepared", "Setup", "Shadows", "State", "Version"]
