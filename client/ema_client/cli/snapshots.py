"""Commands on snapshots, and on averages that are worked out of snapshots: take, list, delete, weigh.

Knows: their arguments, and what of an answer is shown. Does not know: HTTP, torch, how a table is drawn.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ema_client.cli import show
from ema_client.cli.answers import Answer, Table
from ema_client.cli.options import Run, SnapshotName, Yes, agreed
from ema_client.client import EmaClient
from ema_client.targets import Wished

__all__ = ["delete_snapshot", "profiles", "snapshot", "snapshots"]


def snapshot(
    client: EmaClient,
    run: Run,
    name: Annotated[str, typer.Argument(help="Name of the snapshot.", show_default=False)],
    wished: Wished,
) -> Answer:
    """Keep the current EMA weights under a name, on the server; or one average of any length."""
    info = client.snapshot(run, name, **wished)
    said = f"{info.run}/{info.name}: version {info.version}, step {info.step}, {show.size(info.bytes)}"
    return Answer(info, (said,))


def snapshots(client: EmaClient, run: Run) -> Answer:
    """List the snapshots of a run."""
    found = client.snapshots(run)
    table = Table(("snapshot", "version", "step", "num_updates", "averages", "bytes", "stored", "created"))
    for info in found:
        counts = (info.version, show.shown("step", info.step), str(info.num_updates))
        kept = show.size(info.bytes), info.stored, show.when(info.created_at)
        table.add(info.name, *counts, ", ".join(info.averages), *kept)
    return Answer(found, (table if found else "no snapshots yet",))


def delete_snapshot(client: EmaClient, run: Run, name: SnapshotName, yes: Yes = False) -> Answer:
    """Delete a snapshot of a run, for good."""
    agreed(f"Delete snapshot {name} of run {run}?", yes=yes)
    client.delete_snapshot(run, name)
    return Answer({"run": run, "snapshot": name, "deleted": True}, (f"{run}/{name}: deleted",))


def profiles(client: EmaClient, run: Run, wished: Wished) -> Answer:
    """How exactly an average of any length can be had, and of which snapshots of the ring, without its weights."""
    info = client.profiles(run, **wished)
    exact = f"error {info.error:.2g}, amplification {info.amplification:.3g}"
    said = f"{info.run}: {info.target} at num_updates {info.num_updates}, {exact}"
    refused = (f"  refused: {info.refused}",) if info.refused else ()
    table = Table(("num_updates", "average", "weight"))
    for source in info.sources:
        now = " (now)" if source.current else ""
        table.add(f"{source.time}{now}", source.average, f"{source.weight:+.6f}")
    return Answer(info, (said, *refused, table))
