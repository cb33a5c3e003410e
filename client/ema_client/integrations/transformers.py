"""transformers: an EMA on the service, updated after each optimizer step of a Trainer, which evaluates the EMA.

    trainer = Trainer(model, args, ...)
    ema = RemoteEmaCallback(run="my-bert").attach(trainer)

Knows: the Trainer's events, and what the Trainer counts as a step. Does not know: how weights travel or are swapped
(replica).
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

    The EMA is updated once for each optimizer step, however many batches a step takes. Of several processes the first
    sends or, of a sharded model, each sends its own shards; all processes evaluate. ``attach(trainer)`` adds the
    callback to a Trainer, which then evaluates and predicts with EMA weights; a callback that is given to the Trainer
    among its ``callbacks`` only updates. The Trainer trains on, and saves, the training weights;
    ``with callback.scope():`` around ``save_model()`` saves the EMA.

    Checkpoints hold a reference to the EMA of their step: a training that goes on from a checkpoint goes on with its
    run and that EMA (RemoteEma.state_dict() says how long the EMA is there). Without ``attach`` the checkpoint is
    looked for in ``output_dir``.

    Args:
        decay, use_num_updates, run, url, token: as for RemoteEma.
        resume: go on with the run of this name though the training begins anew, or from a checkpoint without a
            reference.
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
        """The RemoteEma, from the beginning of a training on; None in a process that does not send."""
        return self._replica.ema if self._replica else None

    def attach(self, trainer: Trainer) -> RemoteEmaCallback:
        """Add the callback to a Trainer; returns the callback.

        The Trainer's evaluate() and predict() run with EMA weights once a training has begun. Both methods are wrapped,
        as the Trainer has no event before an evaluation and none after an evaluation that fails. train() is wrapped
        too, as no event says which checkpoint a training goes on from.
        """
        trainer.add_callback(self)
        trainer.train = self._noting_checkpoint(trainer.train)
        trainer.evaluate = self._with_ema(trainer.evaluate)
        trainer.predict = self._with_ema(trainer.predict)
        return self

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """EMA weights in the model inside the block, the training weights after the block, whatever the block raises.

        Raises UsageError before a training.
        """
        replica = self._replica
        if replica is None:
            raise UsageError("there is no EMA before the training", hint="use scope() once trainer.train() has begun")
        if replica.swapped:
            # An evaluation of several data sets calls evaluate() inside evaluate().
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
            # The same Trainer trains on, so the run goes on too.
            self._options["resume"] = True
            self.close()
        first = state.is_world_process_zero

        def find() -> dict[str, Any] | None:
            return self._saved(args, state) if first else None

        # The file may be on a disk that only the first process sees.
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
        # The trials of a hyperparameter search have their checkpoints elsewhere. Of a sharded model the first process
        # alone may ask for the state: no newer update is applied before this process has sent its part of it.
        if self.ema and state.is_world_process_zero and folder.is_dir():
            # Whole or not there: a killed training must not leave a checkpoint that cannot be gone on from.
            with whole_file(self._reference(folder)) as part:
                part.write_text(json.dumps(self.ema.state_dict()))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self._replica:
            self._replica.flush()

    # --- checkpoints ------------------------------------------------------------------------------------------------

    # Not as a transformers.ExportableState: the Trainer may restore such states by making another callback from the
    # checkpoint, which would have to hold the token; and the new callback would not be the attached one.

    def _reference(self, checkpoint: Path) -> Path:
        """The reference's path in a checkpoint, by the run's name: a Trainer may have callbacks for several runs."""
        return checkpoint / f"ema-{self._where['run']}.json"

    def _saved(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any] | None:
        """The state of the EMA in the checkpoint to go on from; None without a checkpoint or a state in it."""
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
            # True means the newest checkpoint in output_dir, which the Trainer's step names later.
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
    """The folder in which the Trainer saves the checkpoint of the present step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _read(path: Path, run: str) -> dict[str, Any]:
    """The state of ``run`` as on_save() wrote it. Raises UsageError for anything else."""
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
