"""Trainings whose service goes away, or refuses, and what they then evaluate, save and end with.

Knows both frameworks, and what can go wrong beside a training. Does not know how weights travel.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ema_client import EmaClient
from ema_client.errors import EmaError, NonFinite, UsageError
from tests.conftest import ServerProcess
from tests.integrations.lightning_training import BATCHES, Module, batches, held_out, lightning, trainer
from tests.integrations.transformers_training import Net, a_trainer, transformers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ema_client.integrations import lightning as for_lightning
    from ema_client.integrations import transformers as for_transformers

# The frameworks and torch warn of each other's deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")

RUN = "outage"


@pytest.fixture
def service(start_server: Any, monkeypatch: pytest.MonkeyPatch) -> ServerProcess:
    """A service of one's own at a path that stays; nobody waits between two tries to reach the service."""
    monkeypatch.setattr("ema_client.http.retry.RetryPolicy.delay", lambda *_, **__: None)
    started: ServerProcess = start_server()
    monkeypatch.setenv("EMA_SERVICE_URL", started.uds)
    return started


def killed(service: ServerProcess) -> None:
    service.kill()


def deleted(service: ServerProcess) -> None:
    with EmaClient(service.uds) as client:
        client.delete_run(RUN)


def taken_over(service: ServerProcess) -> None:
    with EmaClient(service.uds) as client:
        client.attach(RUN)


# --- Lightning ------------------------------------------------------------------------------------------------------


class AtStep(lightning.Callback):
    """Does something before a step of the training."""

    def __init__(self, step: int, what: Callable[[Any], None]) -> None:
        self._step, self._what = step, what

    def on_train_batch_start(self, fitter: Any, module: Any, *_: Any) -> None:
        if fitter.global_step == self._step:
            self._what(module)


def fit(folder: Path, module: nn.Module, *others: Any, checkpoint: Path | None = None, **options: Any) -> Any:
    """Two epochs, each with a validation and a checkpoint."""
    callback = for_lightning.RemoteEmaCallback(0.9, run=RUN, **options)
    saver = lightning.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
    fitter = trainer(folder, *others, callback, saver, enable_checkpointing=True, max_epochs=2)
    fitter.fit(module, batches(), held_out(), ckpt_path=checkpoint)
    return callback


def lacks(path: Path) -> str:
    found: str = torch.load(path, weights_only=True)["callbacks"]["RemoteEmaCallback"].get("lacks", "")
    return found


@pytest.mark.parametrize("fault", [killed, deleted, taken_over])
def test_lightning_trains_on(
    service: ServerProcess, tmp_path: Path, trained: Any, same: Any, caplog: Any, fault: Callable[[ServerProcess], None]
) -> None:
    """A training goes on to its end without its service or run; it evaluates and saves its own weights, and says so.

    Also where another training has taken over the run: the EMA there is no longer this training's.
    """
    module = Module(trained)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, module, AtStep(2, lambda _: fault(service)))
    told = [str(each.message) for each in caught if "without the EMA" in str(each.message)]
    assert len(told) == 2
    assert all(f"evaluated are the training weights, without the EMA of run '{RUN}'" in each for each in told)
    # Two epochs, after the sanity check.
    assert len(module.evaluated) == 3
    assert same(module.evaluated[-1], module.stepped)
    assert "a checkpoint is written without the EMA" in caplog.text
    for epoch in (0, 1):
        path = tmp_path / f"epoch={epoch}.ckpt"
        assert lacks(path)


def test_lightning_comes_back(service: ServerProcess, tmp_path: Path, trained: Any, same: Any) -> None:
    """The service back, the training evaluates the EMA again and saves it; a checkpoint without EMA is gone on from."""
    module = Module(trained)
    both = [AtStep(2, lambda _: service.kill()), AtStep(BATCHES + 2, lambda _: service.start())]
    fit(tmp_path, module, *both)
    without, last = tmp_path / "epoch=0.ckpt", tmp_path / "epoch=1.ckpt"
    with EmaClient(service.uds) as client:
        now = {name: tensor.clone() for name, tensor in client.pull(RUN).items()}
        assert client.run(RUN).num_updates < 2 * BATCHES
    assert same(module.evaluated[-1], now)
    assert lacks(without)
    assert not lacks(last)

    fitter = trainer(tmp_path, for_lightning.RemoteEmaCallback(0.9, run=RUN))
    with pytest.warns(UserWarning, match=r"epoch=0.ckpt was written without its EMA: .*own weights"):
        fitter.test(again := Module(trained), held_out(), ckpt_path=without, verbose=False)
    assert same(again.evaluated[-1], trained(again))
    with pytest.warns(UserWarning, match=rf"without its EMA: .* goes on with the EMA .* the checkpoint's, {BATCHES}"):
        fit(tmp_path / "again", Module(trained), checkpoint=without)


