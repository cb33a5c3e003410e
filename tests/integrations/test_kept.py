"""The snapshots of checkpoints: which stay on the service while frameworks keep, replace and delete checkpoints.

Knows both frameworks' ways to keep a few checkpoints of many. Does not know what is evaluated, or how weights travel.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ema_client import EmaClient
from ema_service.tokens import create_token
from tests.integrations.lightning_training import BATCHES, Module, batches, held_out, lightning, trainer
from tests.integrations.transformers_training import Net, Trainer, a_trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ema_client.integrations import lightning as for_lightning
    from ema_client.integrations import transformers as for_transformers
    from ema_client.integrations.kept import KeptSnapshots

# The frameworks and torch warn of each other's deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")

#: More than the ten snapshots that stay of RemoteEma.state_dict().
EPOCHS = 13


def snapshots(client: EmaClient, run: str) -> set[str]:
    return {snapshot.name for snapshot in client.snapshots(run)}


# --- Lightning ------------------------------------------------------------------------------------------------------


class Scored(Module):
    """Validates best at first, and worse and worse."""

    def validation_step(self, *_: Any) -> None:
        super().validation_step()
        self.log("score", torch.tensor(-float(self.trainer.current_epoch)))


def fit(folder: Path, callback: Any, trained: Any, *, epochs: int = EPOCHS, checkpoint: Path | None = None) -> None:
    """Train, and keep the two best checkpoints and the newest."""
    options: dict[str, Any] = {"dirpath": folder, "enable_version_counter": False}
    best = lightning.callbacks.ModelCheckpoint(
        **options, monitor="score", mode="max", save_top_k=2, filename="best-{epoch}"
    )
    newest = lightning.callbacks.ModelCheckpoint(**options, filename="newest-{epoch}")
    limits = {"max_epochs": epochs, "num_sanity_val_steps": 0}
    fitter = trainer(folder, callback, best, newest, enable_checkpointing=True, **limits)
    fitter.fit(Scored(trained), batches(), held_out(), ckpt_path=checkpoint)


def referred(folder: Path) -> dict[str, str]:
    """Each checkpoint in a folder -> the snapshot that it refers to."""
    paths = sorted(folder.glob("*.ckpt"))
    return {
        path.stem: torch.load(path, weights_only=True)["callbacks"]["RemoteEmaCallback"]["snapshot"] for path in paths
    }


def test_the_best_checkpoints_keep_their_ema(
    client: EmaClient, run_name: str, tmp_path: Path, trained: Any, same: Any
) -> None:
    """Of many checkpoints those that Lightning keeps have their EMA, though older than ten others; no other stays.

    Also those of an earlier process, in a training that goes on.
    """
    fit(tmp_path, for_lightning.RemoteEmaCallback(0.9, run=run_name), trained)
    kept = referred(tmp_path)
    assert set(kept) == {"best-epoch=0", "best-epoch=1", f"newest-epoch={EPOCHS - 1}"}
    assert snapshots(client, run_name) == set(kept.values())
    module = Module(trained)
    fitter = trainer(tmp_path, for_lightning.RemoteEmaCallback(0.9, run=run_name))
    fitter.test(module, held_out(), ckpt_path=tmp_path / "best-epoch=0.ckpt", verbose=False)
    assert same(module.evaluated[-1], dict(client.pull(run_name, snapshot=kept["best-epoch=0"])))

    again, newest = for_lightning.RemoteEmaCallback(0.9, run=run_name), f"newest-epoch={EPOCHS - 1}"
    fit(tmp_path, again, trained, epochs=EPOCHS + 2, checkpoint=tmp_path / f"{newest}.ckpt")
    after = referred(tmp_path)
    # Lightning never removes the checkpoint that it went on from.
    assert set(after) == {"best-epoch=0", "best-epoch=1", newest, f"newest-epoch={EPOCHS + 1}"}
    assert after["best-epoch=0"] == kept["best-epoch=0"]
    assert snapshots(client, run_name) == set(after.values())


@pytest.mark.soak
def test_a_token_that_may_not_delete(
    start_server: Any, run_name: str, tmp_path: Path, trained: Any, caplog: Any
) -> None:
    """A trainer's token may not delete: new snapshots take the places of those that nobody refers to any more."""
    file = tmp_path / "tokens"
    token = create_token(file, ["push", "pull"], "*")
    url = start_server("--token-file", str(file)).url
    callback = for_lightning.RemoteEmaCallback(0.9, run=run_name, url=url, token=token)
    fit(tmp_path, callback, trained)
    kept = referred(tmp_path)
    with EmaClient(url, token=token) as client:
        there = snapshots(client, run_name)
    assert set(kept.values()) <= there
    # As many as there were checkpoints at a time: two, the newest, and the one being written.
    assert len(there) <= 4
    assert not [each for each in caplog.records if each.name == "ema_client" and each.levelno >= logging.WARNING]


