"""Shadows: the bytes of one run on this host. A next version is prepared beside the current one, then committed.

Knows arenas, passes over a push and what a version says of itself. Does not decide which version comes next (runs), nor
keep any (persistence).
"""

from __future__ import annotations

from ema_service.shadows.shadows import Preparation, Prepared, Shadows
from ema_service.shadows.state import Average, Plan, State, Version

__all__ = ["Average", "Plan", "Preparation", "Prepared", "Shadows", "State", "Version"]
