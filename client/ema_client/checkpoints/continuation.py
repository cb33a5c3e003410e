"""How an average goes on in a run: the decay of a program's next update, and the run whose decay is the same.

Each program counts something else, and warms its decay up in another way or not at all. Where no schedule of a run is
the program's, or the file does not hold it, the difference is told.

Knows: the decay schedules of LitEma, torch_ema, diffusers' EMAModel and ours. Does not know: files, tensors, the
service.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ema_client.checkpoints.values import real, whole
from ema_client.errors import UsageError
from ema_client.protocol import DEFAULT_DECAY, AverageConfig, ScheduleName, WeightsInfo

__all__ = ["Continuation", "constant", "next_decay", "of_emamodel", "to_emamodel", "warmed_up"]

#: Decays that differ by less are the same: a run computes in float32, which has a step of 6e-8 below 1.
_SAME = 1e-6
#: The warm-up of timm and ema-pytorch, whose files do not hold its parameters.
POWER_RULE = "1 - (1 + n)^-p"


@dataclass(frozen=True)
class Continuation:
    """How an average goes on.

    schedule: "litema", a warm-up as LitEma's where there is a counter, "constant", or another that a run has.
    fields: what that schedule takes beside the decay (ScheduleFields).
    decay: the largest decay; None where the file does not say.
    num_updates: the counter that the run begins with; None for a run without a counter, whose decay is constant.
    next_decay: of the program's own next update; None where the file does not tell.
    usual_decay: the decay that the program has unless it is told another, for a file that does not say.
    rule: the program's schedule in words, where a run cannot have that schedule.
    """

    schedule: ScheduleName = "litema"
    decay: float | None = None
    num_updates: int | None = None
    next_decay: float | None = None
    usual_decay: float = DEFAULT_DECAY
    rule: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def average(self) -> AverageConfig:
        """The average that a run goes on with; its largest decay is the run's."""
        return AverageConfig(schedule=self.schedule, **self.fields)

    def first_decay(self, decay: float) -> float:
        """The decay of the run's first update, where ``decay`` is its largest."""
        return next_decay(self.average, decay, -1 if self.num_updates is None else self.num_updates)

    def difference(self, decay: float) -> str | None:
        """How the run's first update differs from the program's next one, in words; None where it does not, as far as
        the file tells.

        decay: the run's largest.
        """
        ours = self.first_decay(decay)
        if self.next_decay is None or abs(ours - self.next_decay) < _SAME:
            return None
        rule = f" ({self.rule}, which a run does not have)" if self.rule else ""
        return f"there the next update would have the decay {self.next_decay:.6g}{rule}; the run's first has {ours:.6g}"


def warmed_up(decay: float, num_updates: int | None) -> Continuation:
    """LitEma's and torch_ema's: the counter before an update is n - 1, and the update's decay is min(decay, (1 + n) /
    (10 + n)). Without a counter (None, LitEma's -1) the decay is constant."""
    if num_updates is None or num_updates < 0:
        return Continuation("litema", decay, None, decay)
    return Continuation("litema", decay, num_updates, _warm(decay, num_updates))


def constant(num_updates: int | None, usual_decay: float, *, decay: float | None = None) -> Continuation:
    """A decay that no counter changes, whatever was counted; num_updates goes on counting. decay: where it is known."""
    return Continuation("constant", decay, num_updates, decay, usual_decay)


def of_emamodel(said: Mapping[str, Any]) -> Continuation:
    """diffusers' EMAModel, by the fields of its state_dict() beside the averages.

    EMAModel's first update copies the parameters, which LitEma's constructor does: so EMAModel's ``optimization_step``
    is LitEma's counter and one more. Until ``update_after_step`` each update copies. Raises UsageError for fields that
    are not EMAModel's.
    """
    if "optimization_step" not in said:
        raise UsageError("the file has no `optimization_step` as EMAModel keeps it", hint="give another --format")
    decay, smallest = real(said, "decay", DEFAULT_DECAY), real(said, "min_decay", 0.0)
    step = whole(said, "optimization_step") - whole(said, "update_after_step", 0, least=-(2**62))
    count = max(step - 1, 0)
    following, rule = _emamodel_decay(said, step, decay, smallest)
    if smallest >= decay and step > 0:
        # One update counted is what to_emamodel() makes of a run without a counter.
        return Continuation("constant", smallest, count or None, following, rule=rule)
    # A step before the beginning of time is none: what counts is how far the beginning is.
    start = max(whole(said, "update_after_step", 0, least=-(2**62)), 0)
    if said.get("use_ema_warmup") is True:
        fields = {"start": start, "min_decay": min(smallest, decay)}
        fields |= {"inv_gamma": real(said, "inv_gamma", 1.0), "power": real(said, "power", 2 / 3)}
        return Continuation("inverse_gamma", decay, step + start, following, rule=rule, fields=fields)
    if start or step <= 0:
        return Continuation("litema", decay, step + start, following, rule=rule, fields={"start": start})
    return Continuation("litema", decay, count, following, rule=rule)


