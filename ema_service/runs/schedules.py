"""The schedule of an average, by the average's and the run's configuration.

Knows the fields of RunConfig and AverageConfig, and which schedule each stands for. Does not compute a decay
(averaging.schedules), and knows no run's state.
"""

from __future__ import annotations

from ema_client.protocol import AverageConfig, RunConfig
from ema_service.averaging.schedules import Constant, HalfLife, InverseGamma, LitEma, Power, Schedule, Started
from ema_service.shadows.state import gamma_of_average

__all__ = ["counts", "largest_decay", "schedule_of"]


def schedule_of(run: RunConfig, average: AverageConfig, decay: float) -> Schedule:
    """The schedule of an average whose largest decay is ``decay`` by now."""
    plain = _plain(run, average, decay)
    return plain if average.start is None else Started(plain, average.start)


def _plain(run: RunConfig, average: AverageConfig, decay: float) -> LitEma | Constant | HalfLife | Power | InverseGamma:
    single = average.start is None
    if average.schedule == "half_life" and average.half_life is not None:
        return HalfLife(average.half_life)
    if average.schedule == "power":
        return Power(gamma_of_average(average))
    if average.schedule == "inverse_gamma":
        return InverseGamma(decay, average.inv_gamma or 1.0, average.power or 2 / 3, average.min_decay or 0.0)
    if average.schedule == "litema" and run.use_num_updates:
        return LitEma(decay, single)
    return Constant(decay, single)


def largest_decay(run: RunConfig, average: AverageConfig) -> float:
    """The decay that an average begins with as its largest: of a half-life its only one, of a power average 1."""
    if average.schedule == "power":
        return 1.0
    if average.schedule == "half_life" and average.half_life is not None:
        return float(2.0 ** (-1.0 / average.half_life))
    return run.decay if average.decay is None else average.decay


def counts(run: RunConfig, average: AverageConfig) -> bool:
    """Whether an average has a counter: each has whose schedule needs one, and where the run counts all have."""
    return run.use_num_updates or average.start is not None or average.schedule not in ("litema", "constant")
