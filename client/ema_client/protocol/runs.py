"""Bodies of runs, their averages, and where they lie.

Knows: fields. Does not know: JSON (checked).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ema_client.protocol.fields import (
    LARGEST_SIGMA_REL,
    Count,
    Counter,
    Decay,
    DecayPer,
    Dtype,
    Durability,
    Gamma,
    Moment,
    Name,
    NonFinitePolicy,
    Positive,
    RunStatus,
    ScheduleName,
    SigmaRel,
    Snapshots,
    Step,
    Text,
    Version,
)
from ema_client.protocol.words import DEFAULT_AVERAGE, DEFAULT_DECAY

__all__ = [
    "SCHEDULE_FIELDS",
    "AverageConfig",
    "AverageInfo",
    "HostedShard",
    "Posthoc",
    "ReplicaInfo",
    "Rewind",
    "RingInfo",
    "RunConfig",
    "RunInfo",
    "RunLayout",
    "RunList",
    "RunPatch",
    "RunShards",
    "RunVersion",
    "ScheduleFields",
    "ServerInfo",
    "ShardInfo",
    "TensorSpec",
    "VersionAverage",
    "Writer",
]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a layout. ``dtype`` as safetensors writes it: F64, F32, BF16, F16."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleFields:
    """What a schedule takes beside its largest decay. n counts the updates (or steps) since the average began.

    start: the average begins after this update: up to and including update start + 1 it is the parameters themselves,
        and the schedule counts from there. None: it begins with the initial weights.
    half_life: of "half_life", in updates: 2^(-1 / half_life).
    sigma_rel, gamma: of "power", one of the two: (1 - 1 / n)^(gamma + 1); sigma_rel is the relative standard deviation
        of the weights that updates have.
    inv_gamma, power, min_decay: of "inverse_gamma": 1 - (1 + s / inv_gamma)^-power with s = n - 1, no less than
        min_decay; None: 1, 2/3 and 0.
    """

    start: Step | None = None
    half_life: Positive | None = None
    sigma_rel: SigmaRel | None = None
    gamma: Gamma | None = None
    inv_gamma: Positive | None = None
    power: Positive | None = None
    min_decay: Decay | None = None

    def schedule_fields(self) -> dict[str, Any]:
        """The fields of this class alone, by name; those that are None are left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(ScheduleFields)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class AverageConfig(ScheduleFields):
    """An average of a run, as a client asks for it: a name, a schedule, and the fields of that schedule.

    The functions of ``ema_client.schedules`` make one without its name.

    schedule: "litema", min(decay, (1 + n) / (10 + n)); "constant", ``decay``; "half_life", "power" or "inverse_gamma",
        see ScheduleFields.
    decay: the largest decay; None means the run's decay.
    """

    name: Name = DEFAULT_AVERAGE
    schedule: ScheduleName = "litema"
    decay: Decay | None = None

    @property
    def fault(self) -> str | None:
        """Which field does not go with the schedule, and what to do; None where all do."""
        if self.schedule not in SCHEDULE_FIELDS:
            return f"schedule: there is no {self.schedule!r}; there are {', '.join(SCHEDULE_FIELDS)}"
        fields = SCHEDULE_FIELDS[self.schedule]
        for name in sorted(_SCHEDULE_FIELDS - fields):
            if getattr(self, name) is not None:
                return f"{name}: has no meaning for schedule {self.schedule!r}, which takes {', '.join(sorted(fields))}"
        if self.schedule == "half_life" and self.half_life is None:
            return "half_life: is missing: the number of updates in which the weight of an update halves"
        if self.schedule == "power" and (self.gamma is None) == (self.sigma_rel is None):
            return "sigma_rel, gamma: one of the two is to be given for schedule 'power'"
        if self.sigma_rel is not None and self.sigma_rel >= LARGEST_SIGMA_REL:
            return (
                f"sigma_rel: {self.sigma_rel:g} is too large: from {LARGEST_SIGMA_REL:.6f} on, which is gamma 0, old "
                "parameters would weigh more than new ones"
            )
        if self.min_decay is not None and self.decay is not None and self.min_decay > self.decay:
            return f"min_decay: {self.min_decay:g} is above decay {self.decay:g}"
        return None