@pytest.mark.parametrize("where", ["validation", "checkpoint", "end"])
def test_lightning_raises_if_told_to(
    service: ServerProcess, tmp_path: Path, trained: Any, same: Any, where: str
) -> None:
    """on_unreachable="raise" ends the training with the error, and the module has its training weights."""
    module = Module(trained)
    callback = for_lightning.RemoteEmaCallback(0.9, run=RUN, on_unreachable="raise")
    callbacks = [AtStep(2, lambda _: service.kill()), callback]
    if where == "checkpoint":
        callbacks.append(lightning.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1))
    fitter = trainer(tmp_path, *callbacks, enable_checkpointing=where == "checkpoint")
    with pytest.raises(EmaError):
        fitter.fit(module, batches(), held_out() if where == "validation" else None)
    assert same(trained(module), module.stepped)


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize("raises", [False, True])
def test_lightning_with_nan(tmp_path: Path, trained: Any, same: Any, raises: bool) -> None:
    """An update refused for its NaN leaves the EMA as it was, which is evaluated and saved; or is raised."""

    def spoil(module: Any) -> None:
        module.kept = [p.detach().clone() for p in module.parameters()]
        module.aside.bias.data.fill_(float("nan"))

    class Spoilt(Module):
        def training_step(self, batch: Any, index: int) -> Any:
            loss = (self.net(batch) + self.aside(batch)).square().mean()
            return loss * 0 if index == 2 else loss

        def on_train_batch_end(self, *_: Any) -> None:
            if hasattr(self, "kept"):
                for parameter, value in zip(self.parameters(), self.kept, strict=True):
                    parameter.data.copy_(value)
                del self.kept

    module = Spoilt(trained)
    if raises:
        with pytest.raises(NonFinite):
            fit(tmp_path, module, AtStep(2, spoil), on_unreachable="raise")
        return
    fit(tmp_path, module, AtStep(2, spoil))
    assert not lacks(tmp_path / "epoch=1.ckpt")
    with EmaClient() as client:
        assert client.run(RUN).num_updates == 2 * BATCHES - 1
        assert same(module.evaluated[-1], dict(client.pull(RUN)))


def test_an_unknown_policy() -> None:
    """A policy that there is not is refused at once, with those that there are."""
    for callback in (for_lightning.RemoteEmaCallback, for_transformers.RemoteEmaCallback):
        with pytest.raises(UsageError, match="'ignore' is unknown") as caught:
            callback(run=RUN, on_unreachable="ignore")  # type: ignore[arg-type]
        assert "'warn' or 'raise'" in caught.value.hint


# --- transformers ---------------------------------------------------------------------------------------------------


class AtTrainStep(transformers.TrainerCallback):
    """Does something before a step of the training."""

    def __init__(self, step: int, what: Callable[[], None]) -> None:
        self._step, self._what = step, what

    def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == self._step:
            self._what()


def train(folder: Path, *others: Any, checkpoint: Path | None = None, **options: Any) -> Any:
    """16 steps, with an evaluation and a checkpoint at each eighth."""
    each = {"eval_strategy": "steps", "eval_steps": 8, "save_strategy": "steps", "save_steps": 8}
    made = a_trainer(folder, Net(), **each)
    callback = for_transformers.RemoteEmaCallback(0.9, run=RUN, **options).attach(made)
    for other in others:
        made.add_callback(other)
    try:
        made.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    finally:
        callback.close()
    return made


def test_transformers_trains_on(service: ServerProcess, tmp_path: Path, trained: Any, same: Any, caplog: Any) -> None:
    """A training goes on to its end without its service; it evaluates and saves its own weights, and says so."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = train(tmp_path, AtTrainStep(2, lambda: service.kill()))
    told = [str(each.message) for each in caught if "without the EMA" in str(each.message)]
    assert len(told) == 2
    assert made.state.global_step == 16
    assert same(made.evaluated[-1], trained(made.model))
    assert "a checkpoint is written without the EMA" in caplog.text
    said = json.loads((tmp_path / "checkpoint-8" / f"ema-{RUN}.json").read_text())
    assert said["lacks"]


def test_transformers_comes_back(service: ServerProcess, tmp_path: Path, same: Any) -> None:
    """The service back, the training evaluates the EMA again; a checkpoint without its EMA is gone on from."""
    made = train(tmp_path, AtTrainStep(2, lambda: service.kill()), AtTrainStep(10, lambda: service.start() and None))
    with EmaClient(service.uds) as client:
        assert same(made.evaluated[-1], dict(client.pull(RUN)))
    with pytest.warns(UserWarning, match=r"checkpoint-8 was written without its EMA: .* goes on with the EMA .*, 8"):
        train(tmp_path, checkpoint=tmp_path / "checkpoint-8")


def test_transformers_raises_if_told_to(service: ServerProcess, tmp_path: Path) -> None:
    """on_unreachable="raise" ends the training with the error."""
    with pytest.raises(EmaError):
        train(tmp_path, AtTrainStep(2, lambda: service.kill()), on_unreachable="raise")
