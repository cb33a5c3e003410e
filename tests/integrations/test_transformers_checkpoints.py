"""A transformers Trainer's models and checkpoints: each with its own EMA, whichever the Trainer loads, makes or keeps.

Knows transformers, and which EMA belongs to which weights. Does not know how weights travel, or outages.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn

from ema_client import EmaClient
from tests.integrations.transformers_training import DATA, Net, Trainer, a_trainer, transformers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ema_client.integrations.transformers import RemoteEmaCallback

# transformers and torch warn of each other's deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")

Weights = dict[str, Tensor]
#: Of a training of 16 steps: a checkpoint and an evaluation at each fourth.
EACH_FOURTH = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
#: The first evaluation is the best.
BEST_FIRST = {**EACH_FOURTH, "load_best_model_at_end": True, "metric_for_best_model": "worse"}


class Worsening(Trainer):
    """Evaluates worse and worse."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        metrics["eval_worse"] = -float(self.state.global_step)
        return metrics

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        return bool(super()._determine_best_metric({**metrics, "eval_worse": -float(self.state.global_step)}, trial))


def state_in(checkpoint: Path, run: str) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / f"ema-{run}.json").read_text())
    return state


def ema_of(client: EmaClient, run: str, checkpoint: Path) -> Weights:
    return dict(client.pull(run, snapshot=state_in(checkpoint, run)["snapshot"]))


# --- evaluating -----------------------------------------------------------------------------------------------------


def test_the_best_model(client: EmaClient, run_name: str, tmp_path: Path, trained: Any, same: Any) -> None:
    """After load_best_model_at_end evaluated, predicted and saved in scope() is the EMA of the best checkpoint."""
    model = Net()
    trainer = a_trainer(tmp_path, model, cls=Worsening, greater_is_better=True, **BEST_FIRST)
    ema = RemoteEmaCallback(0.9, run=run_name).attach(trainer)
    trainer.train()
    best = tmp_path / "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(best)
    assert same(trained(model), load_file(best / "model.safetensors"))
    expected = ema_of(client, run_name, best)
    assert not same(dict(client.pull(run_name)), expected)

    trainer.evaluate()
    assert same(trainer.evaluated[-1], expected)
    trainer.predict(DATA[:8])
    assert same(trainer.evaluated[-1], expected)
    with ema.scope():
        trainer.save_model(tmp_path / "final")
    assert same(load_file(tmp_path / "final" / "model.safetensors"), expected)
    # What is trained on from there goes on with that EMA.
    trainer.args.load_best_model_at_end = False
    trainer.args.max_steps = 1
    trainer.train()
    assert client.run(run_name).num_updates == 5
    ema.close()


def test_a_model_from_a_checkpoint(client: EmaClient, run_name: str, tmp_path: Path, trained: Any, same: Any) -> None:
    """A model of from_pretrained(checkpoint) is evaluated with that checkpoint's EMA by any Trainer, without training.

    A model that is from nowhere is evaluated as it is, and a warning says so.
    """

    class Pretrained(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.net = nn.Linear(3, 1)
            self.post_init()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.net(x).square().mean()}

    trainer = a_trainer(tmp_path, Pretrained(transformers.PretrainedConfig()), **EACH_FOURTH)
    RemoteEmaCallback(0.9, run=run_name).attach(trainer)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-8"

    model = Pretrained.from_pretrained(checkpoint)
    weights = trained(model)
    other = a_trainer(tmp_path / "other", model)
    ema = RemoteEmaCallback(0.9, run=run_name).attach(other)
    other.evaluate()
    assert same(other.evaluated[-1], ema_of(client, run_name, checkpoint))
    assert same(trained(model), weights)

    fresh = a_trainer(tmp_path / "fresh", Net())
    ema.attach(fresh)
    with pytest.warns(UserWarning, match="the model was not trained yet: evaluated are the model's own weights"):
        fresh.evaluate()
    assert same(fresh.evaluated[-1], trained(fresh.model))
    ema.close()


