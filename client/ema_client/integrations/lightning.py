"""Lightning: an EMA on the service, updated after each optimizer step, in whose weights validation and tests run.

    trainer = Trainer(callbacks=[RemoteEmaCallback(run="my-unet")])

Knows: Lightning's hooks, what Lightning counts as a step, and where its checkpoints are saved and removed. Does not
know: which EMA is evaluated or gone on with, and what an outage is answered with (core).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Unpack

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import BaseFinetuning
except ModuleNotFoundError:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.callbacks import BaseFinetuning

from ema_client.errors import UsageError
from ema_client.integrations.core import Core
from ema_client.integrations.options import OutagePolicy, RemoteEmaOptions
from ema_client.integrations.origins import origin_of
from ema_client.protocol import DEFAULT_DECAY
from ema_client.remote_ema import RemoteEma
from ema_client.training.joining import Resume

if TYPE_CHECKING:
    from torch import nn

__all__ = ["RemoteEmaCallback"]

#: In the callback's part of a checkpoint: path of each checkpoint of the training -> the snapshot it refers to.
_CHECKPOINTS = "checkpoints"


class RemoteEmaCallback(Callback):
    """Keeps the EMA of a LightningModule's trainable parameters on the service.

    The EMA is updated once for each optimizer step, however many batches a step takes. Validation, tests and
    predictions run with EMA weights, which leave the module again at the end, also of an evaluation that fails. The EMA
    belongs to the weights that the module holds: with ``ckpt_path=`` that of the checkpoint, after a training that of
    its end, for a module that was not trained here that of the run as it is now. Where there is none, the module's own
    weights are evaluated, and a warning says so.

    Checkpoints hold the training weights, whenever they are made, and a reference to the EMA of their step: a training
    that goes on from a checkpoint goes on with its run and that EMA. The EMA of a checkpoint stays on the service until
    Lightning removes the checkpoint.

    fit() of the same module goes on with the run; of another module it makes the run ``RUN-2``, ``RUN-3`` (``run``
    tells); with fast_dev_run a run that is deleted at the end. Of several processes the first sends or, of a sharded
    module, each sends its own shards; all processes evaluate.

    More than twenty methods: a hook each.

    Args:
        decay, use_num_updates, run, url, token: as for RemoteEma.
        attribute: average this part of the module only, such as "model"; by default the whole module.
        evaluate: False evaluates the training weights.
        resume: as for RemoteEma, for a training that begins without a checkpoint.
        on_unreachable: what a validation, a checkpoint and the end of a training do where the service is away, or
            refuses: "warn": the weights of the training are evaluated, the checkpoint says that it has no EMA; "raise"
            the error. A training that begins, and finds no service, raises in either case.
        swap_at_end: leave the EMA weights in the module when fit() ends, as Lightning's own callback does.
        update_every_n_steps, update_starting_at_step, update_starting_at_epoch: as for Lightning's EMAWeightAveraging:
            updates after the steps with these numbers, and at the ends of the epochs from this one on, counted from 0;
            None: at the end of no epoch. The average begins with the weights of the training's start, where
            Lightning's begins with those of its first update: leave ``use_num_updates`` on, which soon forgets them.
        keep: so many snapshots of checkpoints stay on the service, the newest; None: those whose checkpoints exist.
        options: whatever else RemoteEma takes: averages, buffers, decay_per, durability, frozen, on_busy, posthoc,
            push_dtype, update_every, borrow, log_to. With a callback that unfreezes layers (BaseFinetuning) ``frozen``
            is "average". ``log_to="trainer"`` draws charts of the EMA in the Trainer's own loggers.
    """

    def __init__(
        self,
        decay: float = DEFAULT_DECAY,
        use_num_updates: bool = True,
        *,
        run: str,
        url: str | None = None,
        token: str | None = None,
        attribute: str | None = None,
        evaluate: bool = True,
        resume: Resume = False,
        on_unreachable: OutagePolicy = "warn",
        swap_at_end: bool = False,
        update_every_n_steps: int | None = None,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        keep: int | None = None,
        **options: Unpack[RemoteEmaOptions],
    ) -> None:
        self._core = Core(
            decay,
            use_num_updates,
            run=run,
            url=url,
            token=token,
            resume=resume,
            on_unreachable=on_unreachable,
            keep=keep,
            options=options,
        )
        self._attribute = attribute
        self._evaluate = evaluate
        self._swap_at_end = swap_at_end
        self._every = _at_least_one("update_every_n_steps", update_every_n_steps)
        self._start = update_starting_at_step or 0
        self._start_epoch = update_starting_at_epoch
        #: Of the latest update: the number of optimizer steps, and of epochs where updates are made at their ends.
        self._steps, self._epochs = 0, 0
        #: Of the checkpoint loaded last: path of each checkpoint -> its snapshot.
        self._checkpoints: dict[str, str] = {}

    @property
    def ema(self) -> RemoteEma | None:
        """The RemoteEma, during a training and in a process that sends."""
        return self._core.ema

    @property
    def run(self) -> str:
        """The run of the latest training; before the first, the name given."""
        return self._core.run

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update after the optimizer step, or at the end of the epoch, with this number, counted from 0.

        May be overridden, as that of Lightning's own WeightAveraging. Steps without an update are counted.
        """
        if epoch_idx is not None and self._start_epoch is not None and epoch_idx >= self._start_epoch:
            return True
        return step_idx is not None and step_idx >= self._start and step_idx % self._every == 0

    # --- training ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        del stage
        self._core.owner = pl_module
        if any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks):
            self._core.prefer("frozen", "average")
        # Lightning has no hook around a checkpoint and none for its removal, and before 2.6 no callback is told of the
        # checkpoint that is tested.
        _around(trainer, "save_checkpoint", self._saving)
        _around(trainer.strategy, "save_checkpoint", self._writing)
        _around(trainer.strategy, "load_checkpoint", self._reading)
        _around(trainer.strategy, "remove_checkpoint", self._removing)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._core.begin(
            pl_module,
            self._averaged(trainer, pl_module),
            first=trainer.is_global_zero,
            step=trainer.global_step,
            throwaway=bool(trainer.fast_dev_run),
        )
        if self._core.kept:
            self._core.kept.know(self._checkpoints)
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        # global_step counts optimizer steps: a batch whose gradients are only accumulated adds no step.
        if trainer.global_step != self._steps:
            self._steps = trainer.global_step
            # None: as update_every says.
            self._core.update(due=None if self.should_update(step_idx=self._steps - 1) else False)
        self._draw(trainer)

    def on_train_epoch_end(self, trainer: Trainer, _: LightningModule) -> None:
        # A training that goes on from a checkpoint ends the checkpoint's epoch once more.
        if trainer.current_epoch >= self._epochs and self.should_update(epoch_idx=trainer.current_epoch):
            self._epochs = trainer.current_epoch + 1
            self._core.update()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._core.finish()
        if self._swap_at_end:
            # The training weights are still at hand, for a checkpoint that is made now.
            self._core.swap_in(pl_module, self._averaged(trainer, pl_module), first=trainer.is_global_zero)

    def on_fit_end(self, *_: Any) -> None:
        if self._swap_at_end:
            self._core.keep_swapped()

    # --- evaluation -------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_in(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_in(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_in(trainer, pl_module)

    # Not at the end of the epoch: the module's own hook for that, which may still evaluate, runs after the callbacks'.
    def on_validation_end(self, *_: Any) -> None:
        self._core.swap_out()

    def on_test_end(self, *_: Any) -> None:
        self._core.swap_out()

    def on_predict_end(self, *_: Any) -> None:
        self._core.swap_out()

    def on_exception(self, *_: Any) -> None:
        self._core.swap_out()

    def teardown(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._core.close()
        # The last numbers come with the end, and the loggers are closed behind this hook.
        self._draw(trainer)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = {"epochs": self._epochs, **self._core.state()}
        return {**state, _CHECKPOINTS: self._core.kept.held} if self._core.kept else state

    def _saving(self, save: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Trainer.save_checkpoint(), with the training weights in the module."""
        with self._core.training_weights():
            save(*args, **kwargs)

    def _writing(
        self, write: Callable[..., None], checkpoint: dict[str, Any], filepath: Any, *args: Any, **kwargs: Any
    ) -> None:
        """The strategy's save_checkpoint(), with the EMA in checkpoints of weights alone, too."""
        parts = checkpoint.get("callbacks", {})
        if self.state_key not in parts and "snapshot" in (state := self.state_dict()):
            parts = checkpoint["callbacks"] = {**parts, self.state_key: state}
        part, kept = parts.get(self.state_key, {}), self._core.kept
        snapshot = part.get("snapshot")
        if kept and snapshot:
            part[_CHECKPOINTS] = {**kept.held, str(filepath): snapshot}
        write(checkpoint, filepath, *args, **kwargs)
        if kept:
            kept.hold(str(filepath), snapshot)

    def _reading(self, read: Callable[..., dict[str, Any]], path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The strategy's load_checkpoint(): the module is given the weights of a checkpoint."""
        checkpoint = read(path, *args, **kwargs)
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        self._epochs, self._checkpoints = state.get("epochs", 0), state.get(_CHECKPOINTS, {})
        self._core.loaded(origin_of(state, f"checkpoint {path}"))
        return checkpoint

    def _removing(self, remove: Callable[..., None], filepath: Any) -> None:
        """The strategy's remove_checkpoint(), with the checkpoint's EMA."""
        remove(filepath)
        if self._core.kept:
            self._core.kept.let_go(str(filepath))

    # ----------------------------------------------------------------------------------------------------------------

    def _draw(self, trainer: Trainer) -> None:
        """Charts of the EMA in the Trainer's loggers, with ``log_to="trainer"``."""
        for values, step in self._core.measured():
            for logger in trainer.loggers:
                logger.log_metrics(values, step)

    def _averaged(self, trainer: Trainer, pl_module: LightningModule) -> nn.Module:
        # FSDP1 around the whole module has the parameters, and says which parameters this rank holds.
        wrapped: nn.Module = trainer.model
        if not hasattr(wrapped, "_fsdp_wrapped_module"):
            averaged: nn.Module = attrgetter(self._attribute)(pl_module) if self._attribute else pl_module
            return averaged
        if self._attribute:
            raise UsageError(
                f"FSDP1 around the whole module keeps {self._attribute!r} in flat parameters with the rest of it",
                hint="leave attribute away, or wrap that part only, in configure_model(), or use FSDP2's fully_shard",
            )
        return wrapped

    def _swap_in(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The sanity check is of the weights as they came.
        if self._evaluate and not trainer.sanity_checking:
            self._core.swap_in(pl_module, self._averaged(trainer, pl_module), first=trainer.is_global_zero)


def _around(owner: Any, name: str, call: Callable[..., Any]) -> None:
    """Let ``call``, which is given the method first, take the place of an object's method, once."""
    inner = method = getattr(owner, name)
    while isinstance(inner, functools.partial):
        if inner.func == call:
            return
        inner = inner.args[0]
    setattr(owner, name, functools.partial(call, method))


def _at_least_one(name: str, value: int | None) -> int:
    if value is not None and value < 1:
        raise UsageError(f"{name}={value} is less than 1", hint="1 updates after each step, 10 after each tenth")
    return value or 1
