"""Averages added and removed through the client, while a trainer goes on.

Knows the real service and LitEma's arithmetic. Does not know what travels.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from ema_client import AverageConfig, EmaClient, RemoteEma
from ema_client.errors import (
    AverageExists,
    AverageNotFound,
    AwaitingWeights,
    InvalidDecay,
    LastAverage,
    TooManyAverages,
    UsageError,
)
from ema_client.reading.events import differences
from ema_client.schedules import average_of, constant, half_life, inverse_gamma, litema, power

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle

STATE = {"w": torch.arange(3.0)}


@pytest.fixture
def run(client: EmaClient, run_name: str) -> str:
    client.create_run(run_name, STATE, decay=0.5)
    client.push(run_name, STATE, step=1)
    return run_name


@pytest.mark.parametrize(
    ("given", "decay", "asked"),
    [
        (None, None, AverageConfig("late")),
        (None, 0.25, AverageConfig("late", decay=0.25)),
        (litema(name="other"), 0.25, AverageConfig("late", decay=0.25)),
        (constant(0.75), None, AverageConfig("late", "constant", 0.75)),
        (inverse_gamma(), 0.9, average_of("late", inverse_gamma(0.9))),
        (power(0.1, start=3), None, AverageConfig("late", "power", sigma_rel=0.1, start=3)),
    ],
)
def test_what_is_asked_for(given: AverageConfig | None, decay: float | None, asked: AverageConfig) -> None:
    """The schedule under the name, with the decay where the schedule takes one and has none."""
    assert average_of("late", given, decay) == asked


def test_add_and_remove(client: EmaClient, run: str) -> None:
    """An average has no weights, then the parameters of the next update; removed it is gone, and snapshots keep it."""
    info = client.add_average(run, "long", power(0.1))
    assert [(each.name, each.schedule) for each in info.averages] == [("ema", "litema"), ("long", "power")]
    assert client.add_average(run, "long", power(0.1)).averages == info.averages
    with pytest.raises(AwaitingWeights, match=r"'long'.*before the next update"):
        client.pull(run, average="long")
    client.push(run, {"w": STATE["w"] + 1})
    assert torch.equal(client.pull(run, average="long")["w"], STATE["w"] + 1)
    client.snapshot(run, "s")
    client.remove_average(run, "long")
    with pytest.raises(AverageNotFound):
        client.pull(run, average="long")
    kept = client.pull(run, average="long", snapshot="s")
    assert torch.equal(kept["w"], STATE["w"] + 1)
    assert kept.info.schedule == "power"


def test_refusals(client: EmaClient, run: str) -> None:
    """Each by its class; what the client sees itself is not sent."""
    client.add_average(run, "short", half_life(10))
    with pytest.raises(AverageExists, match="'short'"):
        client.add_average(run, "short", half_life(20))
    with pytest.raises(AverageNotFound):
        client.remove_average(run, "none")
    with pytest.raises(LastAverage):
        client.remove_average(run, "ema")
    for number in range(14):
        client.add_average(run, f"a{number}", decay=number / 20)
    with pytest.raises(TooManyAverages):
        client.add_average(run, "another")
    with pytest.raises(UsageError, match="give the decay once"):
        client.add_average(run, "x", constant(0.5), decay=0.25)
    with pytest.raises(UsageError, match="has no meaning for schedule 'power'"):
        client.add_average(run, "x", power(0.1), decay=0.25)
    with pytest.raises(InvalidDecay):
        client.add_average(run, "x", decay=1.5)
    with pytest.raises(UsageError, match="'a/b' cannot name an average"):
        client.add_average(run, "a/b")
    with pytest.raises(UsageError, match="cannot name an average"):
        client.remove_average(run, "..")


def test_a_trainer_goes_on(client: EmaClient, run_name: str, litema: type[LitEmaOracle]) -> None:
    """While a RemoteEma trains, averages come and go; the late one is a LitEma made in the middle, and each reader has
    what it asks for."""
    model = nn.Linear(2, 2)

    def step() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))

    def parameters() -> dict[str, Any]:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    with RemoteEma(model, 0.9, run=run_name, client=client, on_busy="block") as ema:
        first, late = litema(parameters(), 0.9), None
        for number in range(1, 31):
            step()
            ema(model)
            first.update(parameters())
            if late:
                late.update(parameters())
            if number == 10:
                ema.flush()
                client.add_average(run_name, "late", decay=0.5)
            if number == 11:
                late = litema(parameters(), 0.5)
            if number == 20:
                ema.flush()
                assert all(torch.equal(value, first.shadow[name]) for name, value in client.pull(run_name).items())
                client.remove_average(run_name, "ema")
        ema.flush()
        ema.copy_to(model)
    assert late
    assert all(torch.equal(value, late.shadow[name]) for name, value in parameters().items())


def test_going_on_without_an_average(client: EmaClient, run_name: str) -> None:
    """Who goes on with a run and means an average that the run has no longer is told."""
    model = nn.Linear(2, 2)
    with RemoteEma(model, 0.9, run=run_name, client=client) as ema:
        client.add_average(run_name, "long", power(0.1))
        ema(model)
        ema.flush()
    client.remove_average(run_name, "ema")
    with pytest.warns(UserWarning, match="has no average 'ema'"):
        RemoteEma(model, 0.9, run=run_name, client=client, resume=True).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RemoteEma(model, run=run_name, client=client, schedule=power(0.1, name="long"), resume=True).close()
    client.create_run(run_name, model, decay=0.9, exist_ok=True)


def test_what_a_poll_tells(client: EmaClient, run: str) -> None:
    """Where no events come through, averages that came and went are found by comparing two answers."""
    before = client.run(run)
    client.add_average(run, "fast", constant(0.5))
    between = client.run(run)
    client.push(run, STATE)
    client.set_decay(run, 0.25, average="fast")
    client.remove_average(run, "ema")
    after = client.run(run)

    assert [(each.kind, each.average, each.decay) for each in differences(before, between)] == [
        ("average_added", "fast", 0.5)
    ]
    assert [(each.kind, each.average, each.decay) for each in differences(between, after)] == [
        ("version", "fast", 0.25),
        ("average_removed", "ema", 0.5),
        ("decay_changed", "fast", 0.25),
    ]


def test_watching(client: EmaClient, run: str) -> None:
    """The kinds can be asked for."""
    watch = client.watch(run, kinds=["version", "average_added", "average_removed"], timeout=30)
    assert next(watch).kind == "version"
    client.add_average(run, "fast")
    added = next(watch)
    client.push(run, STATE)
    assert next(watch).kind == "version"
    client.remove_average(run, "ema")
    removed = next(watch)
    assert [(each.kind, each.average) for each in (added, removed)] == [
        ("average_added", "fast"),
        ("average_removed", "ema"),
    ]
    watch.close()  # type: ignore[attr-defined]
