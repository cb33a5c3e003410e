"""The protocol as client and server share it: routes, header names, limits, a frozen dataclass for each JSON body.

What comes from the other side is checked as it becomes a dataclass: whoever has a dataclass may use its names in paths,
its numbers in sums, and show its texts on a terminal.

Knows: the words of the protocol (client/PROTOCOL.md is the normative text) and nothing else; standard library only.
Does not know: how bytes travel (http), how tensors become bytes (wire), or what a server does with a request.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints
from urllib.parse import quote

from ema_client.errors import printable

DEFAULT_URL = "http://127.0.0.1:8470"
DEFAULT_PORT = 8470
API = "/v1"

#: Where the actors of a cluster's hosts are in Ray, each of which has a method ``url``, of its gateway.
RAY_NAMESPACE = "ema-service"

#: The rule for names of runs, averages and snapshots: every such name is a plain file name.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
_NAME = re.compile(NAME_PATTERN.replace("$", r"\Z"))

DEFAULT_AVERAGE = "ema"
DEFAULT_DECAY = 0.9999

#: Steps and counters fit a signed 64-bit integer, which SQLite and the languages of clients have.
MAX_STEP = 2**63 - 1
#: As the reference implementation of safetensors limits a header.
MAX_HEADER_BYTES = 100_000_000
MAX_TENSOR_NAME = 1024
MAX_TENSORS = 200_000
MAX_RANK = 32
MAX_AVERAGES = 16
#: The most parts that an update may come in.
MAX_PARTS = 65_536
#: The longest time for which a GET may wait for a step, in seconds.
MAX_WAIT = 60.0

HEADER_RUN = "Ema-Run"
HEADER_AVERAGE = "Ema-Average"
HEADER_VERSION = "Ema-Version"
HEADER_STEP = "Ema-Step"
HEADER_NUM_UPDATES = "Ema-Num-Updates"
HEADER_DECAY = "Ema-Decay"
#: Of an average that was worked out of snapshots: how far its profile is from the wished one, and by how much the
#: rounding of what was stored grew.
HEADER_PROFILE_ERROR = "Ema-Profile-Error"
HEADER_AMPLIFICATION = "Ema-Amplification"
#: Of a sweep: how many averages its body has.
HEADER_TARGETS = "Ema-Targets"
#: Of weights that one host of a cluster works out: how, for the other hosts.
HEADER_RECIPE = "Ema-Recipe"
#: Of a push: the writer's number, which attaching gave the trainer.
HEADER_WRITER = "Ema-Writer"
#: Of a push to one shard of a run on several hosts: any word, as of HEADER_KEY, the same for all shards' slices of one
#: update and in all tries.
HEADER_PUSH = "Ema-Push"
#: Of a slice, or a part of one, to a host with a twin: to how many of the two hosts it is sent.
HEADER_COPIES = "Ema-Copies"
#: Of weights that a gateway sends: on how many hosts the run lies.
HEADER_SHARDS = "Ema-Shards"
#: Of a body that is sent: what its digest is, and where. A service's answer has the digest itself, in hexadecimal.
HEADER_DIGEST = "Ema-Digest"
#: RunLayout.digest, with each stretch of an update, whose body does not say what its bytes are.
HEADER_LAYOUT = "Ema-Layout"
#: The digest's bytes follow the body's data.
DIGEST_FOLLOWS = "xxh3-128; follows"
DIGEST_BYTES = 16
#: Of a write that is no push: any word, the same in all tries of one call. A write is applied once for each key.
HEADER_KEY = "Idempotency-Key"
KEY_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
#: In place of a body: where in the memory of this host the body lies. See Segment.
HEADER_SEGMENT = "Ema-Segment"

#: A segment's name for memfd_create(2), and the length of the secret that the segment begins with.
SEGMENT_NAME = "ema-push"
SECRET_BYTES = 32
_SEGMENT = re.compile(
    r"pid=(\d{1,10}), fd=(\d{1,10}), offset=(\d{1,19}), length=(\d{1,19}), secret=([0-9a-f]{64})\Z", re.ASCII
)

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
Name = Annotated[str, _NAME]
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

#: A word for one of several things; a newer service may have more of them than the Literal.
_WORD = re.compile(r"[a-z_]{1,64}\Z")
_INTEGER = re.compile(r"-?[0-9]{1,19}\Z")


def is_name(value: str) -> bool:
    """Whether ``value`` may name a run, an average or a snapshot."""
    return _NAME.match(value) is not None


# --- routes ---------------------------------------------------------------------------------------------------------


def server_path() -> str:
    return f"{API}/server"


def ray_host(cluster: str, place: int) -> str:
    """The name that a host of a cluster has among Ray's actors."""
    return f"{cluster}-host-{place}"


def runs_path() -> str:
    return f"{API}/runs"


def run_path(run: str) -> str:
    return f"{API}/runs/{quote(run, safe='')}"


