"""Two processes train one model by DDP on gloo with the callback; each writes down what it validated with.

Knows Lightning. Run as ``lightning_ddp.py RUN FOLDER``; it starts its second process itself.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ema_client.integrations.lightning import RemoteEmaCallback


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 1)
        self.validated: dict[str, Tensor] = {}

    def copies(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        loss: Tensor = self.net(batch).square().mean()
        return loss

    def validation_step(self, *_: Any) -> None:
        self.validated = self.copies()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(run: str, folder: Path) -> None:
    module = Module()
    data = DataLoader(torch.randn(16, 3, generator=torch.Generator().manual_seed(1)), batch_size=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        enable_checkpointing=False,
        callbacks=[RemoteEmaCallback(0.9, run=run)],
        **quiet,
    )
    trainer.fit(module, data, DataLoader(torch.zeros(2, 3)))
    torch.save({"validated": module.validated, "after": module.copies()}, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
