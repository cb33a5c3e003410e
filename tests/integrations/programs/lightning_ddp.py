"""Two processes train one model by DDP on gloo with the callback; each writes down what it validated with.

Knows Lightning. Run as ``lightning_ddp.py RUN FOLDER URL PID``, the latter two of a service that is to be killed; it
starts its second process itself.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ema_client import RetryPolicy
from ema_client.errors import EmaError
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


class Killing(Callback):
    """Ends the service in the second step, from the first process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def on_train_batch_start(self, trainer: Trainer, _: LightningModule, *__: Any) -> None:
        if trainer.global_step == 1 and trainer.is_global_zero:
            os.kill(self._pid, signal.SIGKILL)


def train(run: str, *callbacks: Callback, **options: Any) -> dict[str, Any]:
    """What this process saw of a training."""
    module = Module()
    data = DataLoader(torch.randn(16, 3, generator=torch.Generator().manual_seed(1)), batch_size=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        enable_checkpointing=False,
        callbacks=[*callbacks, RemoteEmaCallback(0.9, run=run, **options)],
        **quiet,
    )
    raised = ""
    try:
        trainer.fit(module, data, DataLoader(torch.zeros(2, 3)))
    except EmaError as error:
        raised = f"{type(error).__name__}: {error} {error.__notes__}"
    return {"validated": module.validated, "after": module.copies(), "raised": raised, "rank": trainer.global_rank}


def main(run: str, folder: Path, doomed: str, pid: int) -> None:
    """A training; one whose service is killed; and one that finds no service."""
    seen = [
        train(run),
        train(run, Killing(pid), url=doomed),
        train(f"{run}-none", url=doomed),
    ]
    torch.save(seen, folder / f"rank{seen[0]['rank']}.pt")


if __name__ == "__main__":
    # Nobody waits between two tries to reach the service.
    RetryPolicy.delay = lambda *_, **__: None  # type: ignore[method-assign]
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
