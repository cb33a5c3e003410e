"""What went wrong, told in the words of the command line: one line, and what to type.

An error's own hint speaks to whoever reads it in Python or over HTTP. Here the same error names a command or an option.

Knows: classes of errors, commands and options by name. Does not know: who raises which error, or what a command does.
"""

from __future__ import annotations

import contextlib
import errno
import re
import sys
from collections.abc import Iterator

import typer

from ema_client import errors
from ema_client.errors import EmaError, UsageError, printable

__all__ = ["HINTS", "hint_of", "refusals"]

#: What to do about an error of a class, where the class' own hint is for other readers. {run}: the command's run.
HINTS: dict[type[EmaError], str] = {
    errors.Unauthorized: "give --token, or set EMA_SERVICE_TOKEN; `ema-service token create` on the server makes one",
    errors.RouteNotFound: "client and server are of different versions: `ema doctor` tells both",
    errors.MethodNotAllowed: "client and server are of different versions: `ema doctor` tells both",
    errors.RunNotFound: "`ema runs` lists the runs of this server",
    errors.SnapshotNotFound: "`ema snapshots {run}` lists them",
    errors.AverageNotFound: "`ema show {run}` lists the averages",
    errors.RunExists: "choose another name; or `ema delete {run}`, which also deletes its snapshots",
    errors.AwaitingWeights: "the trainer sends them when it begins; `ema show {run}` tells",
    errors.WeightsExist: "`ema push` sends an update; or `ema delete {run}` to begin anew",
    errors.StaleStep: "give a later --step; `ema show {run}` tells the run's step",
    errors.StepNotReached: "try again later; `ema show {run}` tells the run's step",
    errors.Fenced: "a trainer is attached to the run and would be the only one to push; --take-over shuts it out",
    errors.SnapshotExists: "choose another name, or `ema delete-snapshot {run} NAME` first",
    errors.SnapshotDamaged: "restore the file in the server's data dir, or `ema delete-snapshot {run} NAME`",
    errors.TooManyRuns: "`ema delete` runs that are done",
    errors.TooManySnapshots: "`ema delete-snapshot {run} NAME`, of those that nobody needs any more; or start the "
    "server with a larger --max-snapshots",
    errors.AverageExists: "choose another name, or `ema remove-average {run} NAME` first",
    errors.LastAverage: "`ema add-average` another one first, or `ema delete {run}`",
    errors.TooManyAverages: "`ema remove-average {run} NAME`, of one that nobody needs any more",
    errors.RunDegraded: "`ema rewind {run} SNAPSHOT` goes back to a snapshot (`ema snapshots {run}`), "
    "`ema rewind {run} --accept` goes on with the version that is there; or restore the run's files from a backup and "
    "restart the server",
    errors.InvalidRequest: "correct what is named; `ema COMMAND --help` tells what each option takes",
    errors.LayoutMismatch: "give exactly the tensors of the run; `ema import` makes a new run of a changed model",
    errors.SynthesisRefused: "ask for what is named instead, or for `ema profiles {run}`, which says what can be had",
    errors.StorageDisabled: "start the server without --memory to keep snapshots",
}
#: A route of HTTP, of which a hint for other readers speaks.
_ROUTE = re.compile(r"/v1/|\b(?:GET|POST|PUT|PATCH|DELETE) /")
#: ``name=`` or ``name=value``, as Python writes an argument.
_ARGUMENT = re.compile(r"(?<![\w-])(sigma_rel|decay|half_life|window|at|max_error|token|url|dtype|log_to)=(?=(\S?))")
_PAIR = re.compile(r"\((\d+), (\d+)\)")


@contextlib.contextmanager
def refusals(run: str | None) -> Iterator[None]:
    """End the command with exit code 1 and a message where the block raises an EmaError or an OSError.

    run: the command's run, for hints. A reader that has left (``| head``) is no fault of the command, and untold.
    """
    try:
        yield
    except EmaError as error:
        hint = hint_of(error, run)
        _end(_typed(error.detail, error), hint)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        _end(printable(str(error)), "")


def hint_of(error: EmaError, run: str | None = None) -> str:
    """What to do about an error, for whoever typed a command on ``run``."""
    general = error.hint in ("", error.default_hint) or _ROUTE.search(error.hint)
    if general and type(error) in HINTS:
        return HINTS[type(error)].format(run=run or "RUN")
    return _typed(error.hint, error)


def _typed(text: str, error: EmaError) -> str:
    """A text of a mistake that Python's caller is told of, as the options have it: ``--window 9000:10000``."""
    if not isinstance(error, UsageError):
        return text
    text = _ARGUMENT.sub(lambda found: _option(found[1], found[2]), text)
    return _PAIR.sub(r"\1:\2", text)


def _option(name: str, following: str) -> str:
    return f"--{name.replace('_', '-')}{' ' if following and following not in ',.;:)' else ''}"


def _end(detail: str, hint: str) -> None:
    sys.stderr.write(f"ema: {detail}\n" + (f"  {hint}\n" if hint else ""))
    raise typer.Exit(1) from None
