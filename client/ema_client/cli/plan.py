"""``ema plan``: what a ring of snapshots costs and how exact it makes averages of any length, before any training.

Asks no service. Knows: the errors that the service's rings reach, as a table (FIGURES), and what a ring stores. Does
not know: how those errors come about; a test works them out anew with the service's own code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated

import typer

from ema_client.cli import show
from ema_client.cli.answers import Answer, Table
from ema_client.protocol import LAYOUT_DTYPES, Posthoc

__all__ = ["FIGURES", "Figures", "Plan", "count_of", "plan", "plan_of"]

#: A shadow's element is float32, whatever dtype snapshots have, and each shadow stands beside its next version.
_SHADOW_BYTES, _VERSIONS = 4, 2
_WIDE, _MIDDLE = (0.015, 0.03, 0.25), (0.015, 0.03, 0.1, 0.25)
_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:e\d{1,2})?)([KMGBT]?)\Z", re.IGNORECASE)
#: More parameters, or steps, than there are.
_MOST = 10**15


@dataclass(frozen=True, slots=True)
class Figures:
    """How exactly a ring gives averages with a sigma_rel from 0.015 to 0.25, wherever the training ends.

    error: the largest |found profile - wished| / |wished|. rounding: the largest error that storing in the dtype adds,
    relative to the size of the parameters.
    """

    posthoc: Posthoc
    error: float
    rounding: float


#: Errors hold from the ring's first full time on. Before, every update is in the ring.
FIGURES = (
    Figures(Posthoc(32, "F32", (0.015, 0.25)), 0.034, 3e-6),
    Figures(Posthoc(8, "F32", _WIDE), 0.047, 3e-6),
    Figures(Posthoc(16, "F32", _WIDE), 0.0083, 3e-6),
    Figures(Posthoc(16, "F16", _WIDE), 0.0083, 1e-3),
    Figures(Posthoc(16, "BF16", _WIDE), 0.024, 6e-3),
    Figures(Posthoc(32, "F32", _WIDE), 0.0027, 3e-6),
    Figures(Posthoc(32, "F16", _WIDE), 0.003, 1e-3),
    Figures(Posthoc(32, "BF16", _WIDE), 0.024, 6e-3),
    Figures(Posthoc(16, "F32", _MIDDLE), 0.0013, 3e-6),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a ring costs a model of so many parameters in a training of so many steps. All sizes in bytes.

    disk: of the ring, at its most. checkpoints: on disk, of its averages. memory: on the server, of its averages.
    snapshots_written, written: over the whole training. error, rounding: as in Figures. default: of ``posthoc=True``.
    """

    sigma_rel: tuple[float, ...]
    snapshots: int
    dtype: str
    disk: int
    checkpoints: int
    memory: int
    snapshots_written: int
    written: int
    error: float
    rounding: float
    default: bool


def plan(
    parameters: Annotated[
        str, typer.Option(help="Parameters that are averaged: 860M, 1.5B, 124_000_000.", show_default=False)
    ],
    steps: Annotated[str, typer.Option(help="Updates of the training: 1000000, 400K.", show_default=False)],
) -> Answer:
    """What it costs to choose the length of the EMA after the training, and how exact that is. Asks no service.

    Each row is a posthoc= of create_run() and RemoteEma: power averages that are tracked from the beginning, and a ring
    of their snapshots, which is thinned as the training goes on.
    """
    count, updates = count_of(parameters, "--parameters"), count_of(steps, "--steps")
    plans = [plan_of(figures, count, updates) for figures in FIGURES]
    table = Table(("", "sigma_rel", "snapshots", "dtype", "disk", "memory", "written", "worst error", "rounding"))
    for each in plans:
        table.add(*_row(each))
    longest = max(each.snapshots for each in plans)
    whole = f"A ring of {longest} snapshots holds each of {updates} updates: any average is exact."
    return Answer(plans, (table, *_NOTES, *((whole,) if longest >= updates else ())))


_NOTES = (
    "* posthoc=True; all beside what the run takes without it.",
    "disk: the ring at its most, and two checkpoints of its averages. memory: of its averages, and of their next "
    "version, on the server. written: snapshots over the whole training, and their bytes.",
    "worst error: of the profile, relative to the wished one, for any sigma_rel from 0.015 to 0.25 and wherever the "
    "training ends; those that are tracked are exact. rounding: what the dtype adds at the most, relative to the size "
    "of the parameters. F16 holds nothing above 65504, and rounds what is below 6e-5 more coarsely.",
)


def plan_of(figures: Figures, parameters: int, steps: int) -> Plan:
    """What the ring of these figures costs."""
    posthoc = figures.posthoc
    averages, shadow = len(posthoc.sigma_rel), _SHADOW_BYTES * parameters
    one = averages * LAYOUT_DTYPES[posthoc.dtype] * parameters
    written = _written(posthoc.snapshots, steps)
    return Plan(
        sigma_rel=posthoc.sigma_rel,
        snapshots=posthoc.snapshots,
        dtype=posthoc.dtype,
        # One more snapshot while another is dropped, and the weights that the run began with, once for all averages.
        disk=min(posthoc.snapshots + 1, written) * one + one // averages,
        checkpoints=_VERSIONS * averages * shadow,
        memory=_VERSIONS * averages * shadow,
        snapshots_written=written,
        written=written * one,
        error=figures.error if steps > posthoc.snapshots else 0.0,
        rounding=figures.rounding,
        default=posthoc == Posthoc(),
    )


def _written(snapshots: int, steps: int) -> int:
    """How many snapshots a ring writes: at each update first; the interval doubles at each 2 * snapshots intervals."""
    written, interval, done = 0, 1, 0
    while done < steps:
        end = min(2 * snapshots * interval, steps)
        written += end // interval - done // interval
        done, interval = end, 2 * interval
    return written


def _row(each: Plan) -> tuple[str, ...]:
    return (
        "*" if each.default else "",
        ", ".join(f"{width:g}" for width in each.sigma_rel),
        str(each.snapshots),
        each.dtype,
        show.size(each.disk + each.checkpoints),
        show.size(each.memory),
        f"{each.snapshots_written} ({show.size(each.written)})",
        f"{each.error:.2g}",
        f"{each.rounding:.0e}",
    )


def count_of(said: str, option: str) -> int:
    """The number that ``860M``, ``1.5B`` or ``124_000_000`` means. Raises BadParameter naming ``option``."""
    match = _COUNT.match(said.strip())
    number = Decimal(match[1].replace("_", "")) * _SUFFIXES[match[2].upper()] if match else Decimal(0)
    if not 1 <= number <= _MOST or number % 1:
        raise typer.BadParameter(f"{option}: {said!r} is no whole number above 0, such as 860M, 1.5B or 124_000_000")
    return int(number)
