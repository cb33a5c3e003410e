"""Lightning: the callback keeps the EMA on the service and validates with it. Nothing else of the training changes.

ema-service serve --memory &
python lightning_callback.py my-run
"""

from __future__ import annotations

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ema_client.integrations.lightning import RemoteEmaCallback


class Regression(LightningModule):
    """A model like any other: it knows nothing of an EMA."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs), targets)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        inputs, targets = batch
        self.log("loss", nn.functional.mse_loss(self.net(inputs), targets))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main(run: str) -> None:
    """Train for two epochs, and say what was validated."""
    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    data = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=16)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RemoteEmaCallback(0.99, run=run)],
    )
    trainer.fit(Regression(), data, data)
    print(f"validation loss of the EMA: {float(trainer.callback_metrics['loss']):.4f}")


if __name__ == "__main__":
    main(sys.argv[1])