def layout_path(run: str) -> str:
    return f"{run_path(run)}/layout"


def version_path(run: str) -> str:
    return f"{run_path(run)}/version"


def shards_path(run: str) -> str:
    return f"{run_path(run)}/shards"


def reset_path(run: str) -> str:
    return f"{run_path(run)}/reset-num-updates"


def writers_path(run: str) -> str:
    return f"{run_path(run)}/writers"


def writer_path(run: str, writer: int) -> str:
    return f"{writers_path(run)}/{writer}"


def rewind_path(run: str) -> str:
    return f"{run_path(run)}/rewind"


def weights_path(run: str) -> str:
    return f"{run_path(run)}/weights"


def profiles_path(run: str) -> str:
    return f"{run_path(run)}/profiles"


def sweep_path(run: str) -> str:
    return f"{run_path(run)}/sweep"


def sweeps_path(run: str) -> str:
    return f"{run_path(run)}/sweeps"


def update_path(run: str, step: int) -> str:
    return f"{run_path(run)}/updates/{step}"


def events_path(run: str) -> str:
    return f"{run_path(run)}/events"


def history_path(run: str) -> str:
    return f"{run_path(run)}/history"


def distances_path(run: str) -> str:
    return f"{run_path(run)}/distances"


def timeline_path(run: str) -> str:
    return f"{run_path(run)}/timeline"


def part_path(run: str, step: int | None, part: int) -> str:
    """The path of a part of an update; of a part of the initial weights where ``step`` is None."""
    whole = weights_path(run) if step is None else update_path(run, step)
    return f"{whole}/parts/{part}"


def stretch_path(run: str, step: int, start: int, stop: int) -> str:
    """The path of a stretch of an update: bytes ``start`` to ``stop`` of the parameters in canonical order."""
    return f"{update_path(run, step)}/stretches/{start}-{stop}"


def part_stretch_path(run: str, step: int, part: int, start: int, stop: int) -> str:
    """The path of a stretch of a part of an update: bytes ``start`` to ``stop`` of the part's data."""
    return f"{part_path(run, step, part)}/stretches/{start}-{stop}"


def averages_path(run: str) -> str:
    return f"{run_path(run)}/averages"


def average_path(run: str, name: str) -> str:
    return f"{averages_path(run)}/{quote(name, safe='')}"


def snapshots_path(run: str) -> str:
    return f"{run_path(run)}/snapshots"


def snapshot_path(run: str, name: str) -> str:
    return f"{snapshots_path(run)}/{quote(name, safe='')}"


def snapshot_weights_path(run: str, name: str) -> str:
    return f"{snapshot_path(run, name)}/weights"


# --- bodies ---------------------------------------------------------------------------------------------------------


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
    run that was made later in place of this one has another.
    """

    place: Count
    of: Count
    birth: Count


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


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """The answer to an update. ``applied`` is False where the same bytes had been applied at that step before."""

    applied: bool
    step: Step
    num_updates: Counter
    effective_decay: Decay | None
    version: Version
    durable_step: Step | None


@dataclass(frozen=True, slots=True)
class SliceDigest:
    """The digest of what one host has of an update's parameters: of so many bytes of their data, as one body's."""

    bytes: Count
    digest: Text


@dataclass(frozen=True, slots=True)
class UpdateStatus:
    """What the server knows of a step. ``parts`` lists the parts of a staged update that have come.

    digest: of the parameters, as ``Ema-Digest`` has it, 32 hexadecimal digits; of the run's latest update only.
    digests: in its place, of a run on several hosts: of each host's slice of the data, in the data's order.
    """

    step: Step
    state: UpdateState
    parts: tuple[Count, ...] = ()
    digest: Text | None = None
    digests: tuple[SliceDigest, ...] = ()


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
    groups: by the common beginning of tensors' names, the distance of these tensors alone at each time.
    """

    run: Name
    average: Name
    version: Version | None
    seen: Count
    begin: Moment | None
    columns: HistoryColumns
    groups: dict[str, tuple[float | None, ...]]


@dataclass(frozen=True, slots=True)
class Distances:
    """The answer to ``GET /v1/runs/{run}/distances``: how far each tensor's shadow was from its parameters.

    tensors: by name, |shadow - parameters| / |parameters| after the newest update that was measured; None where the
    tensor is copied, or was not measured. average, version, step: of that update.
    """

    run: Name
    average: Name
    version: Version | None
    step: Step | None
    tensors: dict[str, float | None]


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
            "step": None if step is None else _integer(step),
            "num_updates": _integer(metadata["ema_num_updates"]),
            "decay": float(metadata["ema_decay"]),
            "snapshot": metadata.get("ema_snapshot"),
            "schedule": metadata.get("ema_schedule", "litema"),
            "soup": metadata.get("ema_soup"),
            "target": metadata.get("ema_target"),
        }
        numbers = [each.name for each in dataclasses.fields(ScheduleFields)]
        for name in [*numbers, "profile_error", "amplification"]:
            if (said := metadata.get(f"ema_{name}")) is not None:
                state[name] = _integer(said) if name == "start" else float(said)
        return from_json(cls, state)