def test_so_many_and_no_more(client: EmaClient, run_name: str, tmp_path: Path, trained: Any) -> None:
    """keep= lets the newest stay, whichever checkpoints there are."""
    fit(tmp_path, for_lightning.RemoteEmaCallback(0.9, run=run_name, keep=2), trained, epochs=4)
    steps = [snapshot.step for snapshot in client.snapshots(run_name)]
    assert sorted(step for step in steps if step is not None) == [3 * BATCHES, 4 * BATCHES]


# --- transformers ---------------------------------------------------------------------------------------------------


class Worsening(Trainer):
    """Evaluates worse and worse."""

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        return bool(super()._determine_best_metric({**metrics, "eval_worse": -float(self.state.global_step)}, trial))


def train(folder: Path, run: str, *, epochs: int, checkpoint: str | None = None) -> None:
    """Train, and keep the best checkpoint, the first, and the newest."""
    each = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"metric_for_best_model": "worse", "greater_is_better": True, "load_best_model_at_end": True}
    made = a_trainer(folder, Net(), cls=Worsening, max_steps=epochs, save_total_limit=2, **each, **best)
    callback = for_transformers.RemoteEmaCallback(0.9, run=run).attach(made)
    made.train(resume_from_checkpoint=checkpoint)
    callback.close()


def reference(folder: Path, run: str) -> str:
    found: str = json.loads((folder / f"ema-{run}.json").read_text())["snapshot"]
    return found


def test_transformers_best_checkpoint_keeps_its_ema(client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """Of many checkpoints those that the Trainer keeps have their EMA, and no other stays; also when training goes on.

    The EMA of a checkpoint that somebody moved before the training went on stays as well.
    """
    train(tmp_path, run_name, epochs=EPOCHS)
    there = {path.name: reference(path, run_name) for path in tmp_path.glob("checkpoint-*")}
    assert set(there) == {"checkpoint-1", f"checkpoint-{EPOCHS}"}
    assert snapshots(client, run_name) == set(there.values())

    moved = tmp_path / "kept"
    shutil.copytree(tmp_path / f"checkpoint-{EPOCHS}", moved)
    train(tmp_path, run_name, epochs=EPOCHS + 2, checkpoint=str(moved))
    after = {path.name: reference(path, run_name) for path in tmp_path.glob("checkpoint-*")}
    assert set(after) == {"checkpoint-1", f"checkpoint-{EPOCHS + 2}"}
    assert snapshots(client, run_name) >= set(after.values())


# --- the bookkeeping ------------------------------------------------------------------------------------------------


def test_one_snapshot_of_two_checkpoints(client: EmaClient, run_name: str) -> None:
    """Two checkpoints of one step have one snapshot, which stays until both are gone; a path written anew lets go."""
    client.create_run(run_name, {"w": torch.zeros(2)})
    kept = KeptSnapshots(client, run_name)
    first = kept.state()["snapshot"]
    kept.hold("a", first)
    assert kept.state()["snapshot"] == first
    kept.hold("b", first)
    kept.let_go("a")
    assert snapshots(client, run_name) == {first}
    client.push(run_name, {"w": torch.ones(2)})
    second = kept.state()["snapshot"]
    kept.hold("b", second)
    assert snapshots(client, run_name) == {second}
    assert kept.held == {"b": second}


def test_what_cannot_be_deleted_now(start_server: Any, run_name: str, caplog: Any, monkeypatch: Any) -> None:
    """While the service is away a checkpoint's end is no error: its snapshot is deleted when the service is back."""
    monkeypatch.setattr("ema_client.http.retry.RetryPolicy.delay", lambda *_, **__: None)
    service = start_server()
    with EmaClient(service.uds) as client:
        client.create_run(run_name, {"w": torch.zeros(2)})
        kept = KeptSnapshots(client, run_name)
        kept.hold("a", kept.state()["snapshot"])
        client.push(run_name, {"w": torch.ones(2)})
        kept.hold("b", second := kept.state()["snapshot"])
        service.kill()
        kept.let_go("a")
        assert "of a checkpoint that is gone stays" in caplog.text
        service.start()
        client.push(run_name, {"w": torch.zeros(2)})
        kept.hold("c", third := kept.state()["snapshot"])
        kept.let_go("b")
        assert snapshots(client, run_name) == {third}
        assert second != third
