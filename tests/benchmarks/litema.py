"""LitEma as latent-diffusion has it, to be timed: a module of buffers with dotless names, one tensor at a time.

Written from its description. Each update looks up every parameter and shadow by name, and takes for each shadow a
conversion, a difference and a product of the tensor's full size, and an in-place subtraction.

Knows torch. Does not know the service.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["LitEma"]


class LitEma(nn.Module):
    """Shadows of the parameters of ``model`` that require gradients; call it with the model for one update."""

    decay: torch.Tensor
    num_updates: torch.Tensor

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        super().__init__()
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0, dtype=torch.int))
        self.shadow_of: dict[str, str] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.shadow_of[name] = name.replace(".", "")
                self.register_buffer(self.shadow_of[name], parameter.detach().clone())

    def forward(self, model: nn.Module) -> None:
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weight = 1.0 - decay
        with torch.no_grad():
            parameters = dict(model.named_parameters())
            shadows = dict(self.named_buffers())
            for name, parameter in parameters.items():
                if parameter.requires_grad:
                    key = self.shadow_of[name]
                    shadows[key] = shadows[key].type_as(parameter)
                    shadows[key].sub_(weight * (shadows[key] - parameter))
