"""The hook ahead of optimizer steps. Knows torch's optimizers only."""

from __future__ import annotations

import torch

from ema_client.training.step_hook import StepHook


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
