"""The way of sgm, latent-diffusion and CogView3: the engine holds `model_ema`, and `ema_scope` evaluates with it.

Only the line that makes `model_ema` is another one.

ema-service serve --memory &
python sgm_engine.py my-run
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ema_client import RemoteEma


class DiffusionEngine(LightningModule):
    """As far as its EMA goes, sgm's."""

    def __init__(self, run: str, ema_decay_rate: float = 0.9999) -> None:
        super().__init__()
        self.use_ema = True
        self.model = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 4))
        if self.use_ema:
            self.model_ema = RemoteEma(self.model, decay=ema_decay_rate, run=run)  # LitEma(self.model, decay=...)
            print(f"Keeping EMAs of {len(list(self.model_ema.buffers()))}.")

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        if self.use_ema:
            self.model_ema(self.model)

    @contextlib.contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """EMA weights inside the block."""
        if self.use_ema:
            self.model_ema.store(self.model.parameters())
            self.model_ema.copy_to(self.model)
            if context is not None:
                print(f"{context}: Switched to EMA weights")
        try:
            yield None
        finally:
            if self.use_ema:
                self.model_ema.restore(self.model.parameters())
                if context is not None:
                    print(f"{context}: Restored training weights")

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        noise = torch.randn_like(batch)
        return nn.functional.mse_loss(self.model(batch + noise), noise)

    def validation_step(self, batch: Tensor, _: int) -> None:
        with self.ema_scope("validation"):
            self.log("ema_loss", self.training_step(batch, 0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(self.model.parameters()), lr=1e-3)


def main(run: str) -> None:
    """Train for an epoch and say how far the EMA has come."""
    torch.manual_seed(0)
    engine = DiffusionEngine(run)
    data = DataLoader(torch.randn(64, 4).sign(), batch_size=8)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, num_sanity_val_steps=0, **quiet)
    trainer.fit(engine, data, DataLoader(torch.randn(8, 4).sign(), batch_size=8))
    print(f"num_updates: {engine.model_ema.num_updates}")
    engine.model_ema.close()


if __name__ == "__main__":
    main(sys.argv[1])
