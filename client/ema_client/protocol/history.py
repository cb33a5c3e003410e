"""Bodies of what happened to a run: events, measurements, a timeline.

Knows: fields. Does not know: JSON (checked), how an event is streamed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ema_client.protocol.fields import Count, Counter, Decay, EventKind, Moment, Name, Step, Text, TimelineKind, Version
from ema_client.protocol.weights import SnapshotInfo

__all__ = [
    "Distances",
    "History",
    "HistoryColumns",
    "RunEvent",
    "Timeline",
    "TimelineEntry",
]


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Something that happened to a run: the data of an event of ``GET /v1/runs/{run}/events``.

    kind: "version" (there are new versions, of which ``version`` is the newest), "decay_changed" (of ``average``),
        "num_updates_reset", "average_added" and "average_removed" (``average``), "snapshot_created",
        "snapshot_deleted", "run_deleted".
    average: the average that ``decay`` and ``effective_decay`` are of: the run's first, unless the kind says otherwise.
    step, version, num_updates: the run's as it stands.
    snapshot: the snapshot that was created or deleted, which may be of an older version than the run's.
    """

    kind: EventKind
    run: Name
    version: Version | None
    step: Step | None
    num_updates: Counter
    average: Name
    decay: Decay
    effective_decay: Decay | None
    snapshot: SnapshotInfo | None = None


@dataclass(frozen=True, slots=True)
class HistoryColumns:
    """Measurements of a run, a column each; all columns are of one length. None: not measured.

    time: of the update, seconds since 1970-01-01 UTC, never falling. step, num_updates, effective_decay: as in RunInfo,
        after the update.
    distance: |shadow - parameters| / |parameters|, of the L2 norm of all averaged tensors, after the update.
    shadow_norm, parameter_norm: |shadow| and |parameters|.
    rate: updates per second since the measurement before. bytes_per_second: of parameters that came meanwhile.
    durable_lag: the trainer's steps that ``RunInfo.durable_step`` was behind.
    seconds_receive: from the update's begin until its bytes were there. seconds_average: spent averaging, most of it
        meanwhile. seconds_commit: from the last byte until the version was the run's.
    """

    time: tuple[Moment, ...]
    step: tuple[Step | None, ...]
    num_updates: tuple[Counter | None, ...]
    effective_decay: tuple[Decay | None, ...]
    distance: tuple[float | None, ...]
    shadow_norm: tuple[float | None, ...]
    parameter_norm: tuple[float | None, ...]
    rate: tuple[float | None, ...]
    bytes_per_second: tuple[float | None, ...]
    durable_lag: tuple[float | None, ...]
    seconds_receive: tuple[float | None, ...]
    seconds_average: tuple[float | None, ...]
    seconds_commit: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class History:
    """The answer to ``GET /v1/runs/{run}/history``: how the run went.

    average: the run's first, of which distances and norms are. version: of the newest measurement, None without one.
    seen: how many measurements there were; older ones are thinned out. begin: when the first was, seconds since
    1970-01-01 UTC.
    groups: by the common beginning of tensors' names, the distance of these tensors alone at each time. group_norms: of
    one host of a cluster, |parameters| of its rows of each group, for the distances of hosts to be put together.
    """

    run: Name
    average: Name
    version: Version | None
    seen: Count
    begin: Moment | None
    columns: HistoryColumns
    groups: dict[str, tuple[float | None, ...]]
    group_norms: dict[str, tuple[float | None, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Distances:
    """The answer to ``GET /v1/runs/{run}/distances``: how far each tensor's shadow was from its parameters.

    tensors: by name, |shadow - parameters| / |parameters| after the newest update that was measured; None where the
    tensor is copied, or was not measured. average, version, step: of that update. norms: of one host of a cluster,
    |parameters| of its rows of each tensor, for the distances of hosts to be put together.
    """

    run: Name
    average: Name
    version: Version | None
    step: Step | None
    tensors: dict[str, float | None]
    norms: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    """Something that somebody, or the service, did to a run. ``text`` is a sentence for people.

    kind: "created"; "decay_changed"; "reset" (of num_updates); "average_added"; "average_removed"; "writer" (a trainer
        took over); "ended" (the trainer's training is over); "snapshot"; "snapshot_deleted"; "rewound"; "accepted" (the
        version of a degraded run); "damaged"; "sweep" (results of averages of several lengths were reported).
    step, num_updates: the run's at that time, None where they were not known.
    """

    time: Moment
    kind: TimelineKind
    step: Step | None
    num_updates: Counter | None
    text: Text


@dataclass(frozen=True, slots=True)
class Timeline:
    """The answer to ``GET /v1/runs/{run}/timeline``: the newest entries, the newest last."""

    run: Name
    entries: tuple[TimelineEntry, ...]
