"""Models and what a training loop does with them, and LitEma's arithmetic in its own words.

Knows torch. Does not know the service.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ema_client import RetryPolicy

ONCE = RetryPolicy(attempts=1)


class LitEmaOracle:
    """LitEma's arithmetic in process, with float32 scalars; shadows are float32, float64 for float64 parameters.

    Of parameters in bf16 or fp16 the shadow is float32 and the incoming value is cast.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_updates: bool = True) -> None:
        self.decay = torch.tensor(decay, dtype=torch.float32)
        self.num_updates = torch.tensor(0 if use_num_updates else -1, dtype=torch.int)
        self.shadow = {
            name: self._wide(parameter.detach()).clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def __call__(self, model: nn.Module) -> None:
        decay = self.decay
        if self.num_updates >= 0:
            self.num_updates += 1
            decay = torch.minimum(decay, (1 + self.num_updates) / (10 + self.num_updates))
        keep_out = 1.0 - decay
        for name, parameter in model.named_parameters():
            if name in self.shadow:
                shadow = self.shadow[name]
                shadow.sub_(keep_out * (shadow - self._wide(parameter.detach())))

    def reset_num_updates(self) -> None:
        if self.num_updates >= 0:
            self.num_updates = torch.tensor(0, dtype=torch.int)

    @staticmethod
    def _wide(tensor: Tensor) -> Tensor:
        tensor = tensor.cpu()
        return tensor if tensor.dtype == torch.float64 else tensor.float()


class Zoo(nn.Module):
    """Parameters of many shapes: a 0-d one, an empty one, a convolution, an embedding, frozen and tied ones."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(()))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.conv = nn.Conv2d(3, 5, 3)
        self.table = nn.Embedding(301, 7)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(7, 301, bias=False)
        self.head.weight = self.table.weight
        # What LitEma cannot hold: names that are its own, and names that are one without dots.
        self.decay = nn.Parameter(torch.randn(2))
        self.num_updates = nn.Parameter(torch.randn(3))
        self.a = nn.ParameterDict({"bc": torch.randn(2)})
        self.ab = nn.ParameterDict({"c": torch.randn(3)})


def train(model: nn.Module) -> None:
    """Something that moves all trained parameters, as an optimizer step does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: Any, other: Any) -> bool:
    """The same names, dtypes and bits."""
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


class Oops(Exception):
    """What goes wrong in a test on purpose."""


def oops_after(action: Callable[[], object]) -> Oops:
    action()
    return Oops()
