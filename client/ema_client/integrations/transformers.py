"""transformers: an EMA on the service, updated after each optimizer step of a Trainer, which evaluates in its weights.

    trainer = Trainer(model, args, ...)
    ema = RemoteEmaCallback(run="my-bert").attach(trainer)

Knows: the Trainer's events, and what a step is there. Does not know: how weights travel or are swapped (replica).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ema_client.errors import UsageError
from ema_client.integrations.replica import Replica
from ema_client.protocol import DEFAULT_DECAY
from ema_client.remote_ema import RemoteEma

__all__ = ["RemoteEmaCallback"]


class RemoteEmaCallback(TrainerCallback):
    """Keeps the EMA of a model's trainable parameters on the service.

    Updated once for each optimizer step, however many batches that takes. With several processes the first sends; all
    evaluate. ``attach(trainer)`` adds it to a Trainer and has that evaluate and predict with EMA weights; given as one
    of its ``callbacks`` instead, it updates only. What is trained on, and saved, are the training weights;
    ``with callback.scope():`` around ``save_model()`` saves the EMA.

    Args:
        decay, use_num_updates, run, url, token, resume: as for RemoteEma.
    """

    def __init__(
        self,
        decay: float = DEFAULT_DECAY,
        use_num_updates: bool = True,
        *,
        run: str,
        url: str | None = None,
        token: str | None = None,
        resume: bool = False,
    ) -> None:
        self._options: dict[str, Any] = {"decay": decay, "use_num_updates": use_num_updates, "resume": resume}
        self._where: dict[str, Any] = {"run": run, "url": url, "token": token}
        self._replica: Replica | None = None

    @property
    def ema(self) -> RemoteEma | None:
        """The RemoteEma, from the beginning of a training on and in the process that sends."""
        return self._replica.ema if self._replica else None

    def attach(self, trainer: Trainer) -> RemoteEmaCallback:
        """Add it to a Trainer, whose evaluate() and predict() then run with EMA weights once a training has begun.

        The Trainer has no event before an evaluation and none after one that fails, so its two methods are wrapped.
        """
        trainer.add_callback(self)
        trainer.evaluate = self._with_ema(trainer.evaluate)
        trainer.predict = self._with_ema(trainer.predict)
        return self

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """EMA weights in the model inside the block, whatever happens in it. Raises UsageError before a training."""
        replica = self._replica
        if replica is None:
            raise UsageError("there is no EMA before the training", hint="use scope() once trainer.train() has begun")
        if replica.swapped:
            # Evaluations of several data sets are evaluations inside one.
            yield
            return
        replica.swap_in()
        try:
            yield
        finally:
            replica.swap_out()

    def close(self) -> None:
        """Close the connections. The run stays on the service."""
        replica, self._replica = self._replica, None
        if replica:
            replica.close()

    # --- events -----------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        del args, control
        if self._replica:
            # The same Trainer trains on: with its run.
            self._options["resume"] = True
            self.close()
        sends = state.is_world_process_zero
        self._replica = Replica(model, sends=sends, barrier=_barrier, **self._where, **(self._options if sends else {}))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self._replica:
            self._replica.update()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self._replica:
            self._replica.flush()

    def _with_ema(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(evaluate)
        def evaluate_ema(*args: Any, **kwargs: Any) -> Any:
            with self.scope() if self._replica else contextlib.nullcontext():
                return evaluate(*args, **kwargs)

        return evaluate_ema


def _barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
