"""The command line as a whole: every command by name, and the options in front of a command.

Knows: which commands there are. Does not know: what a command does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ema_client import __version__
from ema_client.cli import (
    averages,
    checkpoints,
    diff,
    doctor,
    monitoring,
    plan,
    publish,
    runs,
    snapshots,
    sweep,
    watch,
    weights,
)
from ema_client.cli.binding import bound
from ema_client.cli.options import Token, Url

__all__ = ["COMMANDS", "app"]

#: The commands by what they are for, as `ema --help` shows them.
_PANELS: dict[str, dict[str, Callable[..., Any]]] = {
    "Look": {
        "runs": runs.runs,
        "show": runs.show_run,
        "top": monitoring.top,
        "history": monitoring.history,
        "timeline": monitoring.timeline,
        "du": monitoring.du,
        "doctor": doctor.doctor,
    },
    "Weights": {
        "pull": weights.pull,
        "push": weights.push,
        "watch": watch.watch,
        "diff": diff.diff,
        "import": checkpoints.import_run,
        "export": checkpoints.export,
        "publish": publish.publish,
    },
    "Snapshots": {
        "snapshot": snapshots.snapshot,
        "snapshots": snapshots.snapshots,
        "delete-snapshot": snapshots.delete_snapshot,
        "rewind": runs.rewind,
    },
    "Averages of any length": {
        "plan": plan.plan,
        "profiles": snapshots.profiles,
        "sweep": sweep.sweep,
    },
    "Steer": {
        "set-decay": runs.set_decay,
        "reset-num-updates": runs.reset_num_updates,
        "add-average": averages.add_average,
        "remove-average": averages.remove_average,
        "delete": runs.delete,
    },
}
COMMANDS = {name: command for panel in _PANELS.values() for name, command in panel.items()}


@functools.cache
def app() -> Callable[..., Any]:
    """The command ``ema``, to be called; made once, as that takes longer than most commands."""
    made = typer.Typer(
        name="ema",
        help="Look at the runs of an ema-service, pull and watch their EMA weights, bring EMAs in and out.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    made.callback()(_common)
    for panel, commands in _PANELS.items():
        for name, command in commands.items():
            made.command(name, rich_help_panel=panel)(bound(command))
    return typer.main.get_command(made)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ema {__version__}")
        raise typer.Exit


def _common(
    context: typer.Context,
    url: Url = None,
    token: Token = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # Options in front of the command's name, for all commands; each command takes the two behind its name as well.
    del version
    context.obj = (url, token)
