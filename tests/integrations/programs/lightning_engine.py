"""Two processes train an engine that makes its RemoteEma in its constructor, as sgm's do, before there is any group.

Knows Lightning. Run as ``lightning_engine.py SCENES.json`` in each of the processes that torchrun starts, or in one
process, which then has Lightning start the other.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader

from ema_client import RemoteEma


class Engine(LightningModule):
    """As sgm's DiffusionEngine, with the one line changed."""

    def __init__(self, scene: dict[str, Any]) -> None:
        super().__init__()
        assert not dist.is_initialized()
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.model_ema = RemoteEma(self.model, 0.9, run=scene["run"], resume=scene["resume"])
        self.validated: dict[str, Tensor] = {}

    def copies(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        loss: Tensor = self.model(batch).square().mean()
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.model_ema(self.model)

    def validation_step(self, *_: Any) -> None:
        if not self.trainer.sanity_checking:
            with self.model_ema.scope(self.model):
                self.validated = self.copies()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(path: Path) -> None:
    [scene] = json.loads(path.read_text())
    engine = Engine(scene)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", strategy="ddp", devices=2, enable_checkpointing=False, barebones=False, **quiet
    )
    data = DataLoader(torch.randn(16, 3, generator=torch.Generator().manual_seed(1)), batch_size=2)
    trainer.fit(engine, data, DataLoader(torch.zeros(2, 3)))
    seen = {"validated": engine.validated, "after": engine.copies(), "updates": engine.model_ema.num_updates}
    engine.model_ema.close()
    torch.save(seen, path.parent / f"{scene['name']}.{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
