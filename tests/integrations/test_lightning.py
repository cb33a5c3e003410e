"""The Lightning callback under real Trainers: when it updates, whose weights are evaluated, what stands in checkpoints.

Knows Lightning. Does not know how weights travel.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ema_client import EmaClient
from ema_client.errors import ServiceUnreachable
from tests.integrations.lightning_training import BATCHES, Module, batches, lightning, trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ema_client.integrations.lightning import RemoteEmaCallback

# Lightning and torch warn of each other's deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("accumulate", [1, 4])
def test_one_update_for_each_optimizer_step(
    client: EmaClient, run_name: str, tmp_path: Path, litema: Any, trained: Any, same: Any, accumulate: int
) -> None:
    """Batches that only accumulate gradients are no updates; the EMA is LitEma's over optimizer steps, bit for bit."""
    module = Module(trained, litema)
    trainer(tmp_path, RemoteEmaCallback(0.9, run=run_name), accumulate_grad_batches=accumulate).fit(module, batches())
    assert client.run(run_name).num_updates == BATCHES // accumulate
    assert same(dict(client.pull(run_name)), module.oracle.shadow)


def test_validation_has_ema_weights_and_checkpoints_have_not(
    client: EmaClient, run_name: str, tmp_path: Path, trained: Any, same: Any
) -> None:
    """Validation, to the module's last hook, sees the EMA; training goes on, and is saved, with its own weights."""
    module = Module(trained)
    saver = lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    fitter = trainer(tmp_path, RemoteEmaCallback(0.9, run=run_name), saver, enable_checkpointing=True, max_epochs=2)
    fitter.fit(module, batches(), DataLoader(torch.zeros(1, 3)))
    # The sanity check before the training is of the weights as they came.
    assert len(module.evaluated) == 3
    now = dict(client.pull(run_name))
    assert same(module.evaluated[-1], now)
    assert same(module.at_end[-1], now)
    assert not same(module.evaluated[1], now)
    assert same(trained(module), module.stepped)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert same({name: saved[name] for name in module.stepped}, module.stepped)


@pytest.mark.usefixtures("client")
def test_a_validation_that_fails_gives_the_weights_back(run_name: str, tmp_path: Path, trained: Any, same: Any) -> None:
    """Whatever validation raises, the module holds its training weights afterwards."""

    class Failing(Module):
        def validation_step(self, *_: Any) -> None:
            if self.stepped:
                assert not same(self.copies(self), self.stepped)
                raise ZeroDivisionError

    module = Failing(trained)
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, RemoteEmaCallback(0.9, run=run_name)).fit(module, batches(), DataLoader(torch.zeros(1, 3)))
    assert same(trained(module), module.stepped)


def test_a_test_later_reads_the_run(client: EmaClient, run_name: str, tmp_path: Path, trained: Any, same: Any) -> None:
    """trainer.test() of another process has EMA weights without having trained; evaluate=False leaves them away."""
    trainer(tmp_path, RemoteEmaCallback(0.9, run=run_name)).fit(Module(trained), batches())
    fresh = Module(trained)
    before = trained(fresh)
    trainer(tmp_path, RemoteEmaCallback(0.9, run=run_name)).test(fresh, DataLoader(torch.zeros(1, 3)), verbose=False)
    assert same(fresh.evaluated[-1], dict(client.pull(run_name)))
    assert same(trained(fresh), before)
    plain = RemoteEmaCallback(0.9, run=run_name, evaluate=False)
    trainer(tmp_path, plain).test(fresh, DataLoader(torch.zeros(1, 3)), verbose=False)
    assert same(fresh.evaluated[-1], before)


