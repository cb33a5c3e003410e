"""Where charts are drawn: TensorBoard's files, a run of wandb, or a function of the user's.

Knows: how ``log_to`` names one of these, what each takes, and wandb's own count of steps. Does not know: what the
numbers are, or when they come. Imports tensorboard and wandb with the first number.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol

from ema_client.errors import UsageError
from ema_client.reading.health import Measured

__all__ = ["LogTo", "Logger", "check_log_to", "logger_of"]

#: "tensorboard", "tensorboard:FOLDER", "wandb", "wandb:PROJECT", or a function that is called with (values, step).
LogTo = str | Callable[[dict[str, float], int], object]

_KINDS = ("tensorboard", "wandb")


class Logger(Protocol):
    """Where numbers go; for one thread at a time. Any call may raise whatever the program behind it raises."""

    def log(self, measured: Measured) -> None:
        """Show these numbers."""

    def close(self) -> None:
        """Write what is left. No log() after it."""


def logger_of(log_to: LogTo, run: str) -> Logger:
    """The logger that ``log_to`` names, for the numbers of ``run``. Raises as check_log_to()."""
    check_log_to(log_to)
    if not isinstance(log_to, str):
        return _Function(log_to)
    kind, _, where = log_to.partition(":")
    return _TensorBoard(where or f"runs/{run}") if kind == "tensorboard" else _Wandb(run, where or None)


def check_log_to(log_to: object) -> None:
    """Raises UsageError for what names no logger, and for one whose package is missing."""
    if callable(log_to):
        return
    kind = log_to.partition(":")[0] if isinstance(log_to, str) else None
    if kind not in _KINDS:
        raise UsageError(
            f"log_to={log_to!r} is unknown",
            hint="give 'tensorboard', 'tensorboard:FOLDER', 'wandb', 'wandb:PROJECT', or in Python a function",
        )
    spec = find_spec(kind)
    # Without an origin: a folder of that name, such as the one in which wandb itself keeps its files.
    if spec is None or spec.origin is None:
        raise UsageError(f"log_to={log_to!r} needs {kind}, which is not installed", hint=f"pip install {kind}")


class _Function:
    def __init__(self, function: Callable[[dict[str, float], int], object]) -> None:
        self._function = function

    def log(self, measured: Measured) -> None:
        self._function(dict(measured.values), measured.step)

    def close(self) -> None:
        pass


class _TensorBoard:
    """An event file in ``folder``, which other event files may share."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._writer: Any = None

    def log(self, measured: Measured) -> None:
        # Not by torch's SummaryWriter, which is the same with torch around: `ema watch` does without torch.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is None:
            self._writer = EventFileWriter(self._folder)
        values = [Summary.Value(tag=name, simple_value=value) for name, value in measured.values.items()]
        self._writer.add_event(Event(wall_time=measured.time, step=measured.step, summary=Summary(value=values)))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Wandb:
    """The wandb run that the program has begun or, of a project, a run of this logger's own.

    The charts' axis is the metric ``ema/step``, the trainer's step: wandb's own step only grows, and counts rows.
    """

    def __init__(self, run: str, project: str | None) -> None:
        self._name = run
        self._project = project
        #: The wandb run whose axis is defined.
        self._run: Any = None

    def log(self, measured: Measured) -> None:
        import wandb

        if self._project is None:
            # None before wandb.init() and after wandb.finish(): there is nowhere to draw then.
            self._use(wandb.run)
        elif self._run is None:
            self._use(wandb.init(project=self._project, name=f"ema-{self._name}", reinit="create_new"))
        if self._run is not None:
            # A row of its own would raise the step of a run that the program logs to, and wandb drops whatever the
            # program then logs at the step before: there the numbers become part of the program's next row.
            self._run.log({**measured.values, "ema/step": measured.step}, commit=self._project is not None)

    def close(self) -> None:
        if self._project is not None and self._run is not None:
            self._run.finish()

    def _use(self, run: Any) -> None:
        if run is not None and run is not self._run:
            run.define_metric("ema/step", hidden=True)
            run.define_metric("ema/*", step_metric="ema/step")
        self._run = run
