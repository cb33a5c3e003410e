"""transformers: an EMA on the service, updated after each optimizer step of a Trainer, which evaluates the EMA.

    trainer = Trainer(model, args, ...)
    ema = RemoteEmaCallback(run="my-bert").attach(trainer)

Knows: the Trainer's events, what the Trainer counts as a step, and its checkpoints' folders. Does not know: which EMA
is evaluated or gone on with, and what an outage is answered with (core).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Unpack

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ema_client.atomic import whole_file
from ema_client.errors import UsageError
from ema_client.integrations.core import Core
from ema_client.integrations.options import OutagePolicy, RemoteEmaOptions
from ema_client.integrations.origins import Lacking, Origin, origin_of
from ema_client.protocol import DEFAULT_DECAY
from ema_client.remote_ema import RemoteEma
from ema_client.training.joining import Resume
from ema_client.training.ranks import agreed, ranks_in_all
from ema_client.training.state import LACKS, check_state_is_of

__all__ = ["RemoteEmaCallback"]


class RemoteEmaCallback(TrainerCallback):
    """Keeps the EMA of a model's trainable parameters on the service.

    The EMA is updated once for each optimizer step, however many batches a step takes. Of several processes the first
    sends or, of a sharded model, each sends its own shards; all processes evaluate. ``attach(trainer)`` adds the
    callback to a Trainer, which then evaluates and predicts with EMA weights; a callback that is given to the Trainer
    among its ``callbacks`` only updates. The Trainer trains on, and saves, the training weights;
    ``with callback.scope():`` around ``save_model()`` saves the EMA.

    The EMA belongs to the weights that the model holds: in a training and after it that of the training, after
    ``load_best_model_at_end`` that of the best checkpoint, before a training that of the checkpoint's folder that the
    model came from. Where there is none, the model's own weights are evaluated, and a warning says so.

    Checkpoints hold a reference to the EMA of their step: a training that goes on from a checkpoint goes on with its
    run and that EMA. The EMA of a checkpoint stays on the service until the Trainer deletes the checkpoint. Without
    ``attach`` the checkpoint is looked for in ``output_dir``.

    train() of the same model goes on with the run; of another model, as ``model_init`` and a hyperparameter search make
    them, it makes the run ``RUN-2``, ``RUN-3`` (``run`` tells).

    More than twenty methods: an event each, and a wrapper for each of the Trainer's methods without an event.

    Args:
        decay, use_num_updates, run, url, token: as for RemoteEma.
        resume: as for RemoteEma, for a training that begins without a checkpoint, or from one without a reference.
        on_unreachable: what an evaluation, a checkpoint and the end of a training do where the service is away, or
            refuses: "warn": the weights of the training are evaluated, the checkpoint says that it has no EMA; "raise"
            the error. A training that begins, and finds no service, raises in either case.
        swap_at_end: leave the EMA weights in the model when train() ends.
        keep: so many snapshots of checkpoints stay on the service, the newest; None: those whose checkpoints exist.
        options: whatever else RemoteEma takes: averages, buffers, decay_per, durability, frozen, on_busy, posthoc,
            push_dtype, update_every, borrow, log_to. ``log_to="trainer"`` adds ``ema/decay`` and the other values to
            what the Trainer logs, and so to everything that it reports to; needs attach().
    """

    def __init__(
        self,
        decay: float = DEFAULT_DECAY,
        use_num_updates: bool = True,
        *,
        run: str,
        url: str | None = None,
        token: str | None = None,
        resume: Resume = False,
        on_unreachable: OutagePolicy = "warn",
        swap_at_end: bool = False,
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
        self._swap_at_end = swap_at_end
        self._attached = False
        self._resumed_from: Path | None = None
        #: Inside scope(): what is saved there is meant to be the EMA.
        self._in_scope = False
        #: The checkpoints that were there before the Trainer saved another.
        self._there: set[str] = set()

    @property
    def ema(self) -> RemoteEma | None:
        """The RemoteEma, from the beginning of a training on; None in a process that does not send."""
        return self._core.ema

    @property
    def run(self) -> str:
        """The run of the latest training; before the first, the name given."""
        return self._core.run

    def attach(self, trainer: Trainer) -> RemoteEmaCallback:
        """Add the callback to a Trainer; returns the callback.

        The Trainer's evaluate() and predict() run with EMA weights. Both methods are wrapped, as the Trainer has no
        event before an evaluation and none after an evaluation that fails; save_model() too, which saves the training
        weights in the middle of an evaluation, and train(), as no event says which checkpoint a training goes on from.
        """
        self._attached = True
        trainer.add_callback(self)
        trainer.train = self._noting_checkpoint(trainer.train)
        trainer.evaluate = self._with_ema(trainer, trainer.evaluate)
        trainer.predict = self._with_ema(trainer, trainer.predict)
        trainer.save_model = self._saving(trainer.save_model)
        if self._core.logs_to_trainer:
            trainer.log = self._logging(trainer.log)
        return self

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """EMA weights in the model inside the block, the training weights after the block, whatever the block raises.

        All processes enter it together. Raises UsageError before a training.
        """
        if (model := self._core.owner) is None:
            raise UsageError("there is no EMA before the training", hint="use scope() once trainer.train() has begun")
        outer, self._in_scope = self._in_scope, True
        try:
            with self._swapped(model, first=self._core.first):
                yield
        finally:
            self._in_scope = outer

    def close(self) -> None:
        """Close the connections. The run stays on the service."""
        self._core.close()

    # --- events -----------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        del control
        if self._core.logs_to_trainer and not self._attached:
            raise UsageError("log_to='trainer' needs the Trainer itself", hint="attach() the callback to the Trainer")
        self._core.owner = model
        first = state.is_world_process_zero
        if state.global_step:
            folder = self._resumed_from or _checkpoint(args, state)
            self._core.loaded(self._origin(folder, first=first))
        self._core.begin(model, model, first=first, step=state.global_step)
        if self._core.kept:
            self._core.kept.know(self._held_in(Path(args.output_dir)))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        del args, state
        self._core.update()
        self._look(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        del args, state
        self._look(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        folder = _checkpoint(args, state)
        # The trials of a hyperparameter search have their checkpoints elsewhere. Of a sharded model the first process
        # alone may ask for the state: no newer update is applied before this process has sent its part of it.
        if self._core.owner is None or not state.is_world_process_zero or not folder.is_dir():
            return
        if self._core.swapped and not self._attached:
            warnings.warn(f"{folder} holds EMA weights as training weights: attach() the callback", stacklevel=2)
        said = self._core.state()
        # Whole or not there: a killed training must not leave a checkpoint that cannot be gone on from.
        with whole_file(self._reference(folder, self.run)) as part:
            part.write_text(json.dumps(said))
        if self._core.kept:
            self._core.kept.hold(str(folder), said.get("snapshot"))
            self._forget_deleted()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        del control
        self._core.finish()
        first = state.is_world_process_zero
        if args.save_total_limit == 1 and state.best_model_checkpoint:
            # The Trainer has deleted all others.
            self._forget_deleted()
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._core.loaded(self._origin(Path(state.best_model_checkpoint), first=first))
        if self._swap_at_end:
            self._core.swap_in(model, model, first=first)
            self._core.keep_swapped()

    # --- checkpoints ------------------------------------------------------------------------------------------------

    # Not as a transformers.ExportableState: the Trainer may restore such states by making another callback from the
    # checkpoint, which would have to hold the token; and the new callback would not be the attached one.

    @staticmethod
    def _reference(checkpoint: Path, run: str) -> Path:
        """The reference's path in a checkpoint, by the run's name: a Trainer may have callbacks for several runs."""
        return checkpoint / f"ema-{run}.json"

    def _origin(self, folder: Path, *, first: bool) -> Origin | None:
        """Of weights that were loaded from a checkpoint's folder, which may be on a disk that only the first sees."""

        def read() -> dict[str, Any] | None:
            paths = [(run, self._reference(folder, run)) for run in self._core.runs] if first else ()
            return next((_read(path, run) for run, path in paths if path.is_file()), None)

        state = agreed(read) if ranks_in_all() > 1 else read()
        return origin_of(state, str(folder)) if state else Lacking(f"there is no {self._reference(folder, self.run)}")

    def _held_in(self, folder: Path) -> dict[str, str]:
        """The checkpoints of an earlier process -> their snapshots."""
        paths = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{self._reference(Path(), self.run)}")
        states = {str(path.parent): _read(path, self.run) for path in paths}
        return {folder: state["snapshot"] for folder, state in states.items() if state.get("snapshot")}

    def _look(self, control: TrainerControl) -> None:
        """Before the Trainer saves a checkpoint and deletes old ones: remember which there are."""
        if self._core.kept and (control.should_save or control.should_evaluate):
            self._there = {folder for folder in self._core.kept.held if Path(folder).is_dir()}

    def _forget_deleted(self) -> None:
        """The checkpoints that the Trainer has deleted since are gone; those that somebody moved before are not."""
        if self._core.kept:
            for folder in self._there:
                if not Path(folder).is_dir():
                    self._core.kept.let_go(folder)

    def _noting_checkpoint(self, train: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(train)
        def train_noted(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            # True means the newest checkpoint in output_dir, which the Trainer's step names later.
            told = isinstance(resume_from_checkpoint, str | os.PathLike)
            self._resumed_from = Path(resume_from_checkpoint) if told else None
            return train(resume_from_checkpoint, *args, **kwargs)

        return train_noted

    def _saving(self, save: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(save)
        def save_training_weights(output_dir: str | None = None, _internal_call: bool = False, **kwargs: Any) -> Any:
            # push_to_hub() names no folder.
            checkpoint = _internal_call and output_dir is not None
            meant = self._in_scope and not checkpoint
            with contextlib.nullcontext() if meant else self._core.training_weights():
                return save(output_dir, _internal_call=_internal_call, **kwargs)

        return save_training_weights

    def _logging(self, log: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(log)
        def log_with_ema(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            # The newest of each: what the Trainer logs is of the step that the Trainer is at.
            for values, _ in self._core.measured():
                logs = {**logs, **values}
            log(logs, *args, **kwargs)

        return log_with_ema

    # ----------------------------------------------------------------------------------------------------------------

    def _with_ema(self, trainer: Trainer, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(evaluate)
        def evaluate_ema(*args: Any, **kwargs: Any) -> Any:
            model, first = trainer.model, trainer.is_world_process_zero()
            origin = None if self._core.knows(model) else self._came_from(model, first=first)
            with self._swapped(model, first=first, origin=origin):
                return evaluate(*args, **kwargs)

        return evaluate_ema

    @contextlib.contextmanager
    def _swapped(self, model: nn.Module, *, first: bool, origin: Origin | None = None) -> Iterator[None]:
        if self._core.swapped:
            # An evaluation of several data sets calls evaluate() inside evaluate().
            yield
            return
        self._core.swap_in(model, model, first=first, origin=origin)
        try:
            yield
        finally:
            self._core.swap_out()

    def _came_from(self, model: nn.Module, *, first: bool) -> Origin:
        """Of the weights of a model that was not trained here: of a checkpoint's folder, if they are from one."""
        folder = getattr(model, "name_or_path", "")
        found = self._origin(Path(folder), first=first) if folder else None
        return found or Lacking("the model was not trained yet")


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder in which the Trainer saves the checkpoint of the present step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _read(path: Path, run: str) -> dict[str, Any]:
    """The state of ``run`` as on_save() wrote it. Raises UsageError for anything else."""
    try:
        state: Any = json.loads(path.read_text())
        if not (isinstance(state, dict) and state.get(LACKS)):
            check_state_is_of(run, state)
    except (ValueError, UsageError) as fault:
        raise UsageError(
            f"{path} does not say which EMA the checkpoint had: {getattr(fault, 'detail', fault)}",
            hint="put back a copy of it, or go on from another checkpoint; or delete it, and with resume=True the run "
            "goes on with the EMA that the service has now",
        ) from fault
    found: dict[str, Any] = state
    return found
