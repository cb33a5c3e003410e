"""A training with LitEma goes on with RemoteEma, from its own checkpoint, as if nothing had changed.

Knows: engines as sgm writes them, Lightning's checkpoints, the command ``ema``. Does not know formats.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ema_client import EmaClient, RemoteEma
from tests.client.checkpoints.litema import LitEma

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip(
        "lightning.pytorch", reason="lightning is not installed: pip install -e '.[integrations]'"
    )

# Lightning and torch warn of each other's deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")

DECAY = 0.9999
BATCHES = 4


class Before(lightning.LightningModule):
    """An engine as it was: LitEma in the module, its weights in the checkpoint."""

    def __init__(self, model_ema: Any = LitEma, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.model_ema = model_ema(self.model, decay=DECAY, **options)

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.model_ema(self.model)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.model(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=0.1)


class After(Before):
    """The same engine moved over: the line in the constructor, and two hooks."""

    def __init__(self, run: str, **options: Any) -> None:
        super().__init__(RemoteEma, run=run, resume=True, **options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ema"] = self.model_ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "ema" in checkpoint:
            self.model_ema.load_state_dict(checkpoint["ema"])
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: weights[key] for key in weights if not key.startswith("model_ema.")}


def fit(engine: Any, folder: Path, epochs: int, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, default_root_dir=folder, **quiet
    )
    data = torch.randn(4 * BATCHES, 3, generator=torch.Generator().manual_seed(1))
    trainer.fit(engine, DataLoader(data, batch_size=4), **options)
    return trainer


def averages(client: EmaClient, run: str) -> dict[str, Tensor]:
    return {name.replace(".", ""): tensor for name, tensor in client.pull(run).items()}


@pytest.mark.parametrize("counted", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_a_litema_training_goes_on_bit_for_bit(
    client: EmaClient, run_name: str, same: Any, tmp_path: Path, counted: bool
) -> None:
    """Three epochs with LitEma, and one with LitEma and two with RemoteEma from LitEma's checkpoint, are the same: the
    weights, the average and the counter; so is the third epoch done again from RemoteEma's own checkpoint."""
    expected = Before(use_num_updates=counted)
    fit(expected, tmp_path, 3)
    shadow = {key: t for key, t in expected.model_ema.state_dict().items() if key not in ("decay", "num_updates")}

    fit(Before(use_num_updates=counted), tmp_path, 1).save_checkpoint(tmp_path / "litema.ckpt")
    command = [sys.executable, "-m", "ema_client", "import", str(tmp_path / "litema.ckpt"), run_name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")

    moved = After(run_name, use_num_updates=counted)
    fit(moved, tmp_path, 2, ckpt_path=tmp_path / "litema.ckpt").save_checkpoint(tmp_path / "remote.ckpt")
    for _ in range(2):
        # The second time the run has to take the third epoch back.
        moved = After(run_name, use_num_updates=counted)
        fit(moved, tmp_path, 3, ckpt_path=tmp_path / "remote.ckpt")
        moved.model_ema.close()
        info = client.run(run_name)
        assert (info.num_updates, info.step) == (int(expected.model_ema.num_updates), 3 * BATCHES)
        assert same(moved.model.state_dict(), expected.model.state_dict())
        assert same(averages(client, run_name), shadow)
    saved = torch.load(tmp_path / "remote.ckpt", weights_only=True)
    assert not any(key.startswith("model_ema.") for key in saved["state_dict"])


def test_checkpoint_of_litema_loads_without_its_averages(client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """sgm's init_from_ckpt, strict=False, has LitEma's entries left over and nothing missing."""
    fit(Before(), tmp_path, 1).save_checkpoint(tmp_path / "litema.ckpt")
    client.create_run(run_name, Before().model)
    state = torch.load(tmp_path / "litema.ckpt", weights_only=True)["state_dict"]
    engine = After(run_name)
    missing, unexpected = engine.load_state_dict(state, strict=False)
    assert missing == []
    assert all(key.startswith("model_ema.") for key in unexpected)
    assert torch.equal(engine.model[0].weight, state["model.0.weight"])
