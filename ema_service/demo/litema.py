"""LitEma's arithmetic, in process: the service's numbers are compared with it, bit for bit.

Every scalar is a float32 tensor, as the buffers of LitEma are, and subtract, multiply, subtract are three operations.

Knows torch. Does not know the service, on purpose: it is the independent witness.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class InProcessEma:
    """An EMA of a model's trainable parameters, float32. ``shadow`` maps dotted names to averaged tensors."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = torch.tensor(decay, dtype=torch.float32)
        self.num_updates = torch.tensor(0, dtype=torch.int32)
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def __call__(self, model: nn.Module) -> None:
        """Average the model's parameters as they are now: one update."""
        self.update(dict(model.named_parameters()))

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Average these parameters: one update."""
        self.num_updates += 1
        decay = torch.minimum(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weight = 1.0 - decay
        for name, shadow in self.shadow.items():
            shadow -= weight * (shadow - parameters[name])
