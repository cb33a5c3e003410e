"""Bodies of sweeps, over the lengths of an average.

Knows: fields. Does not know: JSON (checked), how lengths are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

from ema_client.protocol.fields import (
    FINITE,
    LARGEST_SIGMA_REL,
    Count,
    Counter,
    Moment,
    Name,
    Positive,
    SweepKind,
    Text,
    Version,
)

__all__ = [
    "SWEEP_BELOW",
    "SweepInfo",
    "SweepList",
    "SweepPoint",
    "SweepReport",
]


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """What an average of one length came to: a result of the reporter's evaluation, or why there was no average.

    value: the average's sigma_rel, decay or half-life. result: None where the evaluation failed, or was not begun.
    """

    value: Positive
    result: float | None = None
    refused: Text | None = None


@dataclass(frozen=True, slots=True)
class SweepReport:
    """The body of ``POST /v1/runs/{run}/sweeps``: what averages of several lengths came to.

    at: the time that the averages are of: a snapshot's name, or a counter; None where it is not known. highest: whether
    the highest result is the best, not the lowest. name: what the results are, such as "FID".
    """

    kind: SweepKind
    points: tuple[SweepPoint, ...]
    at: Name | Count | None = None
    highest: bool = False
    name: Text | None = None

    @property
    def best(self) -> SweepPoint | None:
        """The point with the best result, the shortest of several; None where there are no results."""
        counted = [(point.result, point) for point in self.points if point.result is not None]
        sign = -1.0 if self.highest else 1.0
        return min(counted, key=lambda each: sign * each[0], default=(None, None))[1]

    @property
    def fault(self) -> str | None:
        """Which value is no such length; None where all are."""
        below = SWEEP_BELOW.get(self.kind, FINITE[1])
        wrong = [point.value for point in self.points if not point.value < below]
        return f"points: {wrong[0]:g} is no {self.kind}, which is below {below:g}" if wrong else None


#: What a length of each kind is below; half-lives have no limit.
SWEEP_BELOW: dict[str, float] = {"sigma_rel": LARGEST_SIGMA_REL, "decay": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepInfo(SweepReport):
    """The results of a sweep, as they were reported at ``time``.

    version, num_updates: the run's by then, None where it had no weights; ``at`` says which time the averages are of.
    """

    time: Moment
    version: Version | None
    num_updates: Counter | None


@dataclass(frozen=True, slots=True)
class SweepList:
    """The answer to ``GET /v1/runs/{run}/sweeps``: the newest sweeps, the newest last."""

    run: Name
    sweeps: tuple[SweepInfo, ...]
