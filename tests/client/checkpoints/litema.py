"""LitEma for tests: its state dict and its numbers. Knows nothing of the client."""

from __future__ import annotations

import torch
from torch import nn


class LitEma(nn.Module):
    """As sgm has it, in words of our own: buffers without dots, a float32 decay, an int counter."""

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_updates: bool = True) -> None:
        super().__init__()
        self.names = {name: name.replace(".", "") for name, p in model.named_parameters() if p.requires_grad}
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_updates else -1, dtype=torch.int))
        parameters = dict(model.named_parameters())
        for name, short in self.names.items():
            self.register_buffer(short, parameters[name].detach().clone())

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        decay = self.decay
        if self.num_updates >= 0:
            self.num_updates += 1
            decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        parameters = dict(model.named_parameters())
        for name, short in self.names.items():
            shadow = getattr(self, short)
            shadow.sub_((1.0 - decay) * (shadow - parameters[name]))
