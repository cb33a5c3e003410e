"""The hook ahead of optimizer steps. Knows torch's optimizers only."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ema_client.training.step_hook import StepHook, may_change


def test_hook_comes_before_the_step() -> None:
    """``before`` sees the parameters as they were; fired() tells of steps since it was last asked, until removed."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones(1)
    seen: list[float] = []
    hook = StepHook(lambda: seen.append(parameter.item()))
    try:
        assert not hook.fired()
        optimizer.step()
        optimizer.step()
        assert seen == [0.0, -1.0]
        assert hook.fired()
        assert not hook.fired()
    finally:
        hook.remove()
    optimizer.step()

    assert not hook.fired()


class Steps:
    """Optimizers' steps, each by itself or within the capture of a graph, under one hook."""

    def __init__(self) -> None:
        self.calls = 0
        self._is_capturing = False
        self.hook = StepHook(self._count, capturing=lambda: self._is_capturing)

    def _count(self) -> None:
        self.calls += 1

    def step(self, optimizer: torch.optim.Optimizer, *, captured: bool = False) -> None:
        self._is_capturing = captured
        optimizer.step()
        self._is_capturing = False


@pytest.fixture
def steps() -> Iterator[Steps]:
    made = Steps()
    yield made
    made.hook.remove()


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([each for module in modules for each in module.parameters()], lr=0.1)


def parameters(*modules: nn.Module) -> list[torch.Tensor]:
    return [each for module in modules for each in module.parameters()]


def test_captured_step(steps: Steps) -> None:
    """Nothing waits, for that would end the capture, and replays fire no hook, though a step between them does."""
    model = nn.Linear(2, 2)
    optimizer = sgd(model)
    steps.step(optimizer)
    assert steps.hook.fired()
    assert steps.hook.guards(parameters(model))

    steps.step(optimizer, captured=True)
    assert steps.calls == 1
    assert not steps.hook.fired()
    assert not steps.hook.guards(parameters(model))

    steps.step(optimizer)
    assert steps.calls == 2
    assert steps.hook.fired()
    assert not steps.hook.guards(parameters(model))


def test_two_optimizers_of_one_model(steps: Steps) -> None:
    """Where one of them is replayed, the steps of the other guard nothing."""
    model = nn.Linear(2, 2)
    one, other = sgd(model), sgd(model)
    steps.step(one)
    steps.step(other)
    assert steps.hook.guards(parameters(model))
    steps.step(one, captured=True)
    steps.step(other)

    assert not steps.hook.guards(parameters(model))


def test_only_what_an_optimizer_holds_is_guarded(steps: Steps) -> None:
    """Another model's optimizer, or that of half a model, says nothing of parameters that are changed by hand."""
    mine, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert not steps.hook.guards(parameters(mine))
    steps.step(sgd(other))
    both = sgd(mine, other)

    assert not steps.hook.guards(parameters(mine))
    assert not steps.hook.guards(parameters(mine, other))
    steps.step(both)
    assert steps.hook.guards(parameters(mine, other))


def test_one_optimizer_is_replayed_and_another_steps(steps: Steps) -> None:
    """A generator's graph beside a discriminator's steps: each model's parameters are as its own optimizer is."""
    generator, discriminator = nn.Linear(2, 2), nn.Linear(2, 2)
    one, other = sgd(generator), sgd(discriminator)
    steps.step(one)
    steps.step(one, captured=True)
    steps.step(other)

    assert steps.hook.fired()
    assert not steps.hook.guards(parameters(generator))
    assert steps.hook.guards(parameters(discriminator))


def test_optimizers_that_take_turns(steps: Steps) -> None:
    """Once each has stepped, a step of either is enough, however they alternate."""
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizers = sgd(one), sgd(other)
    for turn in range(6):
        steps.step(optimizers[turn % 2])
        assert steps.hook.fired()
        assert steps.hook.guards(parameters(one, other)) == (turn > 0)


def test_an_optimizer_that_is_gone(steps: Steps) -> None:
    """Guards nothing any more, and none is kept alive."""
    model = nn.Linear(2, 2)
    steps.step(sgd(model))
    gc.collect()

    assert not steps.hook.guards(parameters(model))


def test_parameters_that_join_an_optimizer_later(steps: Steps) -> None:
    """Layers that are unfrozen in the middle of a training are held from then on; frozen ones have no step to fear."""
    head, body = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    optimizer = sgd(head)
    steps.step(optimizer)
    assert steps.hook.guards(parameters(head, body))

    body.requires_grad_(True)
    assert not steps.hook.guards(parameters(head, body))
    optimizer.add_param_group({"params": list(body.parameters())})
    assert steps.hook.guards(parameters(head, body))


def test_masters_and_views(steps: Steps) -> None:
    """An optimizer of float32 copies steps for parameters that it does not hold; a view is as good as its parameter."""
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    masters = [each.detach().float().requires_grad_() for each in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=0.1)
    steps.step(optimizer)
    assert steps.hook.guards(parameters(model))
    steps.step(optimizer, captured=True)
    assert not steps.hook.guards(parameters(model))

    whole = nn.Linear(2, 2)
    own = sgd(whole)
    steps.step(own)
    views = [each.detach() for each in whole.parameters()]
    assert steps.hook.guards(views)
    steps.step(own, captured=True)
    assert not steps.hook.guards(views)


def test_whose_tensors_a_step_may_change() -> None:
    """Those that an optimizer holds, or holds memory of; any where it holds copies, which its step writes back."""
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    tensors = parameters(model)
    flat = nn.Parameter(torch.zeros(6))
    view = nn.Parameter(flat.detach()[2:])
    copies = [each.detach().clone() for each in tensors]

    assert may_change(sgd(model, other), tensors)
    assert not may_change(sgd(other), tensors)
    assert may_change(torch.optim.SGD([flat], lr=0.1), [view])
    assert may_change(torch.optim.SGD(copies, lr=0.1), tensors)
    # Without elements nothing is shared.
    assert not may_change(torch.optim.SGD([nn.Parameter(torch.empty(0))], lr=0.1), [torch.empty(0, 3)])
