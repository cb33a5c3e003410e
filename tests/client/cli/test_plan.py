"""``ema plan``: its figures against the service's own least squares and thinning, its sums, what it takes and refuses.

Knows the command and the service's pure numerics. Does not know a service: the command asks none.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import typer

from ema_client.cli.plan import FIGURES, Figures, count_of, plan_of
from ema_client.protocol import Posthoc
from ema_service.averaging.profiles import gamma_of
from ema_service.averaging.synthesis import SnapshotBasis, Synthesis, TrackedAverage, approximate
from ema_service.averaging.targets import SigmaRel
from ema_service.averaging.thinning import Ring, forecast

#: Figures are rounded up, to two digits: so much more than the service's may be stated.
ROUNDED = 1.1
#: Larger rings take longer to work out.
TRIED = [pytest.param(each, marks=[pytest.mark.soak] if each.posthoc.snapshots > 16 else []) for each in FIGURES]


def ring_at(posthoc: Posthoc, updates: int) -> tuple[Ring, int]:
    """The ring after so many updates, by the service's rule; and how many snapshots it wrote."""
    ring, written = Ring(posthoc.sigma_rel, posthoc.snapshots, 1), 0
    for n in range(1, updates + 1):
        if ring.due(n):
            ring, written = ring.taken(n), written + 1
        if (surplus := ring.surplus()) is not None:
            ring = ring.dropped(surplus)
    return ring, written


def found(posthoc: Posthoc, updates: int) -> list[Synthesis]:
    """What the service finds for targets over the whole range, from the ring after so many updates."""
    ring, _ = ring_at(posthoc, updates)
    times, counters = tuple(sorted({*ring.times, updates})), np.arange(1, updates + 1)
    decays = [(1.0 - 1.0 / counters) ** (gamma_of(width) + 1.0) for width in posthoc.sigma_rel]
    basis = SnapshotBasis(counters, [TrackedAverage(each, times) for each in decays])
    widths = np.geomspace(0.015, 0.25, 9)
    return [approximate(basis, SigmaRel(width), dtype=posthoc.dtype) for width in widths]


@pytest.mark.parametrize("figures", [each for each in TRIED if each.values[0].posthoc.dtype == "F32"], ids=str)
def test_errors_are_the_forecast(figures: Figures) -> None:
    """The largest error at any length is what the service's forecast says, rounded up."""
    posthoc = figures.posthoc
    worst = forecast(posthoc.sigma_rel, posthoc.snapshots, 2000, 1).at_worst

    assert worst <= figures.error <= ROUNDED * worst


@pytest.mark.parametrize("figures", TRIED, ids=str)
def test_errors_and_rounding_hold(figures: Figures) -> None:
    """Least squares over every update, damped for the dtype, stay within what is stated, and come near it."""
    results = [one for updates in (40, 410, 2300) for one in found(figures.posthoc, updates)]
    error = max(one.error for one in results)
    rounding = max(one.rounding(figures.posthoc.dtype) for one in results)

    assert 0.4 * figures.error <= error <= figures.error
    assert rounding <= figures.rounding


@pytest.mark.parametrize("snapshots", [8, 16, 32])
@pytest.mark.parametrize("updates", [1, 7, 16, 33, 100, 1000, 4096])
def test_what_is_written(snapshots: int, updates: int) -> None:
    """Snapshots over the training, and those on the disk at once, are as many as the service's rule takes."""
    figures = Figures(Posthoc(snapshots), 0.01, 1e-6)
    ring, written = ring_at(figures.posthoc, updates)
    plan = plan_of(figures, 1000, updates)

    assert (plan.snapshots_written, plan.written) == (written, written * 3 * 4 * 1000)
    assert plan.disk == (min(snapshots + 1, written) * 3 + 1) * 4 * 1000
    assert len(ring.times) <= plan.disk // (3 * 4 * 1000)


def test_a_short_training_is_exact() -> None:
    """A ring that is not full yet holds every update: whatever is wished for is there."""
    figures = next(each for each in FIGURES if each.posthoc == Posthoc())

    assert plan_of(figures, 1000, 16).error == 0.0
    assert max(one.error for one in found(figures.posthoc, 16)) < 1e-4
    assert plan_of(figures, 1000, 17).error == figures.error


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ("860M", 860_000_000), ("1.5B", 1_500_000_000), ("1.1b", 1_100_000_000), ("124_000_000", 124_000_000),
        ("400k", 400_000), ("1e6", 1_000_000), ("2G", 2_000_000_000), ("0.5T", 500_000_000_000), ("1", 1),
    ],
)  # fmt: skip
def test_counts(said: str, count: int) -> None:
    """Numbers as people write them."""
    assert count_of(said, "--parameters") == count


@pytest.mark.parametrize("said", ["", "0", "-1", "1.5", "860MB", "many", "1e99", "nan", "9999T", "1,000", "0x10"])
def test_counts_that_are_none(said: str) -> None:
    """What is no count is told with the option's name."""
    with pytest.raises(typer.BadParameter, match="--steps"):
        count_of(said, "--steps")


def ema(*words: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "ema_client", *words, "--url", "http://127.0.0.1:9"][: 3 + len(words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


def test_the_command() -> None:
    """A table in which the default is marked; --json has bytes; mistakes are exit code 2."""
    code, out, err = ema("plan", "--parameters", "860M", "--steps", "1000000")
    default = next(line.split() for line in out.splitlines() if line.strip().startswith("*"))

    assert (code, err) == (0, "")
    assert default[:6] == ["*", "0.015,", "0.03,", "0.25", "16", "F32"]
    assert "0.0083" in default

    rows = json.loads(ema("plan", "--parameters", "1000", "--steps", "1M", "--json")[1])
    marked = [row for row in rows if row["default"]]
    assert len(rows) == len(FIGURES)
    assert [(row["disk"], row["memory"], row["snapshots_written"]) for row in marked] == [(208_000, 24_000, 270)]

    code, out, err = ema("plan", "--parameters", "many", "--steps", "10")
    assert (code, out) == (2, "")
    assert "860M" in err
    assert "any average is exact" in ema("plan", "--parameters", "1K", "--steps", "10")[1]
