"""What the callbacks take: everything that RemoteEma takes, and Lightning's own words, which mean what they mean there.

Knows both frameworks. Does not know how weights travel.
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_client import EmaClient, RemoteEma
from ema_client.errors import UsageError
from ema_client.integrations.options import RemoteEmaOptions
from ema_client.protocol import AverageConfig
from tests.integrations.lightning_training import BATCHES, Module, batches, held_out, lightning, trainer
from tests.integrations.transformers_training import Net, a_trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ema_client.integrations import lightning as for_lightning
    from ema_client.integrations import transformers as for_transformers

# The frameworks and torch warn of each other's deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")

CALLBACKS = [for_lightning.RemoteEmaCallback, for_transformers.RemoteEmaCallback]


@pytest.mark.parametrize("callback", CALLBACKS)
def test_everything_that_remote_ema_takes(callback: Any) -> None:
    """Each option of RemoteEma is one of each callback's; what RemoteEma does not take is refused as Python does."""
    # The callback has the model, and what is loaded of a checkpoint, from its framework, and makes its own client.
    theirs = set(inspect.signature(RemoteEma).parameters) - {"model", "client", "step", "state"}
    named = set(inspect.signature(callback).parameters) - {"options"}
    assert theirs <= named | set(RemoteEmaOptions.__annotations__)
    assert set(RemoteEmaOptions.__annotations__) <= theirs
    with pytest.raises(TypeError, match="unexpected keyword argument 'decays'"):
        callback(run="r", decays=0.9)


OPTIONS: dict[str, Any] = {
    "averages": [AverageConfig(), AverageConfig(name="slow", decay=0.999)],
    "decay_per": "step",
    "durability": "disk",
    "on_busy": "block",
    "push_dtype": torch.bfloat16,
    "update_every": 4,
}


def check_options(client: EmaClient, run: str, steps: int) -> None:
    info = client.run(run)
    assert [average.name for average in info.averages] == ["ema", "slow"]
    assert (info.decay_per, info.durability) == ("step", "disk")
    assert (info.step, info.num_updates) == (steps, steps)
    assert set(client.pull(run, average="slow")) == set(client.pull(run))


