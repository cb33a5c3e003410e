"""The transformers callback under a real Trainer: when it updates, whose weights are evaluated, what is saved.

Knows transformers. Does not know how weights travel.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from ema_client import EmaClient
from ema_client.errors import UsageError
from ema_client.protocol import WeightsInfo
from tests.integrations.transformers_training import DATA, Net, Trainer, a_trainer, transformers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ema_client.integrations.transformers import RemoteEmaCallback

# transformers and torch warn of each other's deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")


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


# --- checkpoints ----------------------------------------------------------------------------------------------------


class Follower(transformers.TrainerCallback):
    """After the EMA's callback: the EMA as the service has it at each of some events, by event and step."""

    def __init__(self, client: EmaClient, run: str) -> None:
        self.client, self.run = client, run
        self.seen: dict[tuple[str, int], tuple[dict[str, Tensor], WeightsInfo]] = {}

    def _see(self, event: str, step: int) -> None:
        pulled = self.client.pull(self.run)
        self.seen[event, step] = {name: tensor.clone() for name, tensor in pulled.items()}, pulled.info

    def on_train_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        self._see("begin", state.global_step)

    def on_save(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        self._see("save", state.global_step)


def train_from(
    client: EmaClient, run: str, folder: Path, checkpoint: Any = None, *, attach: bool = True, resume: bool = False
) -> Follower:
    """One epoch in a Trainer of its own, of 16 steps with a checkpoint at each 4th."""
    trainer = a_trainer(folder, Net(), save_strategy="steps", save_steps=4)
    ema = RemoteEmaCallback(0.9, run=run, resume=resume)
    if attach:
        ema.attach(trainer)
    else:
        trainer.add_callback(ema)
    follower = Follower(client, run)
    trainer.add_callback(follower)
    trainer.train(resume_from_checkpoint=checkpoint)
    ema.close()
    return follower


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("named", marks=pytest.mark.soak),
        "newest",
        "elsewhere",
        pytest.param("not attached", marks=pytest.mark.soak),
    ],
)
def test_resuming_goes_on_with_the_ema_of_the_checkpoint(
    client: EmaClient, run_name: str, tmp_path: Path, same: Any, where: str
) -> None:
    """A training that goes on from a checkpoint has the EMA, step and counter that were there, bit for bit.

    Also where the run had gone on since; wherever the checkpoint is now; and without a word about its run.
    """
    whole = train_from(client, run_name, tmp_path).seen
    checkpoint: Any = tmp_path / "checkpoint-8"
    if where == "newest":
        for later in (12, 16):
            shutil.rmtree(tmp_path / f"checkpoint-{later}")
    if where == "elsewhere":
        checkpoint = shutil.move(checkpoint, tmp_path / "kept")
    given = True if where == "newest" else str(checkpoint)
    again = train_from(client, run_name, tmp_path, given, attach=where != "not attached").seen

    assert list(again) == [("begin", 8), ("save", 12), ("save", 16)]
    for (_, step), (weights, info) in again.items():
        expected, then = whole["save", step]
        assert same(weights, expected), step
        assert (info.step, info.num_updates, info.decay) == (step, step, then.decay)
    assert not same(again["begin", 8][0], whole["save", 16][0])


