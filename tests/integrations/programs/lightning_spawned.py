"""Lightning spawns two processes that train an engine with a RemoteEma from its constructor (``ddp_spawn``).

Knows Lightning. Run as ``lightning_spawned.py SCENES.json`` in one process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ema_client import RemoteEma


class Engine(LightningModule):
    """As sgm's DiffusionEngine, with the one line changed."""

    def __init__(self, run: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.model_ema = RemoteEma(self.model, 0.9, run=run)

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        loss: Tensor = self.model(batch).square().mean()
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.model_ema(self.model)

    def validation_step(self, *_: Any) -> None:
        with self.model_ema.scope(self.model):
            self.log("ema_sum", sum(tensor.sum() for tensor in self.weights().values()), sync_dist=True)

    def on_fit_end(self) -> None:
        self.model_ema.close()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(path: Path) -> None:
    [scene] = json.loads(path.read_text())
    engine = Engine(scene["run"])
    data = DataLoader(torch.randn(16, 3, generator=torch.Generator().manual_seed(1)), batch_size=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", strategy="ddp_spawn", devices=2, enable_checkpointing=False, **quiet
    )
    trainer.fit(engine, data, DataLoader(torch.zeros(2, 3)))
    with engine.model_ema.scope(engine.model):
        averaged = engine.weights()
    logged = float(trainer.callback_metrics["ema_sum"])
    updates = engine.model_ema.num_updates
    engine.model_ema.close()
    seen = {"updates": updates, "averaged": averaged, "after": engine.weights(), "logged": logged}
    torch.save(seen, path.parent / f"{scene['name']}.0.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
