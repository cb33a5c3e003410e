"""transformers: an EMA on the service, updated after each optimizer step of a Trainer, which evaluates in its weights.

    trainer = Trainer(model, args, ...)
    ema = RemoteEmaCallback(run="my-bert").attach(trainer)

Knows: the Trainer's events, and what a step is there. Does not know: how weights travel or are swapped (replica).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ema_client.atomic import whole_file
from ema_client.errors import UsageError
from ema_client.integrations.replica import Replica
from ema_client.protocol import DEFAULT_DECAY
from ema_client.remote_ema import RemoteEma
from ema_client.training.ranks import agreed
from ema_client.training.sharding import is_sharded
from ema_client.training.state import check_state_is_of

__all__ = ["RemoteEmaCallback"]


class RemoteEmaCallback(TrainerCallback):
    """Keeps the EMA of a model's trainable parameters on the service.

    Updated once for each optimizer step, however many batches that takes. With several processes the first sends, or,
    of a sharded model, each its own shards; all evaluate. ``attach(trainer)`` adds it to a Trainer and has that
    evaluate and predict with EMA weights; given as one of its ``callbacks`` instead, it updates only. What is trained
    on, and saved, are the training weights; ``with callback.scope():`` around ``save_model()`` saves the EMA.

    Checkpoints hold a reference to the EMA of their step: a training that goes on from one goes on with its run and
    that EMA (RemoteEma.state_dict() says how long it is there). Without ``attach`` it is looked for in ``output_dir``.

    Args:
        decay, use_num_updates, run, url, token: as for RemoteEma.
        resume: go on with the run of this name though the training begins anew, or from a checkpoint without it.
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
        self._resumed_from: Path | None = None

    @property
    def ema(self) -> RemoteEma | None:
        """The RemoteEma, from the beginning of a training on and in a process that sends."""
        return self._replica.ema if self._replica else None

    def attach(self, trainer: Trainer) -> RemoteEmaCallback:
        """Add it to a Trainer, whose evaluate() and predict() then run with EMA weights once a training has begun.

        The Trainer has no event before an evaluation and none after one that fails, so its two methods are wrapped;
        train() is because no event says which checkpoint a training goes on from.
        """
        trainer.add_callback(self)
        trainer.train = self._noting_checkpoint(trainer.train)
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
        del control
        if self._replica:
            # The same Trainer trains on: with its run.
            self._options["resume"] = True
            self.close()
        first = state.is_world_process_zero

        def find() -> dict[str, Any] | None:
            return self._saved(args, state) if first else None

        # The first process may be the only one that sees the file.
        saved = agreed(find) if is_sharded(model) else find()
        options = {**self._options, "resume": self._options["resume"] or saved is not None}
        self._replica = Replica(model, first=first, barrier=_barrier, **self._where, **options)
        if self.ema and saved:
            self.ema.load_state_dict(saved)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self._replica:
            self._replica.update()

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        folder = _checkpoint(args, state)
        # The trials of a hyperparameter search have theirs elsewhere. Of a sharded model each process has an EMA, of
        # which no newer update is applied before this one has sent its part.
        if self.ema and state.is_world_process_zero and folder.is_dir():
            # Whole or not there: a training that is killed leaves no checkpoint that cannot be gone on from.
            with whole_file(self._reference(folder)) as part:
                part.write_text(json.dumps(self.ema.state_dict()))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self._replica:
            self._replica.flush()

    # --- checkpoints ------------------------------------------------------------------------------------------------

    # Not as a transformers.ExportableState: the Trainer may restore those by making another callback of the checkpoint,
    # which would have to hold the token; and that callback would not be the one that is attached.

    def _reference(self, checkpoint: Path) -> Path:
        """Where it is in a checkpoint; by the run's name, as a Trainer may have a callback for each of several runs."""
        return checkpoint / f"ema-{self._where['run']}.json"

    def _saved(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any] | None:
        """The reference in the checkpoint that this training goes on from, where there is one."""
        if not state.global_step:
            return None
        path = self._reference(self._resumed_from or _checkpoint(args, state))
        if path.is_file():
            return _read(path, self._where["run"])
        # Without resume=True a new run begins, with the weights of the checkpoint.
        if self._options["resume"]:
            warnings.warn(
                f"there is no {path}: run {self._where['run']!r} goes on with the EMA that the service has now, "
                f"which may be of another step than the checkpoint's, {state.global_step}",
                stacklevel=2,
            )
        return None

    def _noting_checkpoint(self, train: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(train)
        def train_noted(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            # True is the newest in output_dir, which its step tells.
            told = isinstance(resume_from_checkpoint, str | os.PathLike)
            self._resumed_from = Path(resume_from_checkpoint) if told else None
            return train(resume_from_checkpoint, *args, **kwargs)

        return train_noted

    # ----------------------------------------------------------------------------------------------------------------

    def _with_ema(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(evaluate)
        def evaluate_ema(*args: Any, **kwargs: Any) -> Any:
            with self.scope() if self._replica else contextlib.nullcontext():
                return evaluate(*args, **kwargs)

        return evaluate_ema


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer saves the checkpoint of its present step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _read(path: Path, run: str) -> dict[str, Any]:
    """The state that on_save() wrote of this run. Raises UsageError for anything else."""
    try:
        state: dict[str, Any] = json.loads(path.read_text())
        check_state_is_of(run, state)
    except (ValueError, UsageError) as fault:
        raise UsageError(
            f"{path} does not say which EMA the checkpoint had: {getattr(fault, 'detail', fault)}",
            hint="put back a copy of it, or go on from another checkpoint; or delete it, and with resume=True the run "
            "goes on with the EMA that the service has now",
        ) from fault
    return state


def _barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