#: By schedule, the fields of an AverageConfig that the schedule takes, beside ``start``, which each does.
SCHEDULE_FIELDS: dict[str, frozenset[str]] = {
    "litema": frozenset({"decay"}),
    "constant": frozenset({"decay"}),
    "half_life": frozenset({"half_life"}),
    "power": frozenset({"sigma_rel", "gamma"}),
    "inverse_gamma": frozenset({"decay", "inv_gamma", "power", "min_decay"}),
}
_SCHEDULE_FIELDS = frozenset[str]().union(*SCHEDULE_FIELDS.values())


@dataclass(frozen=True, slots=True)
class Posthoc:
    """What a run keeps so that an average of any length can be worked out later: power averages, and their snapshots.

    snapshots: how many times of these averages are kept; there is one more while another is dropped. dtype: what they
        are stored in, as safetensors writes it.
    sigma_rel: the relative standard deviation of each average (Karras et al. 2024).
    """

    snapshots: Snapshots = 16
    dtype: Dtype = "F32"
    sigma_rel: tuple[SigmaRel, ...] = (0.015, 0.03, 0.25)

    @property
    def averages(self) -> tuple[AverageConfig, ...]:
        """The averages that a run tracks for this."""
        return tuple(AverageConfig(f"posthoc-{each:g}", "power", sigma_rel=each) for each in self.sigma_rel)

    @property
    def fault(self) -> str | None:
        """What is wrong, and what to do; None where nothing is."""
        names = {average.name for average in self.averages}
        if not 0 < len(names) == len(self.sigma_rel):
            return "sigma_rel: one or more different numbers are needed"
        return next((average.fault for average in self.averages if average.fault), None)


@dataclass(frozen=True, slots=True)
class RunConfig:
    """The body of ``POST /v1/runs``. Every field but ``run`` and ``layout`` is optional.

    decay: the largest decay, 0 <= decay <= 1, kept as float32 as LitEma keeps it.
    use_num_updates: LitEma's switch for the warm-up: the decay is then min(decay, (1 + n) / (10 + n)).
    decay_per: "update", one decay for each update (LitEma's meaning), or "step", the product over the steps since the
        latest update, so that the decay of a trainer that pushes every k-th step means the same.
    averages: the averages that every update feeds; a pull gives the first by default.
    non_finite: "refuse" updates with NaN or Inf, or "allow" them.
    durability: what an acknowledged write survives, "memory": a clean stop of the server; "process": a sudden end of
        the server, such as kill -9; "disk": a power loss. None: the durability of a run that exists, else "process", or
        "memory" where the server keeps nothing on disk.
    copied: names of tensors of which every average holds the newest value, bit for bit, instead of an average.
    posthoc: what is kept for averages of any length later; its own averages stand behind those of ``averages``.
    """

    run: Name
    layout: tuple[TensorSpec, ...]
    decay: Decay = DEFAULT_DECAY
    use_num_updates: bool = True
    decay_per: DecayPer = "update"
    averages: tuple[AverageConfig, ...] = (AverageConfig(),)
    non_finite: NonFinitePolicy = "refuse"
    durability: Durability | None = None
    copied: tuple[str, ...] = ()
    posthoc: Posthoc | None = None

    def average(self, name: str) -> AverageConfig:
        """The average of this name. Raises KeyError where the run has no such average."""
        return {each.name: each for each in self.averages}[name]


@dataclass(frozen=True, slots=True)
class RunLayout:
    """The tensors of a run's updates, in canonical order; ``copied`` as in RunConfig.

    digest: names this layout: XXH3 (128 bits) of a canonical body's header, in hexadecimal.
    block_bytes: an update may be sent in stretches that begin and end at multiples of so many bytes; 0 where not.
    lanes: how many stretches of one update the service receives at once; 1 where an update comes as one body.
    shards: of a gateway, on how many hosts the run lies.
    """

    run: str
    layout: tuple[TensorSpec, ...]
    copied: tuple[str, ...] = ()
    digest: str = ""
    block_bytes: Count = 0
    lanes: Count = 1
    shards: Count = 1