def test_resuming_goes_on_with_the_run(
    client: EmaClient, run_name: str, tmp_path: Path, trained: Any, same: Any
) -> None:
    """A training that goes on from its checkpoint needs no word about its run, and has the EMA it had there.

    Also where the run had gone on since. Another name begins a new run.
    """
    saver = lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    callback = RemoteEmaCallback(0.9, run=run_name)
    trainer(tmp_path, callback, saver, enable_checkpointing=True).fit(Module(trained), batches())
    last = tmp_path / "last.ckpt"

    again = trainer(tmp_path, RemoteEmaCallback(0.9, run=run_name), max_epochs=2)
    again.fit(Module(trained), batches(), ckpt_path=last)
    assert client.run(run_name).num_updates == 2 * BATCHES
    once = {name: tensor.clone() for name, tensor in client.pull(run_name).items()}

    more = trainer(tmp_path, RemoteEmaCallback(0.9, run=run_name), max_epochs=2)
    more.fit(Module(trained), batches(), ckpt_path=last)
    assert client.run(run_name).num_updates == 2 * BATCHES
    assert same(dict(client.pull(run_name)), once)

    branch = trainer(tmp_path, RemoteEmaCallback(0.9, run=f"{run_name}-branch"), max_epochs=2)
    branch.fit(Module(trained), batches(), ckpt_path=last)
    assert client.run(f"{run_name}-branch").num_updates == BATCHES


def test_a_part_of_the_module(client: EmaClient, run_name: str, tmp_path: Path, trained: Any) -> None:
    """attribute= averages that part alone, by the names it has itself, as sgm does with its model."""
    module = Module(trained)
    callback = RemoteEmaCallback(0.9, run=run_name, attribute="net")
    trainer(tmp_path, callback).fit(module, batches(), DataLoader(torch.zeros(1, 3)))
    assert set(client.pull(run_name)) == set(trained(module.net))
    aside = module.stepped["aside.weight"]
    assert torch.equal(module.evaluated[-1]["aside.weight"], aside)


def test_the_older_package(client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """A Trainer of the package pytorch_lightning takes the callback too."""
    package = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")

    class Older(package.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 1)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            loss: Tensor = self.net(batch).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer(tmp_path, RemoteEmaCallback(0.9, run=run_name), package=package).fit(Older(), batches())
    assert client.run(run_name).num_updates == BATCHES


def test_a_service_that_is_not_there(tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training does not begin, and says where nothing listens."""
    nowhere = "http://127.0.0.1:9"  # the port "discard"
    monkeypatch.setattr("ema_client.http.retry.RetryPolicy.delay", lambda *_, **__: None)
    with pytest.raises(ServiceUnreachable, match=nowhere):
        trainer(tmp_path, RemoteEmaCallback(run="r", url=nowhere)).fit(Module(trained), batches())


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_two_processes(client: EmaClient, run_name: str, tmp_path: Path, server: Any, start_server: Any) -> None:
    """Under DDP the first process sends, once for each step, and both validate with the same EMA weights.

    Without the service both go on with their own weights; where a training begins without, both say so.
    """
    doomed = start_server(memory=True)
    env = {**os.environ, "EMA_SERVICE_URL": server.url, "PYTHONWARNINGS": "ignore"}
    program = str(Path(__file__).parent / "programs" / "lightning_ddp.py")
    command = [sys.executable, program, run_name, str(tmp_path), doomed.url, str(doomed.process.pid)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert client.run(run_name).num_updates == 4
    pulled = dict(client.pull(run_name))
    for rank in (0, 1):
        whole, without, nowhere = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert all(torch.equal(whole["validated"][name], pulled[name]) for name in pulled), rank
        assert not torch.equal(whole["after"]["net.weight"], pulled["net.weight"])
        assert [each["raised"] for each in (whole, without)] == ["", ""]
        assert torch.equal(without["validated"]["net.weight"], whole["after"]["net.weight"])
        assert torch.equal(without["after"]["net.weight"], whole["after"]["net.weight"])
        assert nowhere["raised"].startswith("ServiceUnreachable: ")
        assert "on rank 0" in nowhere["raised"]
