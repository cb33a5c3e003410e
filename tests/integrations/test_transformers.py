"""The transformers callback under a real Trainer: when it updates, whose weights are evaluated, what is saved.

Knows transformers. Does not know how weights travel.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_client import EmaClient
from ema_client.errors import UsageError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install -e '.[integrations]'"
    )
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install -e '.[integrations]'")
    from ema_client.integrations.transformers import RemoteEmaCallback

# transformers and torch warn of each other's deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")

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


def a_trainer(folder: Path, model: nn.Module, eval_dataset: Any = None, cls: Any = Trainer, **options: Any) -> Any:
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
    made = cls(model, arguments, train_dataset=DATA, eval_dataset=eval_dataset or DATA[:8])
    made.can_return_loss = True
    made.evaluated = []
    return made


@pytest.mark.parametrize("accumulate", [1, 4])
def test_one_update_for_each_optimizer_step(
    client: EmaClient, run_name: str, tmp_path: Path, litema: Any, trained: Any, same: Any, accumulate: int
) -> None:
    """Batches that only accumulate gradients are no updates; the EMA is LitEma's over optimizer steps, bit for bit."""
    model = Net()
    oracle = litema(trained(model), 0.9, True)
    trainer = a_trainer(tmp_path, model, gradient_accumulation_steps=accumulate)
    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(lambda *_: oracle.update(trained(model)))
    ema = RemoteEmaCallback(0.9, run=run_name).attach(trainer)
    trainer.train()
    assert client.run(run_name).num_updates == 16 // accumulate
    assert same(dict(client.pull(run_name)), oracle.shadow)
    ema.close()


def test_evaluation_has_ema_weights_and_checkpoints_have_not(
    client: EmaClient, run_name: str, tmp_path: Path, trained: Any, same: Any
) -> None:
    """evaluate(), of several data sets as well, sees the EMA; what is saved and trained on are the training weights."""
    model = Net()
    sets = {"one": DATA[:8], "two": DATA[8:16]}
    options = {"eval_strategy": "steps", "eval_steps": 8, "save_strategy": "steps", "save_steps": 16}
    trainer = a_trainer(tmp_path, model, sets, save_only_model=True, **options)
    ema = RemoteEmaCallback(0.9, run=run_name).attach(trainer)
    trainer.train()
    pulled = dict(client.pull(run_name))
    assert len(trainer.evaluated) == 4
    assert same(trainer.evaluated[2], pulled)
    assert same(trainer.evaluated[3], pulled)
    assert not same(trainer.evaluated[1], pulled)
    from safetensors.torch import load_file

    assert same(load_file(tmp_path / "checkpoint-16" / "model.safetensors"), trained(model))
    assert not same(trained(model), pulled)

    trainer.predict(DATA[:8])
    assert same(trainer.evaluated[-1], pulled)
    with ema.scope():
        assert same(trained(model), pulled)
    ema.close()


def test_an_evaluation_that_fails_gives_the_weights_back(
    client: EmaClient, run_name: str, tmp_path: Path, trained: Any, same: Any
) -> None:
    """Whatever evaluation raises, in the training or after it, the model holds its training weights afterwards."""

    class Failing(Trainer):
        def prediction_step(self, model: nn.Module, *_: Any, **__: Any) -> Any:
            self.evaluated.append(trained(model))
            raise ZeroDivisionError

    model = Net()
    trainer = a_trainer(tmp_path, model, cls=Failing, eval_strategy="steps", eval_steps=8)
    ema = RemoteEmaCallback(0.9, run=run_name).attach(trainer)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert same(trainer.evaluated[0], dict(client.pull(run_name)))
    assert not same(trained(model), trainer.evaluated[0])
    ema.close()


def test_as_one_of_the_callbacks_it_updates_only(
    client: EmaClient, run_name: str, tmp_path: Path, trained: Any, same: Any
) -> None:
    """Without attach() evaluations are of the training weights; before a training there is no scope."""
    model = Net()
    trainer = a_trainer(tmp_path, model)
    ema = RemoteEmaCallback(0.9, run=run_name)
    with pytest.raises(UsageError), ema.scope():
        pass
    trainer.add_callback(ema)
    trainer.train()
    trainer.evaluate()
    assert same(trainer.evaluated[-1], trained(model))
    assert client.run(run_name).num_updates == 16
    ema.close()


def test_training_on(client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """train() a second time goes on with the run; attached but untrained, evaluate() is of the weights as they are."""
    trainer = a_trainer(tmp_path, Net())
    ema = RemoteEmaCallback(0.9, run=run_name).attach(trainer)
    trainer.evaluate()
    trainer.train()
    trainer.train()
    assert client.run(run_name).num_updates == 32
    ema.close()
