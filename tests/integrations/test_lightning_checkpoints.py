"""Lightning's checkpoints: each with the training weights and its own EMA, whenever it is made or evaluated.

Knows Lightning, and which EMA belongs to which weights. Does not know how weights travel, or outages.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import RunExists
from tests.integrations.lightning_training import BATCHES, Module, batches, held_out, lightning, trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ema_client.integrations.lightning import RemoteEmaCallback

# Lightning and torch warn of each other's deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")

Weights = dict[str, Tensor]
Trained = Callable[[Any], Weights]


def saver(folder: Path, **options: Any) -> Any:
    """A ModelCheckpoint that keeps the checkpoint of each epoch."""
    options = {"save_top_k": -1, "filename": "{epoch}", **options}
    return lightning.callbacks.ModelCheckpoint(folder, **options)


def state_in(path: Path) -> dict[str, Any]:
    """The callback's part of a checkpoint."""
    parts = torch.load(path, weights_only=True)["callbacks"]
    state: dict[str, Any] = parts["RemoteEmaCallback"]
    return state


def weights_in(path: Path, like: Weights) -> Weights:
    saved = torch.load(path, weights_only=True)["state_dict"]
    return {name: saved[name] for name in like}


class Trainings:
    """A training of two epochs with a checkpoint each: the EMA of the first, of now, and the Trainer's parts."""

    def __init__(self, client: EmaClient, run: str, folder: Path, trained: Trained, **options: Any) -> None:
        self.callback, self.module = RemoteEmaCallback(0.9, run=run), Module(trained)
        self.trainer = trainer(folder, self.callback, saver(folder, **options), enable_checkpointing=True, max_epochs=2)
        self.trainer.fit(self.module, batches())
        self.first = folder / "epoch=0.ckpt"
        self.ema_then = dict(client.pull(run, snapshot=state_in(self.first)["snapshot"]))
        self.ema_now = {name: tensor.clone() for name, tensor in client.pull(run).items()}
        self.weights_then = weights_in(self.first, self.ema_now)


def evaluate(fitter: Any, how: str, module: Module, **options: Any) -> Weights:
    """The weights that the module was evaluated with."""
    quiet = {} if how == "predict" else {"verbose": False}
    getattr(fitter, how)(module, held_out(), **quiet, **options)
    return module.evaluated[-1]


# --- evaluating -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_only", [False, True])
def test_evaluating_a_checkpoint(
    client: EmaClient, run_name: str, tmp_path: Path, trained: Any, same: Any, weights_only: bool
) -> None:
    """With ckpt_path= the EMA of that checkpoint is evaluated: in the Trainer that wrote it, and in any other."""
    made = Trainings(client, run_name, tmp_path, trained, save_weights_only=weights_only)
    assert not same(made.ema_then, made.ema_now)
    # Without a path it is the EMA of the training's end.
    assert same(evaluate(made.trainer, "validate", made.module), made.ema_now)
    other = trainer(tmp_path, RemoteEmaCallback(0.9, run=run_name))
    for fitter, module in ((made.trainer, made.module), (other, Module(trained))):
        for how in ("validate", "test", "predict"):
            assert same(evaluate(fitter, how, module, ckpt_path=made.first), made.ema_then), how
            assert same(trained(module), made.weights_then), how


def test_checkpoints_without_an_ema(client: EmaClient, run_name: str, tmp_path: Path, trained: Any, same: Any) -> None:
    """Where a checkpoint's EMA is not to be had, the checkpoint's own weights are evaluated, and a warning says why."""
    made = Trainings(client, run_name, tmp_path, trained)
    trainer(tmp_path, saver(tmp_path / "plain"), enable_checkpointing=True).fit(Module(trained), batches())
    fitter = trainer(tmp_path, RemoteEmaCallback(0.9, run=run_name))
    plain = tmp_path / "plain" / "epoch=0.ckpt"
    with pytest.warns(UserWarning, match=r"checkpoint .*plain/epoch=0.ckpt says nothing of an EMA: evaluated are"):
        assert same(evaluate(fitter, "test", Module(trained), ckpt_path=plain), weights_in(plain, made.ema_now))

    client.delete_snapshot(run_name, state_in(made.first)["snapshot"])
    with pytest.warns(UserWarning, match="evaluated are the training weights, without the EMA.*no snapshot"):
        assert same(evaluate(fitter, "test", Module(trained), ckpt_path=made.first), made.weights_then)


