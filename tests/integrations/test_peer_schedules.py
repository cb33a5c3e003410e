"""The schedules of other programs, by the programs themselves: each trained beside a run that has its schedule.

Knows diffusers, torch_ema, ema-pytorch and torch's AveragedModel. Does not know how the service computes a decay.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from ema_client import RemoteEma
from ema_client.schedules import constant, inverse_gamma, litema, of_run_fraction, uniform

if TYPE_CHECKING:
    from ema_client import AverageConfig, EmaClient

UPDATES = 40
#: By name: the schedule, and the arguments of diffusers' EMAModel that mean the same.
EMAMODELS: dict[str, tuple[AverageConfig, dict[str, Any]]] = {
    "no warm-up": (litema(0.9999, start=0), {}),
    "no warm-up, low": (litema(0.5, start=0), {"decay": 0.5}),
    "no warm-up, late": (litema(0.9999, start=7), {"update_after_step": 7}),
    "warm-up": (inverse_gamma(0.9999), {"use_ema_warmup": True}),
    "warm-up, late": (inverse_gamma(0.9999, start=7), {"use_ema_warmup": True, "update_after_step": 7}),
    "warm-up, slow": (
        inverse_gamma(0.999, inv_gamma=20.0, power=0.75),
        {"use_ema_warmup": True, "inv_gamma": 20.0, "power": 0.75, "decay": 0.999},
    ),
    "warm-up, clipped": (
        inverse_gamma(0.8, min_decay=0.6),
        {"use_ema_warmup": True, "min_decay": 0.6, "decay": 0.8},
    ),
}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 20))


def training(model: nn.Module) -> Iterator[int]:
    """Real updates of the model, far enough apart that averages differ."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    for step in range(UPDATES):
        optimizer.zero_grad()
        model(torch.randn(16, 30)).square().mean().backward()
        optimizer.step()
        yield step


def averaged(client: EmaClient, run: str, model: nn.Module) -> dict[str, Tensor]:
    weights = client.pull(run)
    return {name: weights[name] for name, _ in model.named_parameters()}


#: Those whose warm-up alone differs from another's wait for `make soak`.
SOON = {"no warm-up, late", "warm-up, late", "warm-up, slow", "warm-up, clipped"}
NAMES = [pytest.param(name, marks=[] if name in SOON else [pytest.mark.soak]) for name in EMAMODELS]


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_to_the_bit(name: str, model: nn.Module, client: EmaClient, run_name: str) -> None:
    """EMAModel, with and without its warm-up, with update_after_step: bit for bit at every update."""
    from diffusers.training_utils import EMAModel

    schedule, options = EMAMODELS[name]
    theirs = EMAModel(model.parameters(), **options)
    with RemoteEma(model, run=run_name, client=client, schedule=schedule) as ours:
        for _ in training(model):
            theirs.step(model.parameters())
            ours(model)
            shadows = averaged(client, run_name, model) if ours.flush() is None else {}
            for (key, mine), shadow in zip(shadows.items(), theirs.shadow_params, strict=True):
                assert torch.equal(mine, shadow), key
        assert client.run(run_name).effective_decay == theirs.cur_decay_value


def test_torch_ema_to_the_bit(model: nn.Module, client: EmaClient, run_name: str) -> None:
    """torch_ema computes LitEma's decay in float64, which float32 shadows do not tell apart from LitEma's own."""
    from torch_ema import ExponentialMovingAverage

    theirs = ExponentialMovingAverage(model.parameters(), decay=0.75)
    with RemoteEma(model, run=run_name, client=client, schedule=constant(0.75)) as ours:
        theirs.num_updates = None
        for _ in training(model):
            theirs.update()
            ours(model)
        ours.flush()
        for mine, shadow in zip(averaged(client, run_name, model).values(), theirs.shadow_params, strict=True):
            assert torch.equal(mine, shadow)