def _emamodel_decay(said: Mapping[str, Any], step: int, decay: float, smallest: float) -> tuple[float, str]:
    """The decay of the update that follows ``step`` counted ones, as EMAModel.get_decay() has it; its rule in words."""
    if step <= 0:
        return 0.0, "it copies the parameters until update_after_step"
    if said.get("use_ema_warmup") is not True:
        return max(_warm(decay, step - 1), smallest), "min_decay"
    gamma, power = real(said, "inv_gamma", 1.0), real(said, "power", 2 / 3)
    if gamma <= 0 or power < 0:
        raise UsageError(f"the file has inv_gamma {gamma:g} and power {power:g}, with which no decay warms up")
    rule = POWER_RULE if gamma == 1.0 else f"1 - (1 + n / {gamma:g})^-p"
    return max(min(1 - (1 + step / gamma) ** -power, decay), smallest), f"{rule} with p = {power:.3g}"


def to_emamodel(info: WeightsInfo) -> dict[str, Any]:
    """The fields of an EMAModel whose next updates have the decays of a run's: of_emamodel() the other way round.

    Of a schedule that EMAModel does not have, the decay of the next update, constant from there on.
    """
    decay, num_updates = info.decay, info.num_updates
    if info.schedule == "inverse_gamma" or (info.schedule == "litema" and info.start is not None and num_updates >= 0):
        return {
            "decay": decay,
            "min_decay": info.min_decay or 0.0,
            "optimization_step": num_updates,
            "update_after_step": info.start or 0,
            "use_ema_warmup": info.schedule == "inverse_gamma",
            "inv_gamma": info.inv_gamma or 1.0,
            "power": info.power or 2 / 3,
        }
    unchanging = info.schedule != "litema" or num_updates < 0
    decay = next_decay(info, decay, num_updates) if unchanging else decay
    return {
        "decay": decay,
        # EMAModel has no constant decay, but a smallest one.
        "min_decay": decay if unchanging else 0.0,
        # With 0 EMAModel would copy the parameters over the average.
        "optimization_step": max(num_updates, 0) + 1,
        "update_after_step": 0,
        "use_ema_warmup": False,
        "inv_gamma": 1.0,
        "power": 2 / 3,
    }


def next_decay(schedule: AverageConfig | WeightsInfo, decay: float, num_updates: int) -> float:
    """The decay of a run's update that follows ``num_updates`` earlier ones; -1 where nothing counts.

    decay: the largest. Raises UsageError for a schedule that is not known here.
    """
    begins = schedule.start
    counted = num_updates if begins is None else num_updates - begins - 1
    if schedule.schedule == "half_life" and schedule.half_life:
        after = float(2.0 ** (-1.0 / schedule.half_life))
    elif schedule.schedule == "power":
        counted = num_updates - (begins or 0)
        if schedule.gamma is None:
            raise UsageError("a power average is given by sigma_rel alone", hint="ask the service, which tells gamma")
        return (counted / (counted + 1)) ** (schedule.gamma + 1) if counted > 0 else 0.0
    elif schedule.schedule == "inverse_gamma":
        counted = num_updates - (begins or 0)
        curve = 1 - (1 + max(counted, 0) / (schedule.inv_gamma or 1.0)) ** -(schedule.power or 2 / 3)
        return max(min(curve, decay), schedule.min_decay or 0.0) if counted > 0 else 0.0
    elif schedule.schedule == "litema" and num_updates >= 0:
        after = _warm(decay, max(counted, 0))
    elif schedule.schedule in ("litema", "constant"):
        after = decay
    else:
        raise UsageError(f"schedule {schedule.schedule!r} is not known to this client", hint="update ema-client")
    return after if begins is None or counted >= 0 else 0.0


def _warm(decay: float, num_updates: int) -> float:
    """LitEma's decay of the update that follows ``num_updates`` earlier ones."""
    return min(decay, (2 + num_updates) / (11 + num_updates))
