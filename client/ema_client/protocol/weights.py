"""What weights are: of a pull, worked out, of a snapshot.

Knows: fields, and the headers that come with weights. Does not know: the weights' bytes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from ema_client.protocol.checked import from_json, integer_of
from ema_client.protocol.fields import Count, Counter, Decay, Moment, Name, Step, Stored, Text, Version
from ema_client.protocol.runs import ScheduleFields
from ema_client.protocol.words import (
    HEADER_AMPLIFICATION,
    HEADER_AVERAGE,
    HEADER_DECAY,
    HEADER_NUM_UPDATES,
    HEADER_PROFILE_ERROR,
    HEADER_RUN,
    HEADER_STEP,
    HEADER_VERSION,
)

__all__ = [
    "ProfileInfo",
    "ProfileSource",
    "SnapshotInfo",
    "SnapshotList",
    "WeightsInfo",
]


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A named, immutable, durable copy of all averages of a run. ``bytes``: of the snapshot's files.

    target: of the single average "posthoc" that was worked out of the run's ring, what was wished for.
    stored: where the files are: in the service's data dir ("local"), or in the object store that the service moves
        snapshots to ("store").
    """

    run: Name
    name: Name
    version: Version
    step: Step | None
    num_updates: Counter
    averages: tuple[Name, ...]
    bytes: Count
    created_at: Moment
    target: Text | None = None
    stored: Stored = "local"


@dataclass(frozen=True, slots=True)
class SnapshotList:
    snapshots: tuple[SnapshotInfo, ...]


@dataclass(frozen=True, slots=True)
class ProfileSource:
    """Stored weights in a sum: those of an average at a time, and their weight in it. current: the run's own state."""

    time: Count
    average: Name
    weight: float
    current: bool = False


@dataclass(frozen=True, slots=True)
class ProfileInfo:
    """The answer to ``GET /v1/runs/{run}/profiles``: how an average would be worked out, and how well.

    target: the wished average, for people to read. num_updates: the counter that it would be of.
    error: |found profile - target's| / |target's|, over all updates. amplification: the norm of the weights.
    refused: why the weights could not be had, and what could; None where they can.
    """

    run: Name
    version: Version
    target: Text
    num_updates: Count
    error: float
    amplification: float
    refused: Text | None
    sources: tuple[ProfileSource, ...]


@dataclass(frozen=True, slots=True)
class WeightsInfo(ScheduleFields):
    """The run's state that travels with weights: as ``Ema-*`` headers and in the safetensors ``__metadata__``.

    num_updates: the average's counter. soup: of which snapshots the weights are a sum, NAME:WEIGHT, with commas in
    between; the other fields are of the newest of the snapshots then. schedule: of the average (ScheduleName, or one of
    a newer service), without which, and without its fields, decay and counter do not say what the next update retains.
    target: of an average that was worked out of the run's ring, what was wished for; ``average`` is then "posthoc".
    profile_error, amplification: of such an average, as in ProfileInfo.
    """

    run: Name
    average: Name
    version: Version
    step: Step | None
    num_updates: Counter
    decay: Decay
    snapshot: Name | None = field(default=None)
    schedule: Name = "litema"
    soup: Text | None = None
    target: Text | None = None
    profile_error: float | None = None
    amplification: float | None = None

    def to_metadata(self) -> dict[str, str]:
        """The state as safetensors metadata: strings only; fields that are None, and LitEma's schedule, are left
        out."""
        said = {f"ema_{key}": _plain(value) for key, value in dataclasses.asdict(self).items() if value is not None}
        return {key: value for key, value in said.items() if (key, value) != ("ema_schedule", "litema")}

    def to_headers(self) -> dict[str, str]:
        """The state as HTTP headers; ``Ema-Step`` is left out before the first update."""
        pairs = {
            HEADER_RUN: self.run,
            HEADER_AVERAGE: self.average,
            HEADER_VERSION: self.version,
            HEADER_STEP: self.step,
            HEADER_NUM_UPDATES: self.num_updates,
            HEADER_DECAY: self.decay,
            HEADER_PROFILE_ERROR: self.profile_error,
            HEADER_AMPLIFICATION: self.amplification,
        }
        return {key: _plain(value) for key, value in pairs.items() if value is not None}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> WeightsInfo:
        """The state that to_metadata() wrote. Raises ValueError or KeyError on anything else."""
        step = metadata.get("ema_step")
        state = {
            "run": metadata["ema_run"],
            "average": metadata["ema_average"],
            "version": metadata["ema_version"],
            "step": None if step is None else integer_of(step),
            "num_updates": integer_of(metadata["ema_num_updates"]),
            "decay": float(metadata["ema_decay"]),
            "snapshot": metadata.get("ema_snapshot"),
            "schedule": metadata.get("ema_schedule", "litema"),
            "soup": metadata.get("ema_soup"),
            "target": metadata.get("ema_target"),
        }
        numbers = [each.name for each in dataclasses.fields(ScheduleFields)]
        for name in [*numbers, "profile_error", "amplification"]:
            if (said := metadata.get(f"ema_{name}")) is not None:
                state[name] = integer_of(said) if name == "start" else float(said)
        return from_json(cls, state)


def _plain(value: object) -> str:
    return repr(value) if isinstance(value, float) else str(value)
