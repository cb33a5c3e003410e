"""Processes train one model by one of several strategies, sharded or not, with the callback; each notes what it saw.

Every process gets the same batches, so that however many there are, and however the model is cut up, the training is
the same, bit for bit. Knows Lightning. Run as ``lightning_sharded.py SCENES.json`` in each of the processes that
torchrun starts, or in one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader

from ema_client import RemoteEma
from ema_client.integrations.lightning import RemoteEmaCallback
from ema_client.training.sharding import is_sharded, shards_of

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


class Fsdp1(DDPStrategy):
    """FSDP1 around the whole module, as Lightning's FSDPStrategy has it, which asks for a GPU."""

    def _setup_model(self, model: nn.Module) -> Any:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


class Module(LightningModule):
    """Sizes that two ranks do not divide evenly, a net that is sharded by itself, and a parameter beside it."""

    def __init__(self, scene: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
        self.aside = nn.Linear(3, 1)
        self.scene = scene
        self.evaluated: list[dict[str, Tensor]] = []
        self.stepped: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        if self.scene["how"] == "fsdp2" and not is_sharded(self):
            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
            fully_shard(self.net, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def copies(self) -> dict[str, Tensor]:
        """This rank's own memory of what is averaged."""
        model = self.trainer.model if self.scene["how"] == "fsdp1" else self
        if is_sharded(model):
            return {name: shard.local.detach().clone() for name, shard in shards_of(model).items()}
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}

    def forward(self, batch: Tensor) -> Tensor:
        out: Tensor = self.net(batch) + self.aside(batch)
        return out

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.stepped = self.copies()

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self(batch).square().mean()

    # Not in the step, where FSDP holds whole tensors.
    def on_validation_batch_start(self, *_: Any) -> None:
        self.evaluated.append(self.copies())

    on_test_batch_start = on_validation_batch_start

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.evaluated[-1]["output"] = self(batch).detach()
        if self.stepped and self.scene.get("fails"):
            raise ZeroDivisionError

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


STRATEGIES = {
    "whole": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp1": Fsdp1,
    "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
}


class Late(RemoteEmaCallback):
    """Of a process that comes to its flush() when the others are long through with theirs."""

    # As in the other processes, to be given the same part of a checkpoint.
    state_key = RemoteEmaCallback.__qualname__

    def on_train_start(self, *args: Any) -> None:
        prompt = RemoteEma.flush

        def late(*args: Any, **kwargs: Any) -> None:
            time.sleep(0.5)
            prompt(*args, **kwargs)

        RemoteEma.flush = late  # type: ignore[method-assign]
        try:
            super().on_train_start(*args)
        finally:
            RemoteEma.flush = prompt  # type: ignore[method-assign]


def play(scene: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train for ``epochs``, from ``checkpoint`` if one is given; with ``tests`` test, without training."""
    kind = Late if scene.get("late") == RANK else RemoteEmaCallback
    trainer = Trainer(
        accelerator="cpu",
        strategy=STRATEGIES[scene["how"]](),
        devices=WORLD,
        use_distributed_sampler=False,
        max_epochs=scene.get("epochs", 1),
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            kind(0.9, run=scene["run"], attribute=scene.get("attribute")),
            ModelCheckpoint(folder / scene["name"], filename="{epoch}", save_top_k=-1),
        ],
    )
    module, held_out = Module(scene), DataLoader(torch.ones(1, 3))
    batches = DataLoader(torch.randn(16, 3, generator=torch.Generator().manual_seed(1)), batch_size=4)
    raised = ""
    try:
        if scene.get("tests"):
            trainer.test(module, held_out, verbose=False)
        else:
            trainer.fit(module, batches, held_out, ckpt_path=scene.get("checkpoint") and folder / scene["checkpoint"])
    except Exception as error:  # noqa: BLE001 - told to the test
        raised = f"{type(error).__name__}: {error}"
    return {
        "raised": raised,
        "sharded": is_sharded(module),
        "evaluated": module.evaluated,
        "stepped": module.stepped,
        "after": module.copies(),
    }


if __name__ == "__main__":
    path = Path(sys.argv[1])
    for scene in json.loads(path.read_text()):
        torch.save(play(scene, path.parent), path.parent / f"{scene['name']}.{RANK}.pt")
