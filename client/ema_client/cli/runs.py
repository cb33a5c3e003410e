"""Commands on runs: list, show, steer, go back, delete.

Knows: their arguments, and what of an answer is shown. Does not know: HTTP, torch, how a table is drawn.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated

import typer

from ema_client.cli import show
from ema_client.cli.answers import Answer, Table
from ema_client.cli.options import Average, Run, Yes, agreed
from ema_client.client import EmaClient
from ema_client.errors import SnapshotNotFound, listed
from ema_client.protocol import RunInfo, SnapshotInfo

__all__ = ["delete", "reset_num_updates", "rewind", "runs", "set_decay", "show_run"]


def runs(client: EmaClient) -> Answer:
    """List the runs."""
    found = client.runs()
    table = Table(("run", "status", "step", "num_updates", "decay", "effective", "bytes", "updated"))
    for info in found:
        table.add(*_row(info))
    sick = [f"{info.run}: {info.reason}" + (f"; {info.remedy}" if info.remedy else "") for info in found if info.reason]
    return Answer(found, (table, *sick) if found else ("no runs yet",))


def _row(info: RunInfo) -> tuple[str, ...]:
    return (
        info.run,
        info.status,
        show.shown("step", info.step),
        str(info.num_updates),
        f"{info.decay:.6g}",
        show.shown("effective_decay", info.effective_decay),
        show.size(info.bytes),
        show.age(time.time() - info.updated_at),
    )


def show_run(client: EmaClient, run: Run) -> Answer:
    """Show one run."""
    info = client.run(run)
    table = Table()
    for field in dataclasses.fields(info):
        table.add(field.name, show.shown(field.name, getattr(info, field.name)))
    layout = client.layout(run)
    # Each host of a cluster tells its own, to whoever pushes past the gateway.
    by = " by the gateway" if layout.shards > 1 else ""
    table.add("lanes", f"{layout.lanes}, at most, of a push{by}")
    return Answer({**dataclasses.asdict(info), "lanes": layout.lanes}, (table,))


def set_decay(
    client: EmaClient,
    run: Run,
    decay: Annotated[float, typer.Argument(help="Between 0 and 1.", show_default=False)],
    average: Average = None,
) -> Answer:
    """Change the decay from the next update on."""
    info = client.set_decay(run, decay, average=average)
    return Answer(info, (f"{run}: " + ", ".join(f"{one.name} {one.decay:.6g}" for one in info.averages),))


def reset_num_updates(client: EmaClient, run: Run) -> Answer:
    """Let the warm-up of the decay begin anew."""
    info = client.reset_num_updates(run)
    return Answer(info, (f"{run}: num_updates {info.num_updates}",))


def rewind(
    client: EmaClient,
    run: Run,
    snapshot: Annotated[str | None, typer.Argument(help="Name of the snapshot.", show_default=False)] = None,
    accept: Annotated[bool, typer.Option("--accept", help="A degraded run: go on with what is there.")] = False,
    yes: Yes = False,
) -> Answer:
    """Go back to a snapshot: updates after it are done away with. Says how many, and asks."""
    if (snapshot is None) != accept:
        raise typer.BadParameter("give the name of a snapshot, or --accept")
    if not yes:
        agreed(_lost(client, run, snapshot), yes=yes)
    info = client.rewind(run, snapshot)
    return Answer(info, (f"{run}: version {info.version}, step {info.step}, num_updates {info.num_updates}",))


def _lost(client: EmaClient, run: str, name: str | None) -> str:
    """What a rewind does away with, as a question."""
    now = client.run(run)
    if name is None:
        damage = f" ({now.reason})" if now.reason else ""
        return f"Go on with {run} at step {now.step}, and give up what could not be read{damage}?"
    found = {each.name: each for each in client.snapshots(run)}
    if name not in found:
        raise SnapshotNotFound(f"run {run!r} has no snapshot {name!r}; it has {listed(found) or 'none'}")
    return f"Go back to {name}? {_discarded(now, found[name])}"


def _discarded(now: RunInfo, then: SnapshotInfo) -> str:
    """How many updates lie between a snapshot and now: a version counts them, as long as its epoch lasts."""
    (epoch, count), (old_epoch, old_count) = ((now.version or "0.0").split("."), then.version.split("."))
    steps = f"step {now.step} becomes step {then.step}"
    if epoch == old_epoch:
        updates = int(count) - int(old_count)
        return f"This discards {updates} update{'' if updates == 1 else 's'}: {steps}."
    return f"The run went back before since then: {steps}, num_updates {now.num_updates} becomes {then.num_updates}."


def delete(client: EmaClient, run: Run, yes: Yes = False) -> Answer:
    """Delete a run with its weights and all its snapshots."""
    agreed(f"Delete run {run} with all its snapshots?", yes=yes)
    client.delete_run(run)
    return Answer({"run": run, "deleted": True}, (f"{run}: deleted",))
