"""What charts show of a run: decay, counter, distance and lags, as numbers at the trainer's steps.

Knows: which fields of the service's answers are shown, and by which names. Does not know: requests, threads, where the
numbers are shown. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ema_client.protocol import History, RunInfo

__all__ = ["Measured", "behind", "latest", "measurements"]

#: name of a chart -> the column of a history that the chart shows.
_COLUMNS = {
    "ema/decay": "effective_decay",
    "ema/num_updates": "num_updates",
    "ema/distance": "distance",
    "ema/durable_lag": "durable_lag",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """Values of a run by the names of their charts.

    step: the trainer's. time: seconds since 1970-01-01 UTC; two that differ in time alone are equal.
    """

    step: int
    time: float = field(compare=False)
    values: dict[str, float]


def measurements(history: History) -> Iterator[Measured]:
    """A Measured for each measurement of a history; what was not measured is left out."""
    columns = history.columns
    for place, (step, time) in enumerate(zip(columns.step, columns.time, strict=True)):
        found = {name: getattr(columns, column)[place] for name, column in _COLUMNS.items()}
        values = {name: float(value) for name, value in found.items() if value is not None}
        if step is not None and values:
            yield Measured(step, time, values)


def latest(info: RunInfo) -> Measured | None:
    """The run as it stands, without the distance, which only some updates have measured; None before any update."""
    if info.step is None or info.effective_decay is None:
        return None
    values = {"ema/decay": info.effective_decay, "ema/num_updates": float(info.num_updates)}
    if info.durable_step is not None:
        values["ema/durable_lag"] = float(info.step - info.durable_step)
    return Measured(info.step, info.updated_at, values)


def behind(info: RunInfo, step: int, time: float) -> Measured:
    """How many of the trainer's steps, of which ``step`` is the latest, are not applied yet."""
    return Measured(step, time, {"ema/lag": float(max(0, step - (info.step or 0)))})
