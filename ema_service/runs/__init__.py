"""Runs: decide what becomes of a push. The ledger of each run, its lock, updates in parts, the registry of all runs.

Knows steps, writers and versions. Does not know HTTP, how parameters are averaged (shadows), or how versions are kept
on disk (persistence).
"""

from __future__ import annotations

from ema_service.runs.gathering import Part, Terms
from ema_service.runs.parts import Parts
from ema_service.runs.posthoc import with_posthoc
from ema_service.runs.registry import Candidate, Registry
from ema_service.runs.run import Parameters, Rewound, Run, Update, Write
from ema_service.shadows import Setup, State, Version

__all__ = [
    "Candidate",
    "Parameters",
    "Part",
    "Parts",
    "Registry",
    "Rewound",
    "Run",
    "Setup",
    "State",
    "Terms",
    "Update",
    "Version",
    "Write",
    "with_posthoc",
]