# --- made while the model holds EMA weights -------------------------------------------------------------------------


class SavingTrainer(Trainer):
    """Saves in the middle of an evaluation: a checkpoint, or the model."""

    what = ""

    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step:
            if self.what == "checkpoint":
                self._save_checkpoint(self.model, trial=None)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            else:
                self.save_model(Path(self.args.output_dir) / "model")
        return super().prediction_step(model, *args, **kwargs)


@pytest.mark.parametrize("what", ["checkpoint", "model"])
def test_saving_in_the_middle_of_an_evaluation(
    client: EmaClient, run_name: str, tmp_path: Path, trained: Any, same: Any, what: str
) -> None:
    """Saved are the training weights, with a reference to the EMA; the evaluation goes on with EMA weights."""
    model = Net()
    trainer = a_trainer(tmp_path, model, cls=SavingTrainer, eval_strategy="steps", eval_steps=16)
    trainer.what = what
    ema = RemoteEmaCallback(0.9, run=run_name).attach(trainer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert not [each for each in caught if "holds EMA weights" in str(each.message)]
    now = dict(client.pull(run_name))
    folder = tmp_path / ("checkpoint-16" if what == "checkpoint" else "model")
    assert same(load_file(folder / "model.safetensors"), trained(model))
    assert not same(trained(model), now)
    assert same(trainer.evaluated[-1], now)
    if what == "checkpoint":
        assert same(ema_of(client, run_name, folder), now)
    ema.close()


@pytest.mark.usefixtures("client")
def test_a_checkpoint_inside_scope(run_name: str, tmp_path: Path, trained: Any, same: Any) -> None:
    """A checkpoint holds training weights even inside scope(), where save_model() saves the EMA."""
    model = Net()
    trainer = a_trainer(tmp_path, model)
    ema = RemoteEmaCallback(0.9, run=run_name).attach(trainer)
    trainer.train()
    with ema.scope():
        inside = trained(model)
        trainer._save_checkpoint(model, trial=None)
        assert same(trained(model), inside)
    assert same(load_file(tmp_path / "checkpoint-16" / "model.safetensors"), trained(model))
    assert not same(trained(model), inside)
    ema.close()


# --- one callback, several trainings --------------------------------------------------------------------------------


def test_models_made_anew(client: EmaClient, run_name: str, tmp_path: Path, trained: Any, same: Any) -> None:
    """With model_init each training has a run of its own, from its own model: as in a hyperparameter search."""
    trainer = a_trainer(tmp_path, None, model_init=Net)
    ema = RemoteEmaCallback(0.9, run=run_name).attach(trainer)
    seen = []
    for _ in range(2):
        trainer.train()
        trainer.evaluate()
        assert not same(trainer.evaluated[-1], trained(trainer.model))
        assert same(trainer.evaluated[-1], dict(client.pull(ema.run)))
        seen.append((ema.run, client.run(ema.run).num_updates))
    assert seen == [(run_name, 16), (f"{run_name}-2", 16)]
    # The same model from the same seed: the second EMA knows nothing of the first.
    assert same(dict(client.pull(run_name)), dict(client.pull(f"{run_name}-2")))
    ema.close()


def test_a_checkpoint_of_a_further_training(client: EmaClient, run_name: str, tmp_path: Path, same: Any) -> None:
    """The checkpoints of the second training refer to the second run, and are gone on with in that run."""
    trainer = a_trainer(tmp_path, None, model_init=Net, save_strategy="steps", save_steps=8)
    ema = RemoteEmaCallback(0.9, run=run_name).attach(trainer)
    trainer.train()
    trainer.train()
    second = f"{run_name}-2"
    expected = dict(client.pull(second))
    assert state_in(tmp_path / "checkpoint-8", second)["step"] == 8
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert ema.run == second
    assert client.run(second).num_updates == 16
    assert same(dict(client.pull(second)), expected)
    ema.close()