@dataclass(frozen=True, slots=True)
class AverageInfo(ScheduleFields):
    """An average as it stands.

    decay: the largest decay that the schedule reaches; of "power", which has no largest, 1.
    effective_decay: the decay of the latest update, None before any; also of an average that was added and begins with
        the next update.
    num_updates: the counter that the schedule goes by: updates since the average began, or steps where decay_per is
        "step"; -1 where the average does not count.
    Of "power" both sigma_rel and gamma are told.
    """

    name: Name
    schedule: ScheduleName
    decay: Decay
    effective_decay: Decay | None
    num_updates: Counter = -1


@dataclass(frozen=True, slots=True)
class RingInfo:
    """The ring of a run as it stands.

    snapshots, dtype, sigma_rel: as in Posthoc. times: the counters at which the averages were stored, ascending; the
    run's present state is one more. begin: the counter of the stored weights that the run began with, None where none
    are. bytes: of the files. waiting: snapshots that are being stored. trouble: why the latest one could not be; None
    if all is well.
    """

    snapshots: Count
    dtype: Name
    sigma_rel: tuple[SigmaRel, ...]
    times: tuple[Count, ...]
    begin: Count | None
    bytes: Count
    waiting: Count = 0
    trouble: Text | None = None


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """Which shard of a run on several hosts a server has.

    place: from 0, among ``of`` shards. birth: how many runs the hosts had created and deleted by then, with this one: a
    run that was made later in place of this one has another. tensors, copied: how many the whole run has, as RunInfo
    tells it of the shard.
    """

    place: Count
    of: Count
    birth: Count
    tensors: Count = 0
    copied: Count = 0


@dataclass(frozen=True, slots=True)
class HostedShard:
    """A shard of a run on several hosts, and where it is.

    place, birth: as in ShardInfo. address: the URL of its host. layout: the shard's tensors, as that host's own layout
    has them. first_rows: of each of these, the row (index in the first dimension) of the run's tensor at which it
    begins. replicas: URLs of servers that may hold the host's versions as well, under the same ETags. twin: the URL of
    the shard's other host, which has the same and is sent the same; None where there is none, or the others go on
    without that host.
    """

    place: Count
    birth: Count
    address: Text
    layout: tuple[TensorSpec, ...]
    first_rows: tuple[Count, ...]
    replicas: tuple[Text, ...] = ()
    twin: Text | None = None


@dataclass(frozen=True, slots=True)
class RunShards:
    """The answer to ``GET /v1/runs/{run}/shards``: of a run on several hosts, its shards by place; none where all
    weights go through the gateway. twins: whether a shard may have two hosts."""

    run: Name
    shards: tuple[HostedShard, ...]
    twins: bool = False


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """Of which server a replica's runs are, and how far behind they are.

    of: the URL of the original, by which writes go; empty while it is not known. reached: whether the original answers.
    behind_seconds: for how long the replica has known of a version that it does not hold yet; 0 where it knows of none.
    fault: why a run is not followed, None where all are.
    """

    of: Text
    reached: bool
    behind_seconds: float
    fault: Text | None = None


@dataclass(frozen=True, slots=True)
class VersionAverage:
    """An average in a version, as a replica is told it.

    config: as the run has it. lineage: tells apart two averages of one name. has_weights: False before the first ones.
    The others: as in AverageInfo.
    """

    config: AverageConfig
    lineage: Text
    decay: Decay
    effective_decay: Decay | None
    num_updates: Counter
    has_weights: bool


