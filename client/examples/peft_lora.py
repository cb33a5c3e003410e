"""LoRA by peft: the EMA is of the adapter alone, as only that is trained, and so is what travels.

ema-service serve --memory &
python peft_lora.py my-run
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ema_client import EmaClient, RemoteEma


def adapted() -> PeftModel:
    """A base model, the same each time, with a new adapter."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    return get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"]))


def main(run: str) -> None:
    """Train an adapter; then, as an evaluator elsewhere would, give a fresh model the adapter's EMA."""
    model = adapted()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    with RemoteEma(model, decay=0.99, run=run) as ema:
        for _ in range(10):
            loss = model(torch.randn(16, 64)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema(model)

    with EmaClient() as client:
        evaluated = adapted()
        client.copy_to(run, evaluated)
        info = client.run(run)
        whole = sum(parameter.numel() for parameter in evaluated.parameters())
        print(f"averaged: {info.parameters} of {whole} parameters, in {info.tensors} tensors")


if __name__ == "__main__":
    main(sys.argv[1])
