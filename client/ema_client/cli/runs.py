"""Commands on runs and their weights: list, show, pull, snapshot, steer, delete.

Knows: their arguments, and what of an answer is shown. Does not know: HTTP, torch, how a table is drawn.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ema_client.cli import show
from ema_client.cli.options import (
    At,
    Average,
    Decay,
    HalfLife,
    Json,
    MaxError,
    Run,
    SigmaRel,
    Token,
    Url,
    Window,
    connect,
    wished_for,
)
from ema_client.protocol import WeightsInfo

__all__ = [
    "delete",
    "profiles",
    "pull",
    "reset_num_updates",
    "rewind",
    "runs",
    "set_decay",
    "show_run",
    "snapshot",
    "snapshots",
]


def runs(context: typer.Context, as_json: Json = False, url: Url = None, token: Token = None) -> None:
    """List the runs."""
    with connect(context, url, token) as client:
        found = client.runs()
    if as_json:
        show.print_json([dataclasses.asdict(info) for info in found])
        return
    rows = show.table("run", "status", "step", "num_updates", "decay", "effective", "bytes", "updated")
    for info in found:
        rows.add_row(*show.row(info))
    show.say(rows if found else "no runs yet")


def show_run(context: typer.Context, run: Run, as_json: Json = False, url: Url = None, token: Token = None) -> None:
    """Show one run."""
    with connect(context, url, token) as client:
        info = client.run(run)
    if as_json:
        show.print_json(dataclasses.asdict(info))
        return
    rows = show.pairs()
    for field in dataclasses.fields(info):
        rows.add_row(field.name, show.shown(field.name, getattr(info, field.name)))
    show.say(rows)


def pull(
    context: typer.Context,
    run: Run,
    output: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.", dir_okay=False)],
    snapshot: Annotated[str | None, typer.Option(help="The weights of this snapshot.", show_default=False)] = None,
    soup: Annotated[
        str | None,
        typer.Option(metavar="NAME:WEIGHT,…", help="The sum of snapshots, each times its weight.", show_default=False),
    ] = None,
    average: Average = None,
    sigma_rel: SigmaRel = None,
    decay: Decay = None,
    half_life: HalfLife = None,
    window: Window = None,
    at: At = None,
    max_error: MaxError = None,
    url: Url = None,
    token: Token = None,
) -> None:
    """Save EMA weights as a safetensors file."""
    mixed = None if soup is None else _soup(soup)
    wished = wished_for(sigma_rel, decay, half_life, window, at, max_error)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    with connect(context, url, token) as client, bar:
        task = bar.add_task(run, total=None)
        info = client.download(
            run,
            output,
            average=average,
            snapshot=snapshot,
            soup=mixed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            **wished,
        )
    show.say(f"{output}: {info.run}/{info.average}, version {info.version}, step {info.step}, {_which(info)}")


def _which(info: WeightsInfo) -> str:
    """The decay of an average, or what was wished for, and how nearly it came."""
    if info.target is None:
        return f"decay {info.decay:.6g}"
    return f"num_updates {info.num_updates}, {info.target}, error {info.profile_error or 0.0:.2g}"


def _soup(said: str) -> dict[str, float]:
    """The weight of each snapshot. Raises BadParameter."""
    weights: dict[str, float] = {}
    for part in said.split(","):
        name, _, weight = part.partition(":")
        try:
            known, weights[name] = name in weights, float(weight)
        except ValueError:
            raise typer.BadParameter(f"--soup: {part!r} is not NAME:WEIGHT, as in last:0.5,best:0.5") from None
        if known:
            raise typer.BadParameter(f"--soup: the snapshot {name!r} stands there twice")
    return weights


def snapshot(
    context: typer.Context,
    run: Run,
    name: Annotated[str, typer.Argument(help="Name of the snapshot.", show_default=False)],
    sigma_rel: SigmaRel = None,
    decay: Decay = None,
    half_life: HalfLife = None,
    window: Window = None,
    at: At = None,
    max_error: MaxError = None,
    url: Url = None,
    token: Token = None,
) -> None:
    """Keep the current EMA weights under a name, on the server; or one average of any length."""
    with connect(context, url, token) as client:
        info = client.snapshot(run, name, **wished_for(sigma_rel, decay, half_life, window, at, max_error))
    show.say(f"{info.run}/{info.name}: version {info.version}, step {info.step}, {show.size(info.bytes)}")


def profiles(
    context: typer.Context,
    run: Run,
    sigma_rel: SigmaRel = None,
    decay: Decay = None,
    half_life: HalfLife = None,
    window: Window = None,
    at: At = None,
    max_error: MaxError = None,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """How exactly an average of any length can be had, and of which snapshots of the ring, without its weights."""
    with connect(context, url, token) as client:
        info = client.profiles(run, **wished_for(sigma_rel, decay, half_life, window, at, max_error))
    if as_json:
        show.print_json(dataclasses.asdict(info))
        return
    exact = f"error {info.error:.2g}, amplification {info.amplification:.3g}"
    show.say(f"{info.run}: {info.target} at num_updates {info.num_updates}, {exact}")
    if info.refused:
        show.say(f"  refused: {info.refused}")
    rows = show.table("num_updates", "average", "weight")
    for source in info.sources:
        now = " (now)" if source.current else ""
        rows.add_row(f"{source.time}{now}", source.average, f"{source.weight:+.6f}")
    show.say(rows)


def snapshots(context: typer.Context, run: Run, url: Url = None, token: Token = None) -> None:
    """List the snapshots of a run."""
    with connect(context, url, token) as client:
        found = client.snapshots(run)
    rows = show.table("snapshot", "version", "step", "num_updates", "averages", "bytes", "created")
    for info in found:
        averages = ", ".join(info.averages)
        counts = (info.version, str(info.step), str(info.num_updates))
        rows.add_row(info.name, *counts, averages, show.size(info.bytes), show.when(info.created_at))
    show.say(rows if found else "no snapshots yet")


def set_decay(
    context: typer.Context,
    run: Run,
    decay: Annotated[float, typer.Argument(help="Between 0 and 1.", show_default=False)],
    average: Average = None,
    url: Url = None,
    token: Token = None,
) -> None:
    """Change the decay from the next update on."""
    with connect(context, url, token) as client:
        info = client.set_decay(run, decay, average=average)
    show.say(f"{run}: " + ", ".join(f"{one.name} {one.decay:.6g}" for one in info.averages))


def reset_num_updates(context: typer.Context, run: Run, url: Url = None, token: Token = None) -> None:
    """Let the warm-up of the decay begin anew."""
    with connect(context, url, token) as client:
        info = client.reset_num_updates(run)
    show.say(f"{run}: num_updates {info.num_updates}")


def rewind(
    context: typer.Context,
    run: Run,
    snapshot: Annotated[str | None, typer.Argument(help="Name of the snapshot.", show_default=False)] = None,
    accept: Annotated[bool, typer.Option("--accept", help="A degraded run: go on with what is there.")] = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Go back to a snapshot: updates after it are done away with."""
    if (snapshot is None) != accept:
        raise typer.BadParameter("give the name of a snapshot, or --accept")
    with connect(context, url, token) as client:
        info = client.rewind(run, snapshot)
    show.say(f"{run}: version {info.version}, step {info.step}, num_updates {info.num_updates}")


def delete(
    context: typer.Context,
    run: Run,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Delete a run with its weights and all its snapshots."""
    if not yes:
        typer.confirm(f"Delete run {run} with all its snapshots?", abort=True)
    with connect(context, url, token) as client:
        client.delete_run(run)
    show.say(f"{run}: deleted")