@dataclass(frozen=True, slots=True)
class RunVersion:
    """The answer to ``GET /v1/runs/{run}/version``: what a replica serves a version by, beside its weights.

    lineage: tells apart two versions of one name, and stands in their ETags; None, as ``version``, before the initial
    weights. fault: why the run takes no updates. The others: as in RunInfo.
    """

    run: Name
    created_at: Moment
    averages: tuple[VersionAverage, ...]
    version: Version | None
    lineage: Text | None
    step: Step | None
    num_updates: Counter
    updated_at: Moment
    writer: Count = 0
    ended_at: Moment | None = None
    fault: Text | None = None
    shard: ShardInfo | None = None


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A run as it stands. ``decay`` and ``effective_decay`` are the first average's.

    num_updates: LitEma's counter; -1 where use_num_updates is off.
    step: the trainer's step of the latest update, None before any.
    version: "epoch.n", None before the initial weights.
    durable_step: the step that the run would have after a sudden end of the server ("memory", "process") or of its
        machine ("disk"); None where the run would be without a step.
    parameters, bytes: elements of the layout, and bytes of all shadows of the run.
    created_at, updated_at: seconds since 1970-01-01 UTC.
    reason: why the status is not "ready". remedy: what to do then, in a sentence.
    refused: why the latest push was refused, such as for NaN; None where an update was applied since.
    writer: the number of the trainer that attached last, 0 before any did.
    link: how the latest push came to the server, for people to read; None before the first push since its start.
    copied: how many of the tensors are copied, not averaged.
    checkpoint_step: the step that the run would have after the loss of the machine, None if none.
    versions_in: where versions are kept, for people to read: memory files, slots on disk; None where nothing is.
    ring: of a run with ``posthoc``.
    ended_at: when the trainer said that its training is over; None while a trainer may go on.
    shard: where the server has one shard of a run on several hosts: which. All else is then told of that shard.
    replica: at a replica: of what, and how far behind this run is.
    """

    run: Name
    status: RunStatus
    decay: Decay
    num_updates: Counter
    effective_decay: Decay | None
    use_num_updates: bool
    decay_per: DecayPer
    step: Step | None
    version: Version | None
    durable_step: Step | None
    durability: Durability
    non_finite: NonFinitePolicy
    averages: tuple[AverageInfo, ...]
    tensors: Count
    parameters: Count
    bytes: Count
    device: Text
    shadow_dtype: Text
    created_at: Moment
    updated_at: Moment
    reason: Text | None = None
    writer: Count = 0
    link: Text | None = None
    copied: Count = 0
    checkpoint_step: Step | None = None
    versions_in: Text | None = None
    ring: RingInfo | None = None
    remedy: Text | None = None
    refused: Text | None = None
    ended_at: Moment | None = None
    shard: ShardInfo | None = None
    replica: ReplicaInfo | None = None


@dataclass(frozen=True, slots=True)
class RunList:
    runs: tuple[RunInfo, ...]


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The answer to ``GET /v1/server``. Without a token, where the server asks for tokens, name and version alone.

    device: where shadows lie. memory_bytes, memory_limit_bytes: of the host, for weights, and the most there may be.
    disk_free_bytes, disk_total_bytes: of the data dir's disk; data_dir_bytes: what the data dir takes of the disk. All
        three are None where nothing is kept on disk.
    durability: of runs that name none. time: the server's clock, Unix seconds. python, torch: versions.
    scopes: what the request's token allows, for some run or for all.
    snapshots_waiting: how many snapshots are to be moved to the object store; None where the service has none.
        snapshot_store_fault: why that store could not be used when it was tried last, None where it could.
    hosts: of a gateway: how many hosts it speaks for; None of a server.
    replica: at a replica: of what, and how far behind the run is that is furthest behind.
    """

    name: Text
    version: Text
    device: Text | None = None
    runs: Count | None = None
    memory_bytes: Count | None = None
    memory_limit_bytes: Count | None = None
    disk_free_bytes: Count | None = None
    disk_total_bytes: Count | None = None
    data_dir_bytes: Count | None = None
    durability: Durability | None = None
    time: Moment | None = None
    python: Text | None = None
    torch: Text | None = None
    scopes: tuple[Text, ...] = ()
    snapshots_waiting: Count | None = None
    snapshot_store_fault: Text | None = None
    hosts: Count | None = None
    replica: ReplicaInfo | None = None


@dataclass(frozen=True, slots=True)
class RunPatch:
    """The body of ``PATCH /v1/runs/{run}``: the decay of an average, or (None) of the first, for updates to come."""

    decay: Decay
    average: Name | None = None


@dataclass(frozen=True, slots=True)
class Writer:
    """The answer to ``POST /v1/runs/{run}/writers``: the service refuses pushes with smaller numbers from then on."""

    run: Name
    writer: Count


@dataclass(frozen=True, slots=True)
class Rewind:
    """The body of ``POST /v1/runs/{run}/rewind``: the snapshot to go back to.

    None, for a run that is degraded: go on with the version that is there. run: the run of the snapshot, None for the
    run that is rewound.
    """

    snapshot: Name | None = None
    run: Name | None = None