def test_a_module_from_elsewhere(client: EmaClient, run_name: str, tmp_path: Path, trained: Any, same: Any) -> None:
    """load_from_checkpoint() tells nobody: the run as it is now is evaluated, and a warning says so."""
    made = Trainings(client, run_name, tmp_path, trained)
    module = Module(trained)
    module.load_state_dict(torch.load(made.first, weights_only=True)["state_dict"])
    with pytest.warns(
        UserWarning, match=rf"'{run_name}' as it is now, of step {2 * BATCHES}: this Trainer has neither"
    ):
        seen = evaluate(trainer(tmp_path, RemoteEmaCallback(0.9, run=run_name)), "test", module)
    assert same(seen, made.ema_now)


def test_validating_before_the_training(
    client: EmaClient, run_name: str, tmp_path: Path, trained: Any, same: Any
) -> None:
    """validate(), for a baseline, and fit() after it work; a checkpoint made before the training misses no EMA."""
    module = Module(trained)
    before = trained(module)
    fitter = trainer(tmp_path, RemoteEmaCallback(0.9, run=run_name))
    with pytest.warns(UserWarning, match="evaluated are the weights as they are, for there is no EMA yet"):
        assert same(evaluate(fitter, "validate", module), before)
    fitter.save_checkpoint(tmp_path / "before.ckpt")
    fitter.fit(module, batches(), ckpt_path=tmp_path / "before.ckpt")
    assert client.run(run_name).num_updates == BATCHES


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_service_without_a_disk(
    start_server: Any, run_name: str, tmp_path: Path, trained: Any, same: Any, goes_on: bool
) -> None:
    """A checkpoint that is the run's newest has its EMA even so; of an older one a warning says that it is gone."""
    url = start_server(memory=True).url
    module, last = Module(trained), tmp_path / "epoch=0.ckpt"
    fitter = trainer(
        tmp_path, RemoteEmaCallback(0.9, run=run_name, url=url), saver(tmp_path), enable_checkpointing=True
    )
    fitter.fit(module, batches())
    weights = trained(module)
    with EmaClient(url) as client:
        now = {name: tensor.clone() for name, tensor in client.pull(run_name).items()}
        if goes_on:
            client.push(run_name, weights, writer=client.attach(run_name))
    other = trainer(tmp_path, RemoteEmaCallback(0.9, run=run_name, url=url))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = evaluate(other, "test", Module(trained), ckpt_path=last)
    assert same(seen, weights if goes_on else now)
    assert any("of which there is no snapshot" in str(each.message) for each in caught) == goes_on


# --- made while the module holds EMA weights ------------------------------------------------------------------------


class Saving(lightning.Callback):
    """Saves a checkpoint in a hook of the evaluation, as another callback may."""

    def __init__(self, hook: str, path: Path, **options: Any) -> None:
        self.seen: list[Weights] = []
        setattr(self, hook, self._save)
        self._path, self._options = path, options

    def _save(self, fitter: Any, module: Any, *_: Any, **__: Any) -> None:
        if not fitter.sanity_checking:
            fitter.save_checkpoint(self._path, **self._options)
            self.seen.append(module.copies(module))


