"""A little model as transformers wants it, and Trainers that remember what they evaluate with.

Knows transformers; does not know the EMA.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install -e '.[integrations]'"
    )
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install -e '.[integrations]'")

__all__ = ["DATA", "Net", "Trainer", "a_trainer", "transformers"]

DATA = [{"x": torch.randn(3, generator=torch.Generator().manual_seed(seed))} for seed in range(32)]


class Net(nn.Module):
    """As transformers wants a model: it answers with its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.net(x).square().mean()}


class Trainer(transformers.Trainer):
    """Remembers what it evaluated with."""

    evaluated: list[dict[str, Tensor]]

    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.evaluated.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return super().prediction_step(model, *args, **kwargs)


def a_trainer(
    folder: Path,
    model: nn.Module | None,
    eval_dataset: Any = None,
    cls: Any = Trainer,
    model_init: Any = None,
    **options: Any,
) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=8,
        learning_rate=0.1,
        num_train_epochs=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=[],
        **{"save_strategy": "no", **options},
    )
    made = cls(model, arguments, train_dataset=DATA, eval_dataset=eval_dataset or DATA[:8], model_init=model_init)
    made.can_return_loss = True
    made.evaluated = []
    return made
