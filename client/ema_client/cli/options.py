"""Options and arguments that several commands share, and the client that the options describe.

Knows: names and help texts of options, what a shell completes of an argument. Does not know: what a command does with
an option.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer

from ema_client import RetryPolicy
from ema_client.client import EmaClient, service_of
from ema_client.errors import EmaError, UsageError, printable
from ema_client.protocol import LAYOUT_DTYPES
from ema_client.reading.probing import Probe
from ema_client.targets import Wished

__all__ = [
    "Average",
    "Dtype",
    "Json",
    "MaxError",
    "Prefix",
    "Run",
    "Snapshot",
    "SnapshotName",
    "Token",
    "Url",
    "WishedOptions",
    "Yes",
    "agreed",
    "connect",
    "look_at",
    "wished_for",
    "without_torch",
]

#: A number of updates.
_COUNTER = re.compile(r"[0-9]{1,19}\Z")


def _names(found: Iterable[str], begun: str) -> list[str]:
    return [name for name in found if name.startswith(begun)]


def _asked(context: typer.Context, ask: Callable[[EmaClient], Iterable[str]]) -> Iterable[str]:
    """What a service that answers at once knows, while a shell completes a word; else nothing."""
    before = context.parent.params if context.parent else {}
    url, token = (context.params.get(name) or before.get(name) for name in ("url", "token"))
    try:
        with EmaClient(url, token=token, retry=RetryPolicy(attempts=1)) as client:
            return tuple(ask(client))
    except EmaError:
        return ()


def _runs(context: typer.Context, incomplete: str) -> list[str]:
    return _names(_asked(context, lambda client: (each.run for each in client.runs())), incomplete)


def _snapshots(context: typer.Context, incomplete: str) -> list[str]:
    """The snapshots of the run that stands before the word."""
    run = str(context.params.get("run"))
    return _names(_asked(context, lambda client: (each.name for each in client.snapshots(run))), incomplete)


def _dtypes(incomplete: str) -> list[str]:
    return _names(LAYOUT_DTYPES, incomplete.upper())


Url = Annotated[str | None, typer.Option(help="The service; else $EMA_SERVICE_URL.", show_default=False)]
Token = Annotated[
    str | None, typer.Option(help="Bearer token; else, and better, $EMA_SERVICE_TOKEN.", show_default=False)
]
Run = Annotated[str, typer.Argument(help="Name of the run.", show_default=False, autocompletion=_runs)]
Average = Annotated[str | None, typer.Option(help="Which average; by default the first.", show_default=False)]
Snapshot = Annotated[
    str | None,
    typer.Option(help="The weights of this snapshot.", show_default=False, autocompletion=_snapshots),
]
SnapshotName = Annotated[
    str, typer.Argument(help="Name of the snapshot.", show_default=False, autocompletion=_snapshots)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help=f"Cast by the service: {', '.join(LAYOUT_DTYPES)}; by default the shadow's own.",
        show_default=False,
        autocompletion=_dtypes,
    ),
]
Prefix = Annotated[
    str | None, typer.Option(help="Only tensors whose names begin with this, such as 'encoder.'.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
SigmaRel = Annotated[
    float | None,
    typer.Option(
        help="An average of any length, of a run with posthoc: its width, relative to the training so far; 0.05 is "
        "short, 0.10 usual, 0.25 long.",
        show_default=False,
    ),
]
Decay = Annotated[
    float | None, typer.Option(help="The same: what this constant decay would have given.", show_default=False)
]
HalfLife = Annotated[float | None, typer.Option(help="The same: a half-life, in updates.", show_default=False)]
Window = Annotated[
    str | None,
    typer.Option(metavar="A:B", help="The same: the mean of the updates after A, up to B.", show_default=False),
]
At = Annotated[
    str | None,
    typer.Option(
        help="The time of such an average: a snapshot's name, or a counter of the ring (`ema show`); by default now. "
        "Digits that are both: snapshot:1000 or counter:1000.",
        show_default=False,
        autocompletion=_snapshots,
    ),
]
MaxError = Annotated[
    float | None,
    typer.Option(help="The largest error of such an average's profile, by default 0.05.", show_default=False),
]
#: The options that wish for an average of any length, of each command that takes such a wish.
WishedOptions: Mapping[str, Any] = {
    "sigma_rel": SigmaRel,
    "decay": Decay,
    "half_life": HalfLife,
    "window": Window,
    "at": At,
    "max_error": MaxError,
}


def wished_for(
    sigma_rel: float | None = None,
    decay: float | None = None,
    half_life: float | None = None,
    window: str | None = None,
    at: str | None = None,
    max_error: float | None = None,
) -> Wished:
    """What the options above name. Raises BadParameter for a window that is none."""
    edges = None if window is None else _window(window)
    return Wished(sigma_rel=sigma_rel, decay=decay, half_life=half_life, window=edges, at=at, max_error=max_error)


def _window(said: str) -> tuple[int, int]:
    edges = said.split(":")
    if len(edges) != 2 or not all(_COUNTER.match(edge) for edge in edges):
        raise typer.BadParameter(f"--window: {said!r} is not A:B, as in 9000:10000")
    return int(edges[0]), int(edges[1])


def connect(context: typer.Context, url: str | None, token: str | None) -> EmaClient:
    """A client of the service that the options name: behind the command, else before, else in the environment."""
    common_url, common_token = context.obj
    return EmaClient(url or common_url, token=token or common_token)


def look_at(context: typer.Context, url: str | None, token: str | None) -> Probe:
    """Single questions to the service that the options name, as for connect()."""
    common_url, common_token = context.obj
    return Probe(*service_of(url or common_url, token or common_token))


def agreed(question: str, *, yes: bool) -> None:
    """Ask before something is lost, unless --yes was given. Raises UsageError where the answer is not yes."""
    if yes:
        return
    # Not by typer.confirm(), which writes a part of the question to standard output.
    sys.stderr.write(f"{printable(question)} [y/N] ")
    sys.stderr.flush()
    answer = sys.stdin.readline() if sys.stdin else ""
    if not answer.endswith("\n"):
        sys.stderr.write("\n")
        raise UsageError("nobody answered, and nothing was changed", hint="--yes does not ask")
    if answer.strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was changed")


def without_torch() -> UsageError:
    """What to do where a command needs torch."""
    return UsageError("this command handles tensors and torch is not installed", hint="pip install torch xxhash")