@pytest.mark.parametrize("weights_only", [False, pytest.param(True, marks=pytest.mark.soak)])
@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_end", "on_validation_epoch_end"])
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
def test_checkpoints_in_the_middle_of_a_validation(
    client: EmaClient,
    run_name: str,
    tmp_path: Path,
    trained: Any,
    same: Any,
    hook: str,
    first: bool,
    weights_only: bool,
) -> None:
    """Whoever saves a checkpoint, in whichever hook: it holds training weights, and the validation goes on with EMA."""
    path, module = tmp_path / "inside.ckpt", Module(trained)
    other, ema = Saving(hook, path, weights_only=weights_only), RemoteEmaCallback(0.9, run=run_name)
    trainer(tmp_path, *((other, ema) if first else (ema, other))).fit(module, batches(), held_out())
    now = dict(client.pull(run_name))
    assert same(weights_in(path, now), module.stepped)
    assert same(trained(module), module.stepped)
    assert not same(module.stepped, now)
    assert same(module.evaluated[-1], now)
    assert same(module.at_end[-1], now)
    # The callback that comes first in on_validation_start comes before the swap.
    assert same(other.seen[-1], module.stepped if first and hook == "on_validation_start" else now)

    again = Module(trained)
    assert same(evaluate(trainer(tmp_path, RemoteEmaCallback(0.9, run=run_name)), "test", again, ckpt_path=path), now)


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("how", ["module", "test"])
def test_checkpoints_in_other_evaluations(run_name: str, tmp_path: Path, trained: Any, same: Any, how: str) -> None:
    """Also where the module itself saves, at the end of its own epoch, and in a test."""
    path = tmp_path / "inside.ckpt"

    class SavingModule(Module):
        def on_validation_epoch_end(self) -> None:
            if self.stepped:
                self.trainer.save_checkpoint(path)

        on_test_epoch_end = on_validation_epoch_end

    module = SavingModule(trained)
    fitter = trainer(tmp_path, RemoteEmaCallback(0.9, run=run_name))
    fitter.fit(module, batches(), held_out() if how == "module" else None)
    if how == "test":
        fitter.test(module, held_out(), verbose=False)
    assert not same(module.evaluated[-1], module.stepped)
    assert same(weights_in(path, module.stepped), module.stepped)


@pytest.mark.usefixtures("client")
def test_checkpoints_of_a_validation_that_fails(run_name: str, tmp_path: Path, trained: Any, same: Any) -> None:
    """The checkpoint that is made for the exception holds training weights."""

    class Failing(Module):
        def validation_step(self, *_: Any) -> None:
            if self.stepped:
                assert not same(self.copies(self), self.stepped)
                raise ZeroDivisionError

    module = Failing(trained)
    made = lightning.callbacks.OnExceptionCheckpoint(tmp_path, "failed")
    fitter = trainer(tmp_path, made, RemoteEmaCallback(0.9, run=run_name), enable_checkpointing=True)
    with pytest.raises(ZeroDivisionError):
        fitter.fit(module, batches(), held_out())
    assert same(weights_in(tmp_path / "failed.ckpt", module.stepped), module.stepped)


# --- one callback, several trainings --------------------------------------------------------------------------------


def test_training_on(client: EmaClient, run_name: str, tmp_path: Path, trained: Any, litema: Any, same: Any) -> None:
    """fit() of the same module again, in the same Trainer or another, goes on with the run: LitEma over all steps."""
    module, callback = Module(trained, litema), RemoteEmaCallback(0.9, run=run_name)
    fitter = trainer(tmp_path, callback)
    fitter.fit(module, batches())
    fitter.fit_loop.max_epochs = 2
    fitter.fit(module, batches())
    trainer(tmp_path, callback).fit(module, batches())
    assert callback.run == run_name
    assert client.run(run_name).num_updates == 3 * BATCHES
    assert same(dict(client.pull(run_name)), module.oracle.shadow)


