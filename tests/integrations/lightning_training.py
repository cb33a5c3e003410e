"""A little Lightning module that remembers its weights, and Trainers for it. Knows Lightning; does not know the EMA."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip(
        "lightning.pytorch", reason="lightning is not installed: pip install -e '.[integrations]'"
    )

__all__ = ["BATCHES", "Module", "batches", "held_out", "lightning", "trainer"]

BATCHES = 8


class Module(lightning.LightningModule):
    """Trains a little net, and remembers which weights it was trained, evaluated and tested with."""

    def __init__(self, trained: Callable[[nn.Module], dict[str, Tensor]], oracle: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.aside = nn.Linear(3, 1)
        self.copies = trained
        self.oracle = oracle(trained(self), 0.9, True) if oracle else None
        self.evaluated: list[dict[str, Tensor]] = []
        self.at_end: list[dict[str, Tensor]] = []
        self.stepped: dict[str, Tensor] = {}

    def on_train_start(self) -> None:
        self.stepped = {}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.stepped = self.copies(self)
        if self.oracle:
            self.oracle.update(self.stepped)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        if self.stepped:
            assert all(torch.equal(p, self.stepped[name]) for name, p in self.copies(self).items())
        return (self.net(batch) + self.aside(batch)).square().mean()

    def validation_step(self, *_: Any) -> None:
        self.evaluated.append(self.copies(self))

    def on_validation_epoch_end(self) -> None:
        self.at_end.append(self.copies(self))

    def test_step(self, *_: Any) -> None:
        self.evaluated.append(self.copies(self))

    predict_step = test_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches() -> DataLoader[Tensor]:
    return DataLoader(torch.randn(4 * BATCHES, 3, generator=torch.Generator().manual_seed(1)), batch_size=4)


def held_out() -> DataLoader[Tensor]:
    return DataLoader(torch.zeros(1, 3))


def trainer(folder: Path, *callbacks: Any, package: Any = lightning, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 1, "enable_checkpointing": False, **options}
    return package.Trainer(accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **quiet, **options)
