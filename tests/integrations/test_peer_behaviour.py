"""What the peers' own tests expect of an EMA, of a RemoteEma: each beside the peer itself, where the peer is installed.

Knows torch_ema, torch's AveragedModel, diffusers' EMAModel. Does not know schedules (test_peer_schedules.py) or how a
training moves over (test_moving_over.py).
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ema_client import RemoteEma
from ema_client.errors import InvalidRequest
from ema_client.schedules import constant, litema

if TYPE_CHECKING:
    from ema_client import EmaClient


def filled(value: float) -> nn.Linear:
    """A layer of two weights, all of one value."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def drift(model: nn.Module) -> None:
    """Moves all parameters and, as a forward pass does, all floating-point buffers."""
    with torch.no_grad():
        for each in (*model.parameters(), *model.buffers()):
            each.add_(torch.randn_like(each) if each.is_floating_point() else 1)


@pytest.fixture
def make(client: EmaClient, run_name: str) -> Callable[..., RemoteEma]:
    """RemoteEmas of runs of their own, closed with the client."""
    made: list[str] = []

    def make(model: nn.Module, *args: Any, **options: Any) -> RemoteEma:
        made.append(f"{run_name}-{len(made)}")
        return RemoteEma(model, *args, run=made[-1], client=client, **options)

    return make


@pytest.mark.parametrize("use_num_updates", [True, False])
def test_evaluated_as_torch_ema(make: Callable[..., RemoteEma], use_num_updates: bool) -> None:
    """The loss over the averages of a training, the context around it, and the weights after it are torch_ema's."""
    torch_ema = pytest.importorskip("torch_ema", reason="torch_ema is not installed: pip install -e '.[integrations]'")
    torch.manual_seed(0)
    batch, labels = torch.rand(100, 10), torch.rand(100).round().long()
    model = nn.Linear(10, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    theirs = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.9, use_num_updates=use_num_updates)
    ours = make(model, 0.9, use_num_updates)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(batch), labels)

    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        theirs.update()
        ours(model)
    before, trained = float(loss().detach()), copy.deepcopy(model.state_dict())
    with theirs.average_parameters(), torch.no_grad():
        expected = float(loss())
    with ours.scope(model), torch.no_grad():
        found = float(loss())
    assert found == pytest.approx(expected, abs=1e-6)
    assert found != before
    assert all(torch.equal(trained[name], tensor) for name, tensor in model.state_dict().items())


def test_updated_by_another_model(make: Callable[..., RemoteEma]) -> None:
    """The averages of one model take in the parameters of another one of its kind, and go into either."""
    model, other = filled(0.0), filled(1.0)
    ema = make(model, 0.9, False)
    ema(other)
    ema.copy_to(model)
    assert torch.allclose(model.weight, torch.tensor(0.1))
    assert torch.equal(other.weight, filled(1.0).weight)


def test_a_state_for_another_model(make: Callable[..., RemoteEma]) -> None:
    """A state goes into the EMA of another model, with its decay; not where a warm-up would begin anew."""
    ema = make(filled(0.0), 0.995, False)
    state = ema.state_dict()
    other, model = make(filled(3.0), 0.0, False), filled(1.0)
    other.load_state_dict(state, branch=True)
    other(model)
    other.copy_to(model)
    assert other.decay == pytest.approx(0.995)
    assert torch.allclose(model.weight, torch.tensor(0.005))
    with pytest.raises(InvalidRequest, match="a counter that begins anew would wash the average out"):
        make(filled(0.0), 0.9, True).load_state_dict(state, branch=True)


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_averaged_as_averaged_model(make: Callable[..., RemoteEma], buffers: Any) -> None:
    """Parameters and floating-point buffers are AveragedModel's, with use_buffers and without; a pickle holds both."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5, momentum=0.3), nn.Linear(5, 10))
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=buffers == "average")
    ours = make(model, schedule=constant(0.9, start=0), buffers=buffers)
    for _ in range(10):
        drift(model)
        theirs.update_parameters(model)
        ours(model)
    ours.copy_to(averaged := copy.deepcopy(model))
    for name, tensor in theirs.module.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(averaged.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert pickle.dumps(ours)


@pytest.mark.parametrize(("every", "expected"), [(1, 4.0625), (2, 3.5)])
def test_averaged_every_so_often(make: Callable[..., RemoteEma], every: int, expected: float) -> None:
    """Four steps from 1 to 5, halfway each time: what ignite's EMAHandler has with ITERATION_COMPLETED(every=...)."""
    model = filled(1.0)
    ema = make(model, 0.5, False, update_every=every)
    for _ in range(4):
        with torch.no_grad():
            model.weight.add_(1)
        ema(model)
    ema.copy_to(averaged := filled(0.0))
    assert averaged.weight.tolist() == [[expected, expected]]
    assert model.weight.tolist() == [[5.0, 5.0]]


def test_counted_as_emamodel(make: Callable[..., RemoteEma]) -> None:
    """Steps are counted as optimization_step, and averages of a model that does not move do not move."""
    training_utils = pytest.importorskip("diffusers.training_utils", reason="diffusers is not installed")
    model = nn.Linear(3, 3)
    theirs = training_utils.EMAModel(model.parameters(), decay=0.9999)
    ours = make(model, 0.9999, schedule=litema(start=0))
    for _ in range(3):
        theirs.step(model.parameters())
        ours(model)
    assert ours.step == theirs.optimization_step == 3
    before = copy.deepcopy(model.state_dict())
    ours.copy_to(model)
    assert all(torch.allclose(before[name], tensor) for name, tensor in model.state_dict().items())
