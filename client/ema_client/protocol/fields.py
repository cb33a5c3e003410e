"""What a field of a body may be: words, and for a value from the other side the rule that it must keep.

Knows: each field by itself. Does not know: bodies.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from ema_client.errors import printable
from ema_client.protocol.words import MAX_STEP, NAME_RULE

__all__ = [
    "DEFAULT_ENTRIES",
    "DEFAULT_POINTS",
    "FINITE",
    "GAMMAS",
    "HISTORY_POINTS",
    "LARGEST_SIGMA_REL",
    "LAYOUT_DTYPES",
    "MAX_SWEPT",
    "POSITIVE",
    "RING_SNAPSHOTS",
    "SIGMA_RELS",
    "SWEEPS_KEPT",
    "SWEEP_PIECE_BYTES",
    "SWEEP_POINTS",
    "SWEEP_TEXT",
    "TIMELINE_ENTRIES",
    "Count",
    "Counter",
    "Decay",
    "DecayPer",
    "Dtype",
    "Durability",
    "EventKind",
    "Gamma",
    "Moment",
    "Name",
    "NonFinitePolicy",
    "Positive",
    "RunStatus",
    "ScheduleName",
    "SigmaRel",
    "Snapshots",
    "Step",
    "Stored",
    "SweepKind",
    "Text",
    "TimelineKind",
    "UpdateState",
    "Version",
]

#: The most averages that one body of a sweep has, and the bytes of each of its pieces.
MAX_SWEPT = 8
SWEEP_PIECE_BYTES = 1 << 20

#: dtype that a run may hold, as safetensors writes it -> bytes per element
LAYOUT_DTYPES: dict[str, int] = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}

RunStatus = Literal["awaiting_weights", "ready", "degraded"]
ScheduleName = Literal["litema", "constant", "half_life", "power", "inverse_gamma"]
DecayPer = Literal["update", "step"]
Durability = Literal["memory", "process", "disk"]
#: Where the files of a snapshot are.
Stored = Literal["local", "store"]
NonFinitePolicy = Literal["refuse", "allow"]
UpdateState = Literal["applied", "staged", "unknown"]
EventKind = Literal[
    "version",
    "decay_changed",
    "num_updates_reset",
    "average_added",
    "average_removed",
    "snapshot_created",
    "snapshot_deleted",
    "run_deleted",
]
TimelineKind = Literal[
    "created",
    "decay_changed",
    "reset",
    "average_added",
    "average_removed",
    "writer",
    "ended",
    "snapshot",
    "snapshot_deleted",
    "rewound",
    "accepted",
    "damaged",
    "sweep",
]
#: The kinds of lengths that a sweep may go through.
SweepKind = Literal["sigma_rel", "decay", "half_life"]

#: The fields of a body, with the rule that a value from the other side must keep: a pattern for strings, bounds for
#: numbers, a function that makes a text fit to be shown.
Name = Annotated[str, NAME_RULE]
Version = Annotated[str, re.compile(r"[0-9]{1,19}\.[0-9]{1,19}\Z")]
Text = Annotated[str, printable]
Dtype = Annotated[str, re.compile(r"(F64|F32|BF16|F16)\Z")]
Step = Annotated[int, (0, MAX_STEP)]
Count = Annotated[int, (0, MAX_STEP)]
Counter = Annotated[int, (-1, MAX_STEP)]
Decay = Annotated[float, (0.0, 1.0)]
#: Of which a millionth and a million-million-fold are numbers as well: half-lives, inverse gammas, powers.
POSITIVE = (1e-12, 1e18)
Positive = Annotated[float, POSITIVE]
#: The relative standard deviation of a power average (Karras et al. 2024) with gamma 0, in which all updates weigh the
#: same. With a larger one old updates would weigh more than new ones.
LARGEST_SIGMA_REL = 12**-0.5
SIGMA_RELS = (1e-4, 0.2887)
SigmaRel = Annotated[float, SIGMA_RELS]
GAMMAS = (0.0, 1e4)
Gamma = Annotated[float, GAMMAS]
#: How many snapshots a ring may have.
RING_SNAPSHOTS = (2, 64)
Snapshots = Annotated[int, RING_SNAPSHOTS]
#: How many measurements an answer may have, and how many it has by default.
HISTORY_POINTS = (1, 5000)
DEFAULT_POINTS = 500
#: How many entries of a timeline an answer may have, and how many it has by default.
TIMELINE_ENTRIES = (1, 1000)
DEFAULT_ENTRIES = 100
#: How many points the report of a sweep may have, the characters of a text of it, and how many sweeps a run keeps.
SWEEP_POINTS = (1, 64)
SWEEP_TEXT = 300
SWEEPS_KEPT = 8
#: What a number may be that has no limits of its own: finite, also where two are added.
FINITE = (-1e300, 1e300)
#: Seconds since 1970-01-01 UTC, up to the year 9999: a calendar has no others.
Moment = Annotated[float, (0.0, 253_402_000_000.0)]