def test_training_another_module(
    client: EmaClient, run_name: str, tmp_path: Path, trained: Any, litema: Any, same: Any, caplog: Any
) -> None:
    """Each further module has a run of its own, named in the log; a module that comes again has its own run again."""
    callback = RemoteEmaCallback(0.9, run=run_name)
    modules = [Module(trained, litema), Module(trained, litema)]
    for module in modules:
        trainer(tmp_path, callback).fit(module, batches())
    assert callback.run == f"{run_name}-2"
    assert f"its run is '{run_name}-2'" in caplog.text
    trainer(tmp_path, callback).fit(modules[0], batches())
    assert callback.run == run_name
    for module, run, count in zip(modules, (run_name, f"{run_name}-2"), (2, 1), strict=True):
        assert client.run(run).num_updates == count * BATCHES
        assert same(dict(client.pull(run)), module.oracle.shadow)
        evaluated = evaluate(trainer(tmp_path, callback), "test", module)
        assert same(evaluated, module.oracle.shadow)


@pytest.mark.usefixtures("client")
def test_another_callback_of_the_same_name(run_name: str, tmp_path: Path, trained: Any) -> None:
    """A run that another program made is not gone on with unasked."""
    trainer(tmp_path, RemoteEmaCallback(0.9, run=run_name)).fit(Module(trained), batches())
    with pytest.raises(RunExists, match=run_name):
        trainer(tmp_path, RemoteEmaCallback(0.9, run=run_name)).fit(Module(trained), batches())


def test_a_checkpoint_of_another_run(client: EmaClient, run_name: str, tmp_path: Path, trained: Any) -> None:
    """Where a run is gone on with from the checkpoint of another run, a warning names both."""
    made = Trainings(client, run_name, tmp_path, trained)
    other = f"{run_name}-other"
    trainer(tmp_path, RemoteEmaCallback(0.9, run=other)).fit(Module(trained), batches())
    fitter = trainer(tmp_path, RemoteEmaCallback(0.9, run=other, resume=True), max_epochs=2)
    with pytest.warns(UserWarning, match=rf"EMA is of run '{run_name}': run '{other}' goes on with the EMA .* has now"):
        fitter.fit(Module(trained), batches(), ckpt_path=made.first)
    assert client.run(other).num_updates == 2 * BATCHES


def test_a_trial_of_the_program(client: EmaClient, run_name: str, tmp_path: Path, trained: Any) -> None:
    """fast_dev_run has a run that is gone after it, and leaves the name to the training."""
    module, callback = Module(trained), RemoteEmaCallback(0.9, run=run_name)
    trial = trainer(tmp_path, callback, fast_dev_run=True)
    trial.fit(module, batches(), held_out())
    assert len(module.evaluated) == 1
    assert not [run for run in client.runs() if run.run.startswith(run_name)]
    trainer(tmp_path, callback).fit(Module(trained), batches())
    assert client.run(run_name).num_updates == BATCHES


def test_a_training_that_failed(client: EmaClient, run_name: str, tmp_path: Path, trained: Any) -> None:
    """After a training that broke off, fit() of the same module goes on with its run, in a copy's Trainer too."""

    class Failing(Module):
        fails = True

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            if self.fails and index == 2:
                raise ZeroDivisionError
            return super().training_step(batch, index)

    module, callback = Failing(trained), RemoteEmaCallback(0.9, run=run_name)
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, callback).fit(module, batches())
    module.fails = False
    trainer(tmp_path, callback).fit(module, batches())
    assert client.run(run_name).num_updates == 2 + BATCHES
    copied = copy.deepcopy(callback)
    trainer(tmp_path, copied).fit(Module(trained), batches())
    assert copied.run == f"{run_name}-2"


def test_looking_for_a_learning_rate(client: EmaClient, run_name: str, tmp_path: Path, trained: Any) -> None:
    """Lightning's own short trainings, which it takes back, count no updates."""
    module = Module(trained)
    module.lr = 0.1
    finder = lightning.callbacks.LearningRateFinder(num_training_steps=4)
    trainer(tmp_path, RemoteEmaCallback(0.9, run=run_name), finder, enable_checkpointing=True).fit(module, batches())
    run = client.run(run_name)
    assert (run.num_updates, run.step) == (BATCHES, BATCHES)
