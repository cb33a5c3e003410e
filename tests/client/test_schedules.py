"""The functions that make schedules: what they ask for, and which mistakes they find before anything is sent.

Knows AverageConfig. Does not know how a decay is computed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ema_client import AverageConfig, EmaClient, RemoteEma
from ema_client.errors import InvalidRequest, UsageError
from ema_client.schedules import constant, half_life, inverse_gamma, litema, of_run_fraction, power, uniform


@pytest.mark.parametrize(
    ("made", "asked"),
    [
        (litema(), AverageConfig()),
        (litema(0.9, start=3, name="slow"), AverageConfig("slow", "litema", 0.9, start=3)),
        (constant(0.5), AverageConfig(schedule="constant", decay=0.5)),
        (half_life(500), AverageConfig(schedule="half_life", half_life=500)),
        (power(0.1), AverageConfig(schedule="power", sigma_rel=0.1)),
        (power(gamma=6.9), AverageConfig(schedule="power", gamma=6.9)),
        (uniform(start=10), AverageConfig(schedule="power", gamma=0.0, start=10)),
        (of_run_fraction(0.05), AverageConfig(schedule="power", gamma=math.log(2) / 0.05 - 1)),
        (
            inverse_gamma(0.99, power=0.75),
            AverageConfig(schedule="inverse_gamma", decay=0.99, inv_gamma=1.0, power=0.75, min_decay=0.0),
        ),
    ],
)
def test_what_is_asked_for(made: AverageConfig, asked: AverageConfig) -> None:
    """Each function gives the average that a RunConfig would have."""
    assert made == asked
    assert made.fault is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: half_life(0), "half_life"),
        (lambda: half_life(math.nan), "half_life"),
        (lambda: power(), "one of the two"),
        (lambda: power(0.1, gamma=7.0), "one of the two"),
        (lambda: power(0.28868), "too large"),
        (lambda: power(0.3), "sigma_rel"),
        (lambda: power(gamma=-0.1), "gamma"),
        (lambda: of_run_fraction(0.0), "fraction"),
        (lambda: of_run_fraction(0.8), "fraction"),
        (lambda: constant(1.5), "decay"),
        (lambda: litema(start=-1), "start"),
        (lambda: litema(start=True), "start"),
        (lambda: inverse_gamma(power=0.0), "power"),
        (lambda: inverse_gamma(0.5, min_decay=0.9), "min_decay"),
        (lambda: litema(name="a/b"), "name"),
    ],
)
def test_mistakes_are_named(make: Callable[[], AverageConfig], says: str) -> None:
    """A value that no schedule can have is a UsageError with its field, where the schedule is made."""
    with pytest.raises(UsageError, match=says):
        make()


def test_one_or_several(client: EmaClient, run_name: str) -> None:
    """A schedule and averages exclude each other; nothing was sent then."""
    model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="both a schedule and averages"):
        RemoteEma(model, run=run_name, client=client, schedule=litema(), averages=[litema()])
    with pytest.raises(UsageError, match="both a schedule and averages"):
        client.create_run(run_name, model, schedule=litema(), averages=[litema()])
    assert run_name not in {info.run for info in client.runs()}


def test_an_average_by_its_schedule(client: EmaClient, run_name: str) -> None:
    """The run of a RemoteEma has the schedule that was given, with the RemoteEma's decay."""
    model = nn.Linear(2, 2)
    with RemoteEma(model, 0.75, run=run_name, client=client, schedule=inverse_gamma(power=0.5)) as ema:
        for _ in range(3):
            with torch.no_grad():
                model.weight.add_(1.0)
            ema(model)
        ema.flush()
    [told] = client.run(run_name).averages

    assert (told.schedule, told.decay, told.power, told.num_updates) == ("inverse_gamma", 0.75, 0.5, 3)
    assert told.effective_decay == 1 - (1 + 2) ** -0.5


def test_going_on_with_a_schedule(client: EmaClient, run_name: str) -> None:
    """A run is gone on with silently by who asks for what it has; who asks for another schedule is told what stays."""
    model = nn.Linear(2, 2)
    RemoteEma(model, run=run_name, client=client, schedule=power(0.1)).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RemoteEma(model, run=run_name, client=client, schedule=power(0.1), resume=True).close()
    for other in (None, power(0.2), power(0.1, start=3), half_life(5)):
        with pytest.warns(UserWarning, match="goes on with schedule 'power'"):
            RemoteEma(model, run=run_name, client=client, schedule=other, resume=True).close()
    with pytest.raises(InvalidRequest, match="takes no decay"):
        client.set_decay(run_name, 0.5)