def test_lightning_takes_them(client: EmaClient, run_name: str, tmp_path: Path, trained: Any) -> None:
    """They do under Lightning what they do in RemoteEma; each fourth step is sent."""
    callback = for_lightning.RemoteEmaCallback(0.9, run=run_name, **OPTIONS)
    sent: list[int] = []

    class Counting(Module):
        def on_train_end(self) -> None:
            assert callback.ema
            sent.append(callback.ema.stats.sent)

    trainer(tmp_path, callback).fit(Counting(trained), batches())
    check_options(client, run_name, BATCHES)
    assert sent == [BATCHES // 4]


def test_transformers_takes_them(client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """They do under transformers what they do in RemoteEma; each fourth step is sent."""
    made = a_trainer(tmp_path, Net())
    callback = for_transformers.RemoteEmaCallback(0.9, run=run_name, **OPTIONS).attach(made)
    made.train()
    check_options(client, run_name, 16)
    assert callback.ema
    assert callback.ema.stats.sent == 4
    callback.close()


@pytest.mark.parametrize("policy", ["average", "copy"])
def test_buffers(client: EmaClient, run_name: str, tmp_path: Path, trained: Any, policy: Any) -> None:
    """BatchNorm's statistics are averaged or copied, evaluated with the EMA, and the module's own again after it."""

    class Watched(Module):
        def validation_step(self, *_: Any) -> None:
            self.statistics = self.net[1].running_mean.clone()

    module = Watched(trained)
    callback = for_lightning.RemoteEmaCallback(0.9, run=run_name, buffers=policy)
    trainer(tmp_path, callback).fit(module, batches(), held_out())
    seen = dict(client.pull(run_name))
    assert torch.equal(module.statistics, seen["net.1.running_mean"])
    assert torch.equal(module.net[1].running_mean, seen["net.1.running_mean"]) == (policy == "copy")


# --- Lightning's words ----------------------------------------------------------------------------------------------


class Theirs(lightning.callbacks.EMAWeightAveraging):
    """Lightning's own callback, which remembers after which steps it updates."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: list[int | str] = []

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        due = bool(super().should_update(step_idx, epoch_idx))
        if due:
            self.asked.append(step_idx if step_idx is not None else f"end of epoch {epoch_idx}")
        return due


class Ours(for_lightning.RemoteEmaCallback):
    """Our callback, which remembers the same."""

    asked: list[int | str]

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        due = super().should_update(step_idx, epoch_idx)
        if due:
            self.asked.append(step_idx if step_idx is not None else f"end of epoch {epoch_idx}")
        return due


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"update_every_n_steps": 3},
        {"update_starting_at_step": 5},
        {"update_every_n_steps": 2, "update_starting_at_step": 3},
        {"update_every_n_steps": 3, "update_starting_at_epoch": 1},
    ],
)
def test_updates_after_the_same_steps(
    client: EmaClient, run_name: str, tmp_path: Path, trained: Any, words: dict[str, int]
) -> None:
    """Lightning's words mean the very steps and ends of epochs that they mean to Lightning's own callback."""
    theirs, ours = Theirs(decay=0.9, **words), Ours(0.9, run=run_name, **words)
    ours.asked = []
    trainer(tmp_path, theirs, max_epochs=2).fit(Module(trained), batches())
    trainer(tmp_path, ours, max_epochs=2).fit(Module(trained), batches())
    assert ours.asked == theirs.asked
    info = client.run(run_name)
    assert info.num_updates == len(theirs.asked)
    # An update at the end of an epoch is a step of its own.
    assert info.step == (17 if "update_starting_at_epoch" in words else int(theirs.asked[-1]) + 1)


@pytest.mark.usefixtures("client")
def test_no_step_at_all(run_name: str) -> None:
    """Fewer than each step is refused when the callback is made."""
    with pytest.raises(UsageError, match="update_every_n_steps=0 is less than 1"):
        for_lightning.RemoteEmaCallback(run=run_name, update_every_n_steps=0)


def test_updates_at_the_end_of_epochs(client: EmaClient, run_name: str, tmp_path: Path, trained: Any) -> None:
    """should_update() may be overridden as Lightning's, for one update an epoch; none is made twice on resuming."""

    class EachEpoch(for_lightning.RemoteEmaCallback):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            del step_idx
            return epoch_idx is not None

    saver = lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    fitter = trainer(tmp_path, EachEpoch(0.9, run=run_name), saver, enable_checkpointing=True, max_epochs=2)
    fitter.fit(Module(trained), batches())
    assert client.run(run_name).num_updates == 2
    again = trainer(tmp_path, EachEpoch(0.9, run=run_name), max_epochs=3)
    again.fit(Module(trained), batches(), ckpt_path=tmp_path / "last.ckpt")
    assert client.run(run_name).num_updates == 3


# --- the end --------------------------------------------------------------------------------------------------------


def test_trained_again_after_the_end(
    client: EmaClient, run_name: str, tmp_path: Path, trained: Any, recwarn: pytest.WarningsRecorder
) -> None:
    """fit() of a module with the EMA left in it is no training that comes back from elsewhere: nobody is warned."""
    module, callback = Module(trained), for_lightning.RemoteEmaCallback(0.9, run=run_name, swap_at_end=True)
    for epochs in (1, 2):
        trainer(tmp_path, callback, max_epochs=epochs).fit(module, batches())
    assert client.run(run_name).step == 24
    assert not [each for each in recwarn if "goes on at step" in str(each.message)]


def test_lightning_swapped_at_the_end(
    client: EmaClient, run_name: str, tmp_path: Path, trained: Any, same: Any
) -> None:
    """swap_at_end leaves the EMA in the module when fit() ends; checkpoints hold training weights all the same."""
    module = Module(trained)
    saver = lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    callback = for_lightning.RemoteEmaCallback(0.9, run=run_name, swap_at_end=True)
    trainer(tmp_path, callback, saver, enable_checkpointing=True).fit(module, batches(), held_out())
    now = dict(client.pull(run_name))
    assert same(trained(module), now)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert same({name: saved[name] for name in now}, module.stepped)


def test_transformers_swapped_at_the_end(
    client: EmaClient, run_name: str, tmp_path: Path, trained: Any, same: Any
) -> None:
    """swap_at_end leaves the EMA in the model when train() ends, which save_model() then saves."""
    made = a_trainer(tmp_path, Net())
    callback = for_transformers.RemoteEmaCallback(0.9, run=run_name, swap_at_end=True).attach(made)
    made.train()
    now = dict(client.pull(run_name))
    assert same(trained(made.model), now)
    made.save_model(tmp_path / "final")
    from safetensors.torch import load_file

    assert same(load_file(tmp_path / "final" / "model.safetensors"), now)
    callback.close()


# --- unfreezing -----------------------------------------------------------------------------------------------------


class Finetuned(lightning.LightningModule):
    """A backbone, frozen at first, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 1)

    def copies(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.named_parameters()}

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        loss: Tensor = self.head(self.backbone(batch)).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_unfreezing(client: EmaClient, run_name: str, tmp_path: Path, litema: Any, same: Any) -> None:
    """BackboneFinetuning unfreezes in the middle: the EMA is LitEma's over all parameters, from the first step on.

    A training that goes on from a checkpoint of either half goes on with it.
    """
    module = Finetuned()
    oracle = litema(module.copies(), 0.9, True)
    before = module.copies()

    class Stepped(lightning.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            oracle.update(module.copies())

    def callbacks() -> list[Any]:
        unfreezer = lightning.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
        saver = lightning.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        return [unfreezer, for_lightning.RemoteEmaCallback(0.9, run=run_name), saver]

    trainer(tmp_path, *callbacks(), Stepped(), enable_checkpointing=True, max_epochs=2).fit(module, batches())
    whole = {name: tensor.clone() for name, tensor in client.pull(run_name).items()}
    assert same(whole, oracle.shadow)
    assert not torch.equal(whole["backbone.0.weight"], before["backbone.0.weight"])

    again = trainer(tmp_path, *callbacks(), enable_checkpointing=True, max_epochs=2)
    again.fit(Finetuned(), batches(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert client.run(run_name).num_updates == 2 * BATCHES
    assert same(dict(client.pull(run_name)), whole)


def test_unfreezing_by_hand(client: EmaClient, run_name: str, litema: Any, same: Any) -> None:
    """frozen="average" is RemoteEma's way for any training: without it unfreezing is refused, and says that way."""
    module = Finetuned()
    module.backbone.requires_grad_(False)
    ema = RemoteEma(module, 0.9, run=f"{run_name}-held")
    module.backbone.requires_grad_(True)
    with pytest.raises(UsageError, match=r"'backbone\.0\.weight' is new or no longer frozen") as caught:
        ema(module)
    assert "frozen='average'" in caught.value.hint
    ema.close()

    module.backbone.requires_grad_(False)
    oracle = litema(module.copies(), 0.9, True)
    with RemoteEma(module, 0.9, run=run_name, frozen="average") as ema, warnings.catch_warnings():
        warnings.simplefilter("error")
        for trains in (False, True, False):
            module.backbone.requires_grad_(trains)
            with torch.no_grad():
                module.head.weight.add_(1)
                if trains:
                    module.backbone[0].weight.add_(1)
            ema(module)
            oracle.update(module.copies())
        with ema.scope(module):
            assert same(module.copies(), oracle.shadow)
    assert same(dict(client.pull(run_name)), oracle.shadow)


@pytest.mark.usefixtures("client")
def test_unfreezing_a_sharded_model(run_name: str, tmp_path: Path, litema: Any, same: Any) -> None:
    """frozen="average" does the same where ranks hold shards."""
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def copies() -> dict[str, Tensor]:
        return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model: Any = fully_shard(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), mesh=init_device_mesh("cpu", (1,)))
        model[0].requires_grad_(False)
        oracle = litema(copies(), 0.9, True)
        with RemoteEma(model, 0.9, run=run_name, frozen="average") as ema, warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            for trains in (False, True, False):
                model[0].requires_grad_(trains)
                with torch.no_grad():
                    for parameter in model[0 if trains else 1].parameters():
                        parameter.add_(1)
                ema(model)
                oracle.update(copies())
            with ema.scope(model):
                assert same(copies(), oracle.shadow)
    finally:
        dist.destroy_process_group()
