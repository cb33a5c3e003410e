"""Weights that Lightning or its module loads after the RemoteEma was made: LitEma's numbers, as if made later.

Knows Lightning's order of making, loading and stepping. Does not know how a change of weights is noticed
(tests/client/training/test_beginning.py).
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from ema_client import EmaClient, RemoteEma
from tests.integrations.lightning_training import Module, batches, held_out, lightning, trainer

if TYPE_CHECKING:
    from collections.abc import Iterator

# Lightning and torch warn of each other's deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")


class Engine(lightning.LightningModule):
    """sgm's DiffusionEngine: the EMA is made with the model, and a checkpoint is loaded at the constructor's end."""

    def __init__(self, run: str, counted: bool, oracle: Any, ckpt: Path | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        self.model_ema = RemoteEma(self.model, 0.9, counted, run=run)
        if ckpt:
            self.load_state_dict(torch.load(ckpt)["state_dict"], strict=False)
        self.counted, self.make_oracle, self.oracle = counted, oracle, None
        self.validated: list[dict[str, Tensor]] = []

    def on_fit_start(self) -> None:
        self.oracle = self.make_oracle(self.now(), 0.9, self.counted)

    def now(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        self.model_ema.store(self.model.parameters())
        self.model_ema.copy_to(self.model)
        try:
            yield
        finally:
            self.model_ema.restore(self.model.parameters())

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.model(batch).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        self.model_ema(self.model)
        self.oracle.update(self.now())

    def validation_step(self, *_: Any) -> None:
        with self.ema_scope():
            self.validated.append(self.now())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    """A checkpoint of weights alone, of another start."""
    torch.manual_seed(5)
    weights = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).state_dict()
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in weights.items()}}, tmp_path / "init.ckpt")
    return tmp_path / "init.ckpt"


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("checks", [0, 1])
def test_sgm(
    client: EmaClient, run_name: str, tmp_path: Path, litema: Any, same: Any, ckpt: Path, counted: bool, checks: int
) -> None:
    """init_from_ckpt after model_ema: the sanity check has the loaded weights, and training LitEma's numbers."""
    engine = Engine(run_name, counted, litema, ckpt)
    loaded = engine.now()
    trainer(tmp_path, num_sanity_val_steps=checks).fit(engine, batches(), held_out())
    engine.model_ema.close()
    assert same(engine.validated[0], loaded) == bool(checks)
    assert same(dict(client.pull(run_name)), engine.oracle.shadow)
    assert client.run(run_name).version == "2.8"


def test_sgm_without_a_checkpoint(client: EmaClient, run_name: str, tmp_path: Path, litema: Any, same: Any) -> None:
    """Nothing is loaded: a sanity check's swap is no change, and the weights go once."""
    engine = Engine(run_name, True, litema)
    trainer(tmp_path, num_sanity_val_steps=1).fit(engine, batches(), held_out())
    engine.model_ema.close()
    assert same(dict(client.pull(run_name)), engine.oracle.shadow)
    assert client.run(run_name).version == "1.8"


def test_lightnings_ckpt_path(client: EmaClient, run_name: str, tmp_path: Path, litema: Any, same: Any) -> None:
    """Weights that the Trainer loads, of a checkpoint without an EMA's state."""
    first = Engine(f"{run_name}-first", True, litema)
    fitter = trainer(tmp_path)
    fitter.fit(first, batches())
    fitter.save_checkpoint(tmp_path / "last.ckpt")
    first.model_ema.close()
    engine = Engine(run_name, True, litema)
    trainer(tmp_path, max_epochs=2).fit(engine, batches(), ckpt_path=tmp_path / "last.ckpt")
    engine.model_ema.close()
    assert same(dict(client.pull(run_name)), engine.oracle.shadow)
    assert client.run(run_name).num_updates == 8


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_loaded_in_the_modules_own_hook(
    client: EmaClient, run_name: str, tmp_path: Path, litema: Any, trained: Any, same: Any, hook: str
) -> None:
    """The callback joins before the module's own on_train_start, in which a module may load weights."""
    from ema_client.integrations.lightning import RemoteEmaCallback

    class Loading(Module):
        def load(self) -> None:
            torch.manual_seed(9)
            self.load_state_dict({name: torch.randn_like(p) for name, p in self.named_parameters()}, strict=False)
            self.oracle = litema(trained(self), 0.9, False)

        def on_train_start(self) -> None:
            super().on_train_start()
            if hook == "on_train_start":
                self.load()

        def on_fit_start(self) -> None:
            if hook == "on_fit_start":
                self.load()

    module = Loading(trained)
    trainer(tmp_path, RemoteEmaCallback(0.9, False, run=run_name)).fit(module, batches())
    assert same(dict(client.pull(run_name)), module.oracle.shadow)