@dataclass(frozen=True, slots=True)
class Segment:
    """Where a body lies in shared memory: ``length`` bytes from ``offset`` on, in descriptor ``fd`` of process ``pid``.

    secret: the bytes that the segment begins with for as long as it holds the body of this request.
    """

    pid: int
    fd: int
    offset: int
    length: int
    secret: bytes

    def to_header(self) -> str:
        """The segment as the value of ``Ema-Segment``."""
        numbers = f"pid={self.pid}, fd={self.fd}, offset={self.offset}, length={self.length}"
        return f"{numbers}, secret={self.secret.hex()}"

    @classmethod
    def from_header(cls, value: str) -> Segment:
        """The segment that to_header() wrote. Raises ValueError on anything else."""
        match = _SEGMENT.match(value)
        if match is None:
            raise ValueError(f"{HEADER_SEGMENT} is not `pid=N, fd=N, offset=N, length=N, secret=HEX`")
        pid, fd, offset, length = map(int, match.groups()[:4])
        return cls(pid, fd, offset, length, bytes.fromhex(match[5]))


def _plain(value: object) -> str:
    return repr(value) if isinstance(value, float) else str(value)


# --- dataclass <-> JSON ---------------------------------------------------------------------------------------------

T = TypeVar("T")


_Reader = Callable[[Any], Any]

#: Dataclass -> field -> what reads the field's value. Making readers at each answer takes longer than a small push.
_READERS: dict[type, dict[str, _Reader]] = {}


def to_json(body: Any) -> dict[str, Any]:
    """The JSON object of a dataclass of this module."""
    return dataclasses.asdict(body)


def from_json(cls: type[T], data: Any) -> T:
    """A dataclass of this module from its JSON object, every field by its annotation's rule.

    Unknown members are ignored, so that an older client reads a newer server. Raises ValueError naming what is missing,
    or the field that does not keep its rule.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{cls.__name__}: expected a JSON object, got {type(data).__name__}")
    readers = _READERS.get(cls) or _READERS.setdefault(cls, _readers(cls))
    given = {}
    for name, read in readers.items():
        if name in data:
            try:
                given[name] = read(data[name])
            except ValueError as fault:
                raise ValueError(f"{cls.__name__}.{name}: {fault}") from None
    try:
        return cls(**given)
    except TypeError as missing:
        raise ValueError(f"{cls.__name__}: {missing}") from None


def _readers(cls: type) -> dict[str, _Reader]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: _reader(hints[field.name]) for field in dataclasses.fields(cls)}


def _reader(hint: Any) -> _Reader:
    """What turns a value of JSON into a field of this annotation. The reader raises ValueError on any other value."""
    arguments = get_args(hint)
    origin = get_origin(hint)
    if origin in (UnionType, Union):
        return _either([_reader(each) for each in arguments if each is not NoneType])
    if origin is Annotated:
        plain, keeps = _reader(arguments[0]), _keeper(arguments[1])
        return lambda value: keeps(plain(value))
    if origin is tuple:
        inner = _reader(arguments[0])
        return lambda value: tuple(map(inner, _typed(list, value)))
    if origin is dict:
        inner = _reader(arguments[1])
        return lambda value: {_typed(str, key): inner(each) for key, each in _typed(dict, value).items()}
    if origin is Literal:
        return _reader(Annotated[str, _WORD])
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return lambda value: from_json(hint, value)
    return _number if hint is float else lambda value: _typed(hint, value)


def _either(readers: list[_Reader]) -> _Reader:
    """What reads null, and what one of the readers reads."""
    first, *others = readers
    if not others:
        return lambda value: None if value is None else first(value)
    rest = _either(others)

    def read(value: Any) -> Any:
        try:
            return None if value is None else first(value)
        except ValueError:
            return rest(value)

    return read


def _keeper(rule: Any) -> _Reader:
    """What returns a value that keeps a rule, and raises ValueError on any other."""
    if callable(rule):
        return rule  # type: ignore[no-any-return]

    def keep(value: Any) -> Any:
        kept = rule.match(value) if isinstance(rule, re.Pattern) else rule[0] <= value <= rule[1]
        return value if kept else _refuse(value)

    return keep


def _typed(kind: type[T], value: Any) -> T:
    # Not isinstance(): true is no number.
    return value if type(value) is kind else _refuse(value)


def _number(value: Any) -> float:
    # NaN is between no bounds; a larger integer is no float.
    return float(value) if type(value) in (int, float) and FINITE[0] <= value <= FINITE[1] else _refuse(value)


def _integer(text: str) -> int:
    return int(text) if _INTEGER.match(text) else _refuse(text)


def _refuse(value: Any) -> NoReturn:
    raise ValueError(f"{str(value)[:80]!r} is not possible here")