@pytest.mark.parametrize("options", [{}, {"inv_gamma": 5.0, "power": 0.9}, {"beta": 0.7, "min_value": 0.3}])
@pytest.mark.parametrize("after", [0, 6])
def test_ema_pytorch(options: dict[str, float], after: int, model: nn.Module, client: EmaClient, run_name: str) -> None:
    """ema-pytorch's EMA, whose update_after_step is ours: within the rounding of its lerp_()."""
    from ema_pytorch import EMA

    theirs = EMA(model, update_after_step=after, update_every=1, **options)
    schedule = inverse_gamma(
        options.get("beta", 0.9999),
        inv_gamma=options.get("inv_gamma", 1.0),
        power=options.get("power", 2 / 3),
        min_decay=options.get("min_value", 0.0),
        start=after,
    )
    with RemoteEma(model, run=run_name, client=client, schedule=schedule) as ours:
        for _ in training(model):
            theirs.update()
            ours(model)
        ours.flush()
        found = averaged(client, run_name, model)
    for name, shadow in theirs.ema_model.named_parameters():
        torch.testing.assert_close(found[name], shadow.detach(), atol=2e-6, rtol=0)


def test_mean_of_all_updates(model: nn.Module, client: EmaClient, run_name: str) -> None:
    """uniform() is torch's AveragedModel as it comes: stochastic weight averaging."""
    theirs = torch.optim.swa_utils.AveragedModel(model)
    with RemoteEma(model, run=run_name, client=client, schedule=uniform()) as ours:
        for _ in training(model):
            theirs.update_parameters(model)
            ours(model)
        ours.flush()
        found = averaged(client, run_name, model)
    for name, shadow in theirs.module.named_parameters():
        torch.testing.assert_close(found[name], shadow.detach(), atol=2e-6, rtol=0)


def test_half_life_as_a_fraction_of_the_run(model: nn.Module, client: EmaClient, run_name: str) -> None:
    """The latest tenth of a training weighs as much as all before it."""
    updates = []
    with RemoteEma(model, run=run_name, client=client, schedule=of_run_fraction(0.1)) as ours:
        for _ in training(model):
            ours(model)
            updates.append(copy.deepcopy(model.state_dict()))
        ours.flush()
        info = client.run(run_name).averages[0]
        found = averaged(client, run_name, model)
    gamma = info.gamma or 0.0
    weights = [(n ** (gamma + 1) - (n - 1) ** (gamma + 1)) / UPDATES ** (gamma + 1) for n in range(1, UPDATES + 1)]

    assert (1 - 0.1) ** (gamma + 1) == pytest.approx(0.5, abs=0.02)
    for name in found:
        expected = sum(weight * state[name].double() for weight, state in zip(weights, updates, strict=True))
        torch.testing.assert_close(found[name].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("every", [2, 5])
@pytest.mark.parametrize("after", [0, 9])
def test_update_every_as_ema_pytorch_means_it(
    every: int, after: int, model: nn.Module, client: EmaClient, run_name: str
) -> None:
    """EMA counts all steps but averages every k-th with the decay of one; decay_per="step" makes good for the rest."""
    from ema_pytorch import EMA

    theirs = EMA(model, beta=0.9, update_after_step=after, update_every=every)
    exact: dict[str, Tensor] = {}
    with RemoteEma(
        model, run=run_name, client=client, schedule=constant(0.9), update_every=every, decay_per="step"
    ) as ours:
        for name, parameter in model.named_parameters():
            exact[name] = parameter.detach().double()
        for step in training(model):
            theirs.update()
            ours(model)
            if (step + 1) % every == 0:
                for name, parameter in model.named_parameters():
                    exact[name] += (1 - 0.9**every) * (parameter.detach().double() - exact[name])
        ours.flush()
        found = averaged(client, run_name, model)
    for name, value in exact.items():
        torch.testing.assert_close(found[name].double(), value, atol=2e-6, rtol=0)
