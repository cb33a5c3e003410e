"""Request bodies as FastAPI checks them, field by field; answers are the protocol's dataclasses as they stand.

A contract test keeps the fields here and in ``ema_client.protocol`` the same.

Knows the fields of ``ema_client.protocol`` and their limits. Does not know what a run makes of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ema_client.errors import InvalidRequest
from ema_client.protocol import (
    DEFAULT_AVERAGE,
    DEFAULT_DECAY,
    FINITE,
    GAMMAS,
    MAX_AVERAGES,
    MAX_RANK,
    MAX_STEP,
    MAX_TENSOR_NAME,
    MAX_TENSORS,
    NAME_PATTERN,
    POSITIVE,
    RING_SNAPSHOTS,
    SIGMA_RELS,
    SWEEP_POINTS,
    SWEEP_TEXT,
    AverageConfig,
    DecayPer,
    Durability,
    NonFinitePolicy,
    Posthoc,
    RunConfig,
    ScheduleName,
    SweepKind,
    SweepPoint,
    SweepReport,
    TensorSpec,
)

__all__ = [
    "CHANGE_BYTES",
    "CONFIG_BYTES",
    "SWEEP_BYTES",
    "AverageConfigBody",
    "RewindBody",
    "RunConfigBody",
    "RunPatchBody",
    "SweepBody",
    "definitions",
    "json_body",
]

_COMPONENT = "#/components/schemas/{model}"

#: Most bytes of a configuration: a layout of 200,000 tensors takes about 20 MB.
CONFIG_BYTES = 32 << 20
#: Most bytes of a change to a run: a name and a number.
CHANGE_BYTES = 4 << 10
#: Most bytes of a sweep's report: 64 points, of which each may say why there is no average.
SWEEP_BYTES = 64 << 10

_Name = Annotated[str, Field(pattern=NAME_PATTERN)]
_Decay = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
_Step = Annotated[int, Field(ge=0, le=MAX_STEP)]
_Positive = Annotated[float, Field(ge=POSITIVE[0], le=POSITIVE[1], allow_inf_nan=False)]
_SigmaRel = Annotated[float, Field(ge=SIGMA_RELS[0], le=SIGMA_RELS[1], allow_inf_nan=False)]
_Finite = Annotated[float, Field(ge=FINITE[0], le=FINITE[1], allow_inf_nan=False)]
_Text = Annotated[str, Field(max_length=SWEEP_TEXT)]
_Gamma = Annotated[float, Field(ge=GAMMAS[0], le=GAMMAS[1], allow_inf_nan=False)]


def json_body(kind: type[BaseModel]) -> dict[str, Any]:
    """The ``requestBody`` in the OpenAPI of a route that parses a body of this kind itself.

    FastAPI does not collect what the reference refers to: that is definitions().
    """
    schema = {"$ref": _COMPONENT.format(model=kind.__name__)}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def definitions(kind: type[BaseModel]) -> dict[str, Any]:
    """The JSON schemas of a body and its parts, by the names that references give them."""
    schema = kind.model_json_schema(ref_template=_COMPONENT)
    return {**schema.pop("$defs", {}), kind.__name__: schema}


class _Body(BaseModel):
    # strict: "0.9", true or 1.5 steps are mistakes, not numbers to be converted.
    model_config = ConfigDict(extra="forbid", strict=True)


class _TensorSpecBody(_Body):
    name: Annotated[str, Field(min_length=1, max_length=MAX_TENSOR_NAME)]
    shape: Annotated[list[Annotated[int, Field(ge=0, le=MAX_STEP)]], Field(max_length=MAX_RANK)]
    dtype: Annotated[str, Field(description="As safetensors writes it: F64, F32, BF16, F16")]


def _spec(body: _TensorSpecBody) -> TensorSpec:
    # A Python function called for each tensor also lets other threads run while a large layout is parsed.
    return TensorSpec(body.name, tuple(body.shape), body.dtype)


class AverageConfigBody(_Body):
    """An average of a run: its name, its schedule, and the fields of the schedule."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "long", "schedule": "power", "sigma_rel": 0.1}]})

    name: _Name = DEFAULT_AVERAGE
    schedule: ScheduleName = "litema"
    decay: Annotated[_Decay | None, Field(description="The largest decay. None: the run's decay")] = None
    start: Annotated[
        _Step | None, Field(description="The average begins after this update. None: with the initial weights")
    ] = None
    half_life: Annotated[_Positive | None, Field(description="Of schedule half_life, in updates")] = None
    sigma_rel: Annotated[_SigmaRel | None, Field(description="Of schedule power: this, or gamma")] = None
    gamma: Annotated[_Gamma | None, Field(description="Of schedule power: this, or sigma_rel")] = None
    inv_gamma: Annotated[_Positive | None, Field(description="Of schedule inverse_gamma; None: 1")] = None
    power: Annotated[_Positive | None, Field(description="Of schedule inverse_gamma; None: 2/3")] = None
    min_decay: Annotated[_Decay | None, Field(description="Of schedule inverse_gamma; None: 0")] = None

    def to_config(self) -> AverageConfig:
        """The same average as the protocol's dataclass."""
        return AverageConfig(**self.model_dump())