def test_checkpoints_without_the_ema(client: EmaClient, run_name: str, tmp_path: Path, same: Any) -> None:
    """From one of an older version a run goes on as the service has it, and says so; another name begins a new run."""
    whole = train_from(client, run_name, tmp_path).seen
    (tmp_path / "checkpoint-8" / f"ema-{run_name}.json").unlink()
    checkpoint = str(tmp_path / "checkpoint-8")
    with pytest.warns(UserWarning, match=f"no .*checkpoint-8/ema-{run_name}.json: .* another step than .* 8"):
        again = train_from(client, run_name, tmp_path, checkpoint, resume=True).seen
    assert same(again["begin", 8][0], whole["save", 16][0])
    assert client.run(run_name).num_updates == 24

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_from(client, f"{run_name}-branch", tmp_path, checkpoint)
    assert not [warning for warning in caught if "another step" in str(warning.message)]
    assert client.run(f"{run_name}-branch").num_updates == 8


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda whole: whole[:10], "Unterminated string"),
        pytest.param(lambda _: b"", "Expecting value", marks=pytest.mark.soak),
        (lambda _: b"\x80\x00 PNG", "can't decode byte 0x80"),
        pytest.param(lambda _: b"[1, 2]", r"not the state of a run: '\[1, 2\]'", marks=pytest.mark.soak),
        pytest.param(lambda _: b'{"epoch": 3}', "not the state of a run", marks=pytest.mark.soak),
        (lambda whole: whole.replace(b'"step": 8', b'"step": "8"'), "not the state of a run"),
        (lambda whole: whole.replace(b'"run": "', b'"run": "other-'), "the state is of run 'other-"),
    ],
    ids=["half", "empty", "binary", "list", "foreign", "mistyped", "other run"],
)
def test_a_damaged_reference(client: EmaClient, run_name: str, tmp_path: Path, damage: Any, what: str) -> None:
    """Half a file, or somebody else's, is refused by name, with what to do about it; the run stays as it is."""
    train_from(client, run_name, tmp_path)
    path = tmp_path / "checkpoint-8" / f"ema-{run_name}.json"
    path.write_bytes(damage(path.read_bytes()))
    version = client.run(run_name).version
    with pytest.raises(UsageError, match=what) as caught:
        train_from(client, run_name, tmp_path, str(tmp_path / "checkpoint-8"))
    assert caught.value.detail.startswith(f"{path} does not say which EMA the checkpoint had: ")
    assert "or delete it, and with resume=True" in caught.value.hint
    assert client.run(run_name).version == version


@pytest.mark.parametrize("method", ["write_text", "replace"])
def test_a_reference_is_whole_or_not_there(
    client: EmaClient, run_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A training that ends while it is written leaves what was there before, whole, and nothing beside it."""
    train_from(client, run_name, tmp_path)
    folder = tmp_path / "checkpoint-16"
    path = folder / f"ema-{run_name}.json"
    before, names = path.read_bytes(), sorted(folder.iterdir())
    real, opened = getattr(Path, method), []

    def ends(self: Path, *args: Any) -> Any:
        if "ema-" in self.name:
            opened.append(self)
            # Half of it is on the disk by then.
            self.write_bytes(b"{")
            raise KeyboardInterrupt
        return real(self, *args)

    callback = RemoteEmaCallback(0.9, run=run_name, resume=True)
    trainer = a_trainer(tmp_path, Net())
    trainer.add_callback(callback)
    trainer.train()
    monkeypatch.setattr(Path, method, ends)
    with pytest.raises(KeyboardInterrupt):
        callback.on_save(trainer.args, trainer.state)
    callback.close()
    assert [part.parent for part in opened] == [folder]
    assert path.read_bytes() == before
    assert sorted(folder.iterdir()) == names


def test_checkpoints_elsewhere(client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """Where a Trainer saves in folders of its own, as in a hyperparameter search, they are left as they are."""

    class Searching(Trainer):
        def _get_output_dir(self, *_: Any, **__: Any) -> str:
            return str(tmp_path / "run-0")

    trainer = a_trainer(tmp_path, Net(), cls=Searching, save_strategy="steps", save_steps=16)
    ema = RemoteEmaCallback(0.9, run=run_name).attach(trainer)
    trainer.train()
    ema.close()
    assert (tmp_path / "run-0" / "checkpoint-16").is_dir()
    assert not list(tmp_path.rglob("ema-*.json"))
    assert not client.snapshots(run_name)


def test_checkpoints_that_transformers_refuses(tmp_path: Path) -> None:
    """Of a model that it sharded itself transformers makes none to go on from, whatever a callback does."""
    model = Net()
    model.is_distributed_loading_by_transformers = True
    with pytest.raises(ValueError, match="Resuming is not supported"):
        a_trainer(tmp_path, model, save_strategy="steps", save_steps=4)


def test_runs_of_one_trainer_have_their_own(client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """Each callback of several finds its own run's EMA again."""
    runs = [run_name, f"{run_name}-slow"]
    for checkpoint in (None, str(tmp_path / "checkpoint-8")):
        trainer = a_trainer(tmp_path, Net(), save_strategy="steps", save_steps=8)
        callbacks = [RemoteEmaCallback(decay, run=run) for decay, run in zip((0.9, 0.99), runs, strict=True)]
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert [client.run(run).num_updates for run in runs] == [16, 16]
        for callback in callbacks:
            callback.close()
