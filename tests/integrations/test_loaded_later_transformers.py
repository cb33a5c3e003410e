"""Weights that transformers, accelerate or peft load after the RemoteEma was made: LitEma's numbers, as if made later.

Knows their order of making, loading and stepping. Does not know how a change of weights is noticed
(tests/client/training/test_beginning.py).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ema_client import EmaClient, RemoteEma
from tests.integrations.transformers_training import Net, a_trainer, transformers

# transformers and torch warn of each other's deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.soak
def test_transformers_checkpoint(
    client: EmaClient, run_name: str, tmp_path: Path, litema: Any, trained: Any, same: Any
) -> None:
    """The Trainer loads a checkpoint in train(): a RemoteEma made before begins with the checkpoint's weights."""

    class Line(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        """The line of a training loop, and LitEma beside it."""

        def __init__(self, ema: RemoteEma) -> None:
            self.ema = ema
            self.oracle: Any = None

        def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
            self.oracle = litema(trained(model), 0.9, False)

        def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
            self.ema(model)
            self.oracle.update(trained(model))

    a_trainer(tmp_path, Net(), max_steps=2, save_strategy="steps", save_steps=2).train()
    model = Net()
    with RemoteEma(model, 0.9, False, run=run_name) as ema:
        again = a_trainer(tmp_path, model, max_steps=5)
        again.add_callback(line := Line(ema))
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    pulled = client.pull(run_name)
    assert (pulled.info.step, pulled.info.version) == (3, "2.3")
    assert same(dict(pulled), line.oracle.shadow)


@pytest.mark.soak
def test_accelerate(client: EmaClient, run_name: str, tmp_path: Path, litema: Any, trained: Any, same: Any) -> None:
    """load_state() after prepare(), with gradients accumulated over two batches."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.save_state(str(tmp_path / "state"))
    with torch.no_grad():
        model.weight.zero_()
    with RemoteEma(accelerator.unwrap_model(model), 0.9, run=run_name) as ema:
        accelerator.load_state(str(tmp_path / "state"))
        oracle = litema(trained(model), 0.9, True)
        for _ in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.randn(2, 3)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    ema(accelerator.unwrap_model(model))
                    oracle.update(trained(model))
    assert same(dict(client.pull(run_name)), oracle.shadow)
    assert client.run(run_name).version == "2.2"


@pytest.mark.soak
def test_peft(client: EmaClient, run_name: str, litema: Any, trained: Any, same: Any) -> None:
    """An adapter that is loaded into a model with LoRA; the frozen weights, which are loaded too, are not averaged."""
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def adapted() -> nn.Module:
        base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        model: nn.Module = peft.get_peft_model(
            base, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        )
        return model

    saved, model = peft.get_peft_model_state_dict(adapted()), adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with RemoteEma(model, 0.9, run=run_name) as ema:
        peft.set_peft_model_state_dict(model, copy.deepcopy(saved))
        oracle = litema(trained(model), 0.9, True)
        for _ in range(3):
            model(torch.randn(2, 3)).square().mean().backward()
            optimizer.step()
            ema(model)
            oracle.update(trained(model))
    ours = {name: shadow for name, shadow in oracle.shadow.items() if "lora" in name}
    assert len(ours) == 2
    assert same(dict(client.pull(run_name)), ours)