class _PosthocBody(_Body):
    snapshots: int = Field(16, ge=RING_SNAPSHOTS[0], le=RING_SNAPSHOTS[1], description="How many times are kept")
    dtype: Literal["F64", "F32", "BF16", "F16"] = Field("F32", description="What snapshots are stored in")
    sigma_rel: Annotated[
        list[_SigmaRel], Field(min_length=1, max_length=MAX_AVERAGES, description="Of the averages that are tracked")
    ] = [0.015, 0.03, 0.25]

    def to_posthoc(self) -> Posthoc:
        """The body as the protocol's dataclass."""
        return Posthoc(self.snapshots, self.dtype, tuple(self.sigma_rel))


class RunConfigBody(_Body):
    """The configuration of a run: its layout and how it averages."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "run": "digits",
                    "decay": 0.9999,
                    "layout": [
                        {"name": "conv.weight", "shape": [8, 1, 3, 3], "dtype": "F32"},
                        {"name": "conv.bias", "shape": [8], "dtype": "F32"},
                    ],
                }
            ]
        }
    )

    run: _Name
    layout: Annotated[
        list[Annotated[_TensorSpecBody, AfterValidator(_spec)]], Field(min_length=1, max_length=MAX_TENSORS)
    ]
    decay: _Decay = DEFAULT_DECAY
    use_num_updates: bool = Field(True, description="LitEma's warm-up: min(decay, (1 + n) / (10 + n))")
    decay_per: DecayPer = Field("update", description="step: make good for the steps between two updates")
    averages: Annotated[list[AverageConfigBody], Field(min_length=1, max_length=MAX_AVERAGES)] = [AverageConfigBody()]
    non_finite: NonFinitePolicy = Field("refuse", description="What to do with NaN and Inf in an update")
    durability: Annotated[
        Durability | None, Field(description="What survives a crash; None: process, where there is a disk")
    ] = None
    copied: Annotated[
        list[str], Field(max_length=MAX_TENSORS, description="Tensors whose newest value is kept, not an average")
    ] = []
    posthoc: Annotated[
        _PosthocBody | None, Field(description="Keep what averages of any length can be worked out of later")
    ] = None

    def to_config(self) -> RunConfig:
        """The same configuration as the protocol's dataclass."""
        return RunConfig(
            run=self.run,
            layout=tuple(self.layout),  # type: ignore[arg-type]  # _spec() made TensorSpecs of them
            decay=self.decay,
            use_num_updates=self.use_num_updates,
            decay_per=self.decay_per,
            averages=tuple(average.to_config() for average in self.averages),
            non_finite=self.non_finite,
            durability=self.durability,
            copied=tuple(self.copied),
            posthoc=self.posthoc.to_posthoc() if self.posthoc else None,
        )


class RunPatchBody(_Body):
    """The part of a run's configuration that can be changed."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"decay": 0.999}]})

    decay: _Decay = Field(description="The decay from the next update on")
    average: Annotated[_Name | None, Field(description="Which average; None: the first")] = None


class RewindBody(_Body):
    """Where a run is to go back to."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"snapshot": "epoch-10"}]})

    snapshot: Annotated[
        _Name | None, Field(description="The snapshot's name; None: accept the version of a degraded run")
    ] = None
    run: Annotated[_Name | None, Field(description="The snapshot's run, to branch from; None: this run")] = None


class _SweepPointBody(_Body):
    value: Annotated[_Positive, Field(description="The average's sigma_rel, decay or half-life")]
    result: Annotated[_Finite | None, Field(description="What it came to. None: there is no result")] = None
    refused: Annotated[_Text | None, Field(description="Why there was no average of this length")] = None


class SweepBody(_Body):
    """What averages of several lengths came to."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"kind": "sigma_rel", "at": 1000, "name": "FID", "points": [{"value": 0.12, "result": 3.5}]}]
        }
    )

    kind: Annotated[SweepKind, Field(description="What the lengths are")]
    points: Annotated[list[_SweepPointBody], Field(min_length=SWEEP_POINTS[0], max_length=SWEEP_POINTS[1])]
    at: Annotated[_Name | _Step | None, Field(description="Of which time: a snapshot's name, or a counter")] = None
    highest: Annotated[bool, Field(description="The highest result is the best, not the lowest")] = False
    name: Annotated[_Text | None, Field(description="What the results are", examples=["FID"])] = None

    def to_report(self) -> SweepReport:
        """The body as the protocol's dataclass. Raises InvalidRequest for a value that is no length of the kind."""
        points = tuple(SweepPoint(point.value, point.result, point.refused) for point in self.points)
        report = SweepReport(self.kind, points, self.at, self.highest, self.name)
        if report.fault is not None:
            raise InvalidRequest(report.fault)
        return report
