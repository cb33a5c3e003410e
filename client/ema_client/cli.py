"""The command ``ema``: look at runs, pull weights, take snapshots, from a shell.

Knows: arguments, how things are shown, exit codes (0 done, 1 refused or failed, 2 wrong use). Does not know: HTTP,
torch, or more of the service than EmaClient offers. typer and rich are the extra ``ema-client[cli]``: without them this
module still imports, and main() says what to install.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from ema_client import __version__
from ema_client.client import EmaClient
from ema_client.errors import EmaError
from ema_client.protocol import AverageInfo, RunInfo

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.table import Table
except ModuleNotFoundError as _fault:
    _missing = _fault.name
else:
    _missing = None
    Url = Annotated[str | None, typer.Option(help="The service; else $EMA_SERVICE_URL.", show_default=False)]
    Token = Annotated[
        str | None,
        typer.Option(help="Bearer token; else, and better, $EMA_SERVICE_TOKEN.", show_default=False),
    ]
    Run = Annotated[str, typer.Argument(help="Name of the run.", show_default=False)]
    Average = Annotated[str | None, typer.Option(help="Which average; by default the first.", show_default=False)]
    Version = Annotated[
        bool,
        typer.Option(
            "--version", callback=lambda asked: _print_version(asked), is_eager=True, help="Print the version."
        ),
    ]
    Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

__all__ = ["main"]


def main() -> None:
    """Entry point of the command."""
    if _missing is not None:
        sys.stderr.write(f"ema needs {_missing}, which is not installed: pip install 'ema-client[cli]'\n")
        raise SystemExit(2)
    try:
        _app()()
    except EmaError as error:
        hint = f"\n  {error.hint}" if error.hint else ""
        sys.stderr.write(f"ema: {error.detail}{hint}\n")
        raise SystemExit(1) from None
    except OSError as error:
        sys.stderr.write(f"ema: {error}\n")
        raise SystemExit(1) from None


def _app() -> typer.Typer:
    app = typer.Typer(
        name="ema",
        help="Look at the runs of an ema-service, pull their EMA weights, take snapshots.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_common)
    commands: tuple[Callable[..., None], ...] = (
        _runs,
        _show,
        _pull,
        _snapshot,
        _snapshots,
        _set_decay,
        _reset_num_updates,
        _delete,
    )
    for command in commands:
        app.command(command.__name__.removeprefix("_").replace("_", "-"))(command)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        _print(f"ema {__version__}")
        raise typer.Exit


def _common(context: typer.Context, url: Url = None, token: Token = None, version: Version = False) -> None:
    # Given before the command, for all of them; each takes both after its name as well.
    del version
    context.obj = (url, token)


def _connect(context: typer.Context, url: str | None, token: str | None) -> EmaClient:
    common_url, common_token = context.obj
    return EmaClient(url or common_url, token=token or common_token)


# --- commands -------------------------------------------------------------------------------------------------------


def _runs(context: typer.Context, as_json: Json = False, url: Url = None, token: Token = None) -> None:
    """List the runs."""
    with _connect(context, url, token) as client:
        found = client.runs()
    if as_json:
        _print_json([dataclasses.asdict(info) for info in found])
        return
    table = _table("run", "status", "step", "num_updates", "decay", "effective", "bytes", "updated")
    for info in found:
        table.add_row(*_row(info))
    _print(table if found else "no runs yet")


def _show(context: typer.Context, run: Run, as_json: Json = False, url: Url = None, token: Token = None) -> None:
    """Show one run."""
    with _connect(context, url, token) as client:
        info = client.run(run)
    if as_json:
        _print_json(dataclasses.asdict(info))
        return
    table = Table.grid(padding=(0, 2))
    for field in dataclasses.fields(info):
        table.add_row(field.name, _shown(field.name, getattr(info, field.name)))
    _print(table)


def _pull(
    context: typer.Context,
    run: Run,
    output: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.", dir_okay=False)],
    snapshot: Annotated[str | None, typer.Option(help="The weights of this snapshot.", show_default=False)] = None,
    average: Average = None,
    url: Url = None,
    token: Token = None,
) -> None:
    """Save EMA weights as a safetensors file."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    with _connect(context, url, token) as client, bar:
        task = bar.add_task(run, total=None)
        info = client.download(
            run,
            output,
            average=average,
            snapshot=snapshot,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _print(f"{output}: {info.run}/{info.average}, version {info.version}, step {info.step}, decay {info.decay:.6g}")


def _snapshot(
    context: typer.Context,
    run: Run,
    name: Annotated[str, typer.Argument(help="Name of the snapshot.", show_default=False)],
    url: Url = None,
    token: Token = None,
) -> None:
    """Keep the current EMA weights under a name, on the server."""
    with _connect(context, url, token) as client:
        info = client.snapshot(run, name)
    _print(f"{info.run}/{info.name}: version {info.version}, step {info.step}, {_size(info.bytes)}")


def _snapshots(context: typer.Context, run: Run, url: Url = None, token: Token = None) -> None:
    """List the snapshots of a run."""
    with _connect(context, url, token) as client:
        found = client.snapshots(run)
    table = _table("snapshot", "version", "step", "num_updates", "averages", "bytes", "created")
    for info in found:
        averages = ", ".join(info.averages)
        counts = (info.version, str(info.step), str(info.num_updates))
        table.add_row(info.name, *counts, averages, _size(info.bytes), _time(info.created_at))
    _print(table if found else "no snapshots yet")


def _set_decay(
    context: typer.Context,
    run: Run,
    decay: Annotated[float, typer.Argument(help="Between 0 and 1.", show_default=False)],
    average: Average = None,
    url: Url = None,
    token: Token = None,
) -> None:
    """Change the decay from the next update on."""
    with _connect(context, url, token) as client:
        info = client.set_decay(run, decay, average=average)
    _print(f"{run}: " + ", ".join(f"{one.name} {one.decay:.6g}" for one in info.averages))


def _reset_num_updates(context: typer.Context, run: Run, url: Url = None, token: Token = None) -> None:
    """Let the warm-up of the decay begin anew."""
    with _connect(context, url, token) as client:
        info = client.reset_num_updates(run)
    _print(f"{run}: num_updates {info.num_updates}")


def _delete(
    context: typer.Context,
    run: Run,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Delete a run with its weights and all its snapshots."""
    if not yes:
        typer.confirm(f"Delete run {run} with all its snapshots?", abort=True)
    with _connect(context, url, token) as client:
        client.delete_run(run)
    _print(f"{run}: deleted")


# --- how things are shown -------------------------------------------------------------------------------------------


def _print(thing: Any) -> None:
    # No markup: what a server says is shown as it is. Into a pipe or a file lines are as long as they need to be.
    width = None if sys.stdout.isatty() else 1000
    Console(width=width, markup=False, highlight=False, soft_wrap=isinstance(thing, str)).print(thing)


def _table(*columns: str) -> Table:
    return Table(*columns, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def _row(info: RunInfo) -> tuple[str, ...]:
    return (
        info.run,
        info.status,
        _shown("step", info.step),
        str(info.num_updates),
        f"{info.decay:.6g}",
        _shown("effective_decay", info.effective_decay),
        _size(info.bytes),
        _age(time.time() - info.updated_at),
    )


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "bytes":
        return f"{value} ({_size(value)})"
    if name.endswith("_at"):
        return _time(value)
    if name == "averages":
        return "\n".join(_average(average) for average in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _average(info: AverageInfo) -> str:
    return f"{info.name}: {info.schedule}, decay {info.decay:.6g}"


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _age(seconds: float) -> str:
    """How long ago: one number, as far as a glance needs it."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
