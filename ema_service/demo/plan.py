"""The agreements of the demo's processes: the names of the run, its numbers, and the lines in which children report.

A child reports by writing one JSON object a line to its standard output; the parent parses the lines. Standard library
and the protocol's dataclasses only, so that the parent starts at once.

Knows names, numbers and the form of a report. Does not know processes, models or how anything is shown.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from ema_client.protocol import AverageConfig, from_json
from ema_client.targets import spread

RUN = "digits"
#: The largest decay. 0.999 remembers about 1,000 updates, but in a run this short LitEma's warm-up, (1 + n) / (10 + n),
#: governs: at update 1,000 the decay is 0.9911, an average over about the last tenth of the training.
DECAY = 0.999
#: The raw weights, as a second average with decay 0, whose shadow is the parameters last pushed (s - 1 * (s - p) is p,
#: but for the rounding of s - p). So the evaluator gets raw and EMA weights in the same way and of the same version.
RAW = "raw"
#: Power averages that are tracked all along, beside what any length is worked out of afterwards: their losses lie on
#: the curve of those.
TRACKED = (0.05, 0.15)
AVERAGES = (
    AverageConfig("ema"),
    AverageConfig(RAW, schedule="constant", decay=0.0),
    *(AverageConfig(f"power-{width}", schedule="power", sigma_rel=width) for width in TRACKED),
)
#: Lengths of an EMA that are looked at after the training.
WIDTHS = spread("sigma_rel", 0.015, 0.25, 8)
#: The snapshot that the trainer takes as its last act; when the evaluator sees it, the training is over.
FINAL_SNAPSHOT = "final"

OUT = Path("ema-demo.png")
#: Training steps. About 33 ms each on one core, push and in-process EMA included: half a minute, and samples are
#: clearly digits.
STEPS = 1000
#: Training ends after so many seconds even if steps are left, so that a slow machine also ends within 90 s.
SECONDS = 45.0


@dataclass(frozen=True, slots=True)
class Progress:
    """The trainer after ``step`` of ``steps`` steps; ``loss`` is a running mean of the training loss."""

    step: int
    steps: int
    loss: float


@dataclass(frozen=True, slots=True)
class Row:
    """One version as the evaluator measured it: held-out denoising loss of raw and of EMA weights."""

    step: int
    num_updates: int
    effective_decay: float | None
    raw_loss: float
    ema_loss: float


@dataclass(frozen=True, slots=True)
class Length:
    """The held-out loss of an EMA of this length. tracked: all along, where others are worked out afterwards."""

    sigma_rel: float
    loss: float
    tracked: bool = False


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of comparing two sets of tensors bit for bit. differing: the names of tensors that differ."""

    claim: str
    step: int
    tensors: int
    elements: int
    differing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Note:
    """A line for the user: about what is going on now, or (``lasting``) one to remember."""

    text: str
    lasting: bool = False


Report = Progress | Row | Length | Proof | Note
_KINDS: dict[str, type[Report]] = {kind.__name__: kind for kind in (Progress, Row, Length, Proof, Note)}


def report(what: Report) -> None:
    """Write a report to standard output, at once."""
    sys.stdout.write(json.dumps({"report": type(what).__name__, **dataclasses.asdict(what)}) + "\n")
    sys.stdout.flush()


def parse_report(line: str) -> Report | None:
    """The report in a line of a child's output; None for any other line."""
    try:
        fields = json.loads(line)
        kind = _KINDS[fields["report"]]
        return from_json(kind, fields)
    except (ValueError, KeyError, TypeError):
        return None
