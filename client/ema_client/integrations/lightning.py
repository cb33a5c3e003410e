"""Lightning: an EMA on the service, updated after each optimizer step, in whose weights validation and tests run.

    trainer = Trainer(callbacks=[RemoteEmaCallback(run="my-unet")])

Knows: Lightning's hooks, and what Lightning counts as a step. Does not know: how weights travel or are swapped
(replica).
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    from pytorch_lightning import Callback, LightningModule, Trainer

from ema_client.errors import UsageError
from ema_client.integrations.replica import Replica
from ema_client.protocol import DEFAULT_DECAY
from ema_client.remote_ema import RemoteEma

if TYPE_CHECKING:
    from torch import nn

__all__ = ["RemoteEmaCallback"]


class RemoteEmaCallback(Callback):
    """Keeps the EMA of a LightningModule's trainable parameters on the service.

    The EMA is updated once for each optimizer step, however many batches a step takes. Validation, tests and
    predictions run with EMA weights, which leave the module again at the end, also of an evaluation that fails.
    Checkpoints hold the training weights and a reference to the EMA of their step: a training that goes on from a
    checkpoint goes on with its run and that EMA (RemoteEma.state_dict() says how long the EMA is there). Of several
    processes the first sends or, of a sharded model, each sends its own shards; all processes evaluate.

    Args:
        decay, use_num_updates, run, url, token: as for RemoteEma.
        attribute: average this part of the module only, such as "model"; by default the whole module.
        evaluate: False evaluates the training weights.
        resume: go on with the run of this name though the training begins anew.
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
        resume: bool = False,
    ) -> None:
        self._options: dict[str, Any] = {"decay": decay, "use_num_updates": use_num_updates}
        self._where: dict[str, Any] = {"run": run, "url": url, "token": token}
        self._attribute = attribute
        self._evaluate = evaluate
        self._resume = resume
        self._state: dict[str, Any] | None = None
        self._replica: Replica | None = None
        self._steps = 0

    @property
    def ema(self) -> RemoteEma | None:
        """The RemoteEma, during a training and in a process that sends."""
        return self._replica.ema if self._replica else None

    # --- training ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()
        self._replica = self._open(trainer, pl_module, trains=True)
        state, self._state = self._state, None
        if self.ema and state:
            self.ema.load_state_dict(state)
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        # global_step counts optimizer steps: a batch whose gradients are only accumulated adds no step.
        if self._replica and trainer.global_step != self._steps:
            self._steps = trainer.global_step
            self._replica.update()

    def on_train_end(self, *_: Any) -> None:
        if self._replica:
            self._replica.flush()

    # --- evaluation -------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_in(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_in(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_in(trainer, pl_module)

    # Not at the end of the epoch: the module's own hook for that, which may still evaluate, runs after the callbacks'.
    # Callbacks that save checkpoints run after all other callbacks, so they find the training weights.
    def on_validation_end(self, *_: Any) -> None:
        self._swap_out()

    def on_test_end(self, *_: Any) -> None:
        self._swap_out()

    def on_predict_end(self, *_: Any) -> None:
        self._swap_out()

    def on_exception(self, *_: Any) -> None:
        self._swap_out()

    def teardown(self, *_: Any, **__: Any) -> None:
        self._close()

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return self.ema.state_dict() if self.ema else {"run": self._where["run"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A run of another name than the checkpoint's is a branch, which begins with the weights of the checkpoint.
        self._resume = state_dict.get("run") == self._where["run"]
        # Without "snapshot", a process that does not send wrote the checkpoint, and knew no EMA to go back to.
        self._state = state_dict if self._resume and "snapshot" in state_dict else None

    # ----------------------------------------------------------------------------------------------------------------

    def _open(self, trainer: Trainer, pl_module: LightningModule, *, trains: bool) -> Replica:
        return Replica(
            self._averaged(trainer, pl_module),
            trains=trains,
            first=trainer.is_global_zero,
            barrier=trainer.strategy.barrier,
            resume=self._resume,
            **self._where,
            **self._options,
        )

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
        # Before a training there is no EMA yet.
        if not self._evaluate or trainer.sanity_checking:
            return
        if self._replica is None:
            self._replica = self._open(trainer, pl_module, trains=False)
        self._replica.swap_in()

    def _swap_out(self) -> None:
        if self._replica:
            self._replica.swap_out()

    def _close(self) -> None:
        replica, self._replica = self._replica, None
        if replica:
            replica.close()
