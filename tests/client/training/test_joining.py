"""Trainers that join a run that is there. Knows RemoteEma and the real service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ema_client import EmaClient, RemoteEma
from ema_client.errors import ConnectionLost, RunNotFound, UsageError
from tests.client.trainers import ONCE, LitEmaOracle, Zoo, same, train, values


def test_resume_goes_on_where_the_run_is(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """A trainer that starts again continues EMA, counter and steps; its own parameters do not replace the EMA."""
    model = Zoo()
    ema, oracle = make_ema(model, 0.9), LitEmaOracle(model, 0.9)
    for _ in range(3):
        train(model)
        ema(model)
        oracle(model)
    ema.close()

    again = make_ema(model, 0.9, resume=True)
    assert same(client.pull(again.run), oracle.shadow)
    train(model)
    again(model)
    oracle(model)

    assert again.num_updates == 4
    assert same(client.pull(again.run), oracle.shadow)
    assert client.run(again.run).step == 4


def test_resume_of_no_run(make_ema: Callable[..., RemoteEma], run_name: str) -> None:
    """resume=True is for a run that exists: a new EMA is not begun unnoticed."""
    with pytest.raises(RunNotFound, match=run_name):
        make_ema(nn.Linear(1, 1), resume=True)


def test_resume_with_another_model(make_ema: Callable[..., RemoteEma]) -> None:
    """A model of another size is refused at once, with both sizes."""
    make_ema(nn.Linear(2, 2))

    with pytest.raises(UsageError, match="2 tensors with 6 elements in all, the model 2 with 12"):
        make_ema(nn.Linear(3, 3), resume=True)


def test_resume_with_another_choice_of_buffers(make_ema: Callable[..., RemoteEma]) -> None:
    """What is copied cannot become averaged, or the other way round; the same choice goes on."""
    model = nn.BatchNorm1d(3)
    copying = make_ema(model, buffers="copy")
    for buffers in ("average", "none"):
        with pytest.raises(UsageError, match="copies 2 of its tensors, this trainer 0"):
            make_ema(model, resume=True, buffers=buffers)
    model(torch.randn(8, 3))
    again = make_ema(model, resume=True, buffers="copy")
    again(model)
    mean = model.running_mean.clone()
    with again.scope(model):
        assert torch.equal(model.running_mean, mean)
    make_ema(model, run=f"{copying.run}-averaging", buffers="average")

    with pytest.raises(UsageError, match="copies 0 of its tensors, this trainer 2: running_mean, running_var"):
        make_ema(model, run=f"{copying.run}-averaging", resume=True, buffers="copy")


def test_resume_with_another_counter(make_ema: Callable[..., RemoteEma]) -> None:
    """Whether the decay warms up cannot be changed by resuming."""
    make_ema(nn.Linear(2, 2), use_num_updates=False)

    with pytest.raises(UsageError, match="use_num_updates=False"):
        make_ema(nn.Linear(2, 2), resume=True)


def test_resume_with_another_decay_warns(make_ema: Callable[..., RemoteEma], client: EmaClient, run_name: str) -> None:
    """The run's decay stands, as in LitEma's state dict, and whoever passes another one is told."""
    model = nn.Linear(2, 2)
    make_ema(model, 0.9)

    with pytest.warns(UserWarning, match=r"decay 0\.9, not 0\.5") as warned:
        again = RemoteEma(model, 0.5, run=run_name, client=client, resume=True)
    assert warned[0].filename == __file__
    with again:
        assert again.decay == pytest.approx(0.9)


def test_resume_of_a_run_that_awaits_weights(
    make_ema: Callable[..., RemoteEma], relay: Callable[..., Any], client: EmaClient, run_name: str
) -> None:
    """A trainer that died between creating the run and sending its weights can be started again either way."""
    model = nn.Linear(2, 2)
    with (
        EmaClient(relay(lambda request: request.method == "POST").url, retry=ONCE) as dying,
        pytest.raises(ConnectionLost),
    ):
        RemoteEma(model, run=run_name, client=dying)
    assert client.run(run_name).status == "awaiting_weights"

    make_ema(model, resume=True)

    assert same(client.pull(run_name), values(model))
