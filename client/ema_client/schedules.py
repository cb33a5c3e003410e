"""Decay schedules for an average: each function gives an AverageConfig, with the fields that its schedule takes.

    RemoteEma(model, run="dit", schedule=inverse_gamma(power=0.75))

``start``, wherever a function takes it: the average begins after this update, as ``update_after_step`` of other
programs: up to and including update start + 1 it is the parameters themselves, and the schedule counts from there.
None: the average begins with the initial weights. ``name``: of the average in its run.

Knows the fields of AverageConfig. Does not know how a decay is computed, which the service does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ema_client.errors import UsageError
from ema_client.protocol import DEFAULT_AVERAGE, AverageConfig, Posthoc, from_json, to_json

__all__ = [
    "average_of",
    "averages_of",
    "constant",
    "half_life",
    "inverse_gamma",
    "litema",
    "of_run_fraction",
    "posthoc_of",
    "power",
    "uniform",
]


def litema(decay: float | None = None, *, start: int | None = None, name: str = DEFAULT_AVERAGE) -> AverageConfig:
    """LitEma's and torch_ema's: min(decay, (1 + n) / (10 + n)) at update n; with ``start`` also diffusers' EMAModel's
    without ``use_ema_warmup``. decay: None means the run's."""
    return _checked(AverageConfig(name, "litema", decay, start=start))


def constant(decay: float | None = None, *, start: int | None = None, name: str = DEFAULT_AVERAGE) -> AverageConfig:
    """The same decay at each update, as torch's AveragedModel with get_ema_avg_fn() and timm's ModelEmaV2 have it.

    decay: None means the run's.
    """
    return _checked(AverageConfig(name, "constant", decay, start=start))


def half_life(updates: float, *, start: int | None = None, name: str = DEFAULT_AVERAGE) -> AverageConfig:
    """A constant decay, by which the weight of an update halves in so many updates: 2^(-1 / updates)."""
    return _checked(AverageConfig(name, "half_life", start=start, half_life=updates))


def power(
    sigma_rel: float | None = None,
    *,
    gamma: float | None = None,
    start: int | None = None,
    name: str = DEFAULT_AVERAGE,
) -> AverageConfig:
    """The power function average of Karras et al. 2024 (EDM2, arXiv 2312.02696): (1 - 1 / n)^(gamma + 1) at update n.

    Its length is a fraction of the training so far. sigma_rel: the standard deviation of the weights of the updates,
    relative to the training's length, below 0.28867 (0.05 and 0.10 in EDM2). gamma: the exponent, in its place.
    """
    return _checked(AverageConfig(name, "power", start=start, sigma_rel=sigma_rel, gamma=gamma))


def of_run_fraction(fraction: float, *, start: int | None = None, name: str = DEFAULT_AVERAGE) -> AverageConfig:
    """A power average whose half-life is this fraction of the training so far, 0 < fraction < 0.69, as torchtitan's.

    The retention over it is (1 - fraction)^(gamma + 1), about exp(-fraction (gamma + 1)): gamma is ln 2 / fraction - 1.
    """
    if not 0.0 < fraction <= math.log(2.0):
        raise UsageError(f"fraction: {fraction} is not above 0 and at most {math.log(2.0):.4f}")
    return power(gamma=math.log(2.0) / fraction - 1.0, start=start, name=name)


def uniform(*, start: int | None = None, name: str = DEFAULT_AVERAGE) -> AverageConfig:
    """The mean of all updates, as stochastic weight averaging has it (torch's AveragedModel by default): gamma 0."""
    return power(gamma=0.0, start=start, name=name)


def inverse_gamma(
    decay: float | None = None,
    *,
    inv_gamma: float = 1.0,
    power: float = 2 / 3,
    min_decay: float = 0.0,
    start: int | None = None,
    name: str = DEFAULT_AVERAGE,
) -> AverageConfig:
    """diffusers' EMAModel's with ``use_ema_warmup``, timm's ModelEmaV3's and ema-pytorch's EMA's warm-up.

    1 - (1 + s / inv_gamma)^-power at update n = s + 1, or n = s + 1 + start; no less than min_decay and no more than
    decay. The first update has the decay 0. decay: None means the run's.
    """
    return _checked(
        AverageConfig(name, "inverse_gamma", decay, start=start, inv_gamma=inv_gamma, power=power, min_decay=min_decay)
    )


def averages_of(
    schedule: AverageConfig | None = None, averages: Sequence[AverageConfig] | None = None
) -> tuple[AverageConfig, ...]:
    """The averages of a run that is asked for with one schedule, or with several averages; by default LitEma's.

    Raises UsageError where both are given.
    """
    if schedule is not None and averages is not None:
        raise UsageError("both a schedule and averages are given", hint="give one: an average has its own schedule")
    return (schedule or AverageConfig(),) if averages is None else tuple(averages)


def average_of(name: str, schedule: AverageConfig | None = None, decay: float | None = None) -> AverageConfig:
    """The average of this name; without a schedule LitEma's. decay: of a schedule that takes one and does not say its
    own.

    Raises UsageError where the schedule has a decay already, or takes none.
    """
    average = replace(schedule or AverageConfig(), name=name)
    if decay is not None:
        if average.decay is not None:
            raise UsageError("both a schedule with its decay and a decay are given", hint="give the decay once")
        average = replace(average, decay=decay)
    return _checked(average)


def posthoc_of(wished: Posthoc | Mapping[str, Any] | bool | None) -> Posthoc | None:
    """What a run is to keep for averages of any length later: a Posthoc, or its fields by name; True: its defaults.

    Raises UsageError for what the service would refuse, naming the field.
    """
    if wished is None or isinstance(wished, bool):
        return Posthoc() if wished else None
    if not isinstance(wished, Posthoc | Mapping):
        raise UsageError(f"posthoc={wished!r} is no Posthoc", hint="give True, Posthoc(snapshots=32) or a mapping")
    fields = to_json(wished) if isinstance(wished, Posthoc) else dict(wished)
    if unknown := sorted(fields.keys() - Posthoc.__annotations__.keys()):
        raise UsageError(f"posthoc has no {unknown[0]!r}", hint=f"it has {', '.join(Posthoc.__annotations__)}")
    if isinstance(widths := fields.get("sigma_rel"), tuple):
        fields["sigma_rel"] = list(widths)
    try:
        made = from_json(Posthoc, fields)
    except ValueError as fault:
        raise UsageError(str(fault)) from None
    if made.fault:
        raise UsageError(f"posthoc: {made.fault}")
    return made


def _checked(average: AverageConfig) -> AverageConfig:
    """The average, if the service would take it. Raises UsageError naming the field."""
    try:
        from_json(AverageConfig, to_json(average))
    except ValueError as fault:
        raise UsageError(str(fault)) from None
    if average.fault:
        raise UsageError(average.fault)
    return average
