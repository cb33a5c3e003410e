"""Commands that show how runs go and what they take: top, history, timeline, du.

Knows: which figures answer which question. Does not know: HTTP, how a table is drawn.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from ema_client.cli import show
from ema_client.cli.answers import Answer, Table
from ema_client.cli.options import Run
from ema_client.client import EmaClient
from ema_client.errors import RouteNotFound, RunNotFound
from ema_client.protocol import HISTORY_POINTS, TIMELINE_ENTRIES, HistoryColumns, RunInfo, ServerInfo

__all__ = ["Use", "du", "history", "timeline", "top"]

#: The server holds a shadow beside its next version, and two checkpoints of it.
_VERSIONS = 2


@dataclass(frozen=True, slots=True)
class Use:
    """What a run takes of the server, in bytes. memory: its shadows and their next version. disk: of which checkpoints,
    the ring and the snapshots are parts. in_store: bytes of snapshots that lie in the service's object store instead.
    """

    run: str
    memory: int
    disk: int
    checkpoints: int
    ring: int
    snapshots: int
    snapshot_count: int
    in_store: int


def du(client: EmaClient) -> Answer:
    """What each run takes of the server's memory and disk, the largest last, and what there is."""
    used = sorted((_use(client, info) for info in client.runs()), key=lambda each: each.memory + each.disk)
    table = Table(("run", "memory", "disk", "checkpoints", "ring", "snapshots"))
    for each in used:
        parts = (show.size(part) for part in (each.memory, each.disk, each.checkpoints, each.ring))
        elsewhere = f", {show.size(each.in_store)} in the store" if each.in_store else ""
        table.add(each.run, *parts, f"{each.snapshot_count} ({show.size(each.snapshots)}{elsewhere})")
    server = client.server()
    return Answer({"runs": used, "server": server}, (table if used else "no runs yet", *_capacity(server)))


def _use(client: EmaClient, info: RunInfo) -> Use:
    taken = client.snapshots(info.run) if info.versions_in else ()
    checkpoints = _VERSIONS * info.bytes if info.versions_in else 0
    ring = info.ring.bytes if info.ring else 0
    snapshots = sum(each.bytes for each in taken if each.stored == "local")
    in_store = sum(each.bytes for each in taken) - snapshots
    memory = _VERSIONS * info.bytes
    return Use(info.run, memory, checkpoints + ring + snapshots, checkpoints, ring, snapshots, len(taken), in_store)


def _capacity(server: ServerInfo) -> Iterator[str]:
    if server.memory_bytes is not None and server.memory_limit_bytes is not None:
        yield f"memory: {show.size(server.memory_bytes)} in use of {show.size(server.memory_limit_bytes)}"
    if server.data_dir_bytes is not None and server.disk_free_bytes is not None:
        yield f"disk: {show.size(server.data_dir_bytes)} in the data dir, {show.size(server.disk_free_bytes)} free"


def history(
    client: EmaClient,
    run: Run,
    points: Annotated[
        int, typer.Option(min=HISTORY_POINTS[0], max=HISTORY_POINTS[1], help="At most so many rows, evenly over time.")
    ] = 20,
    hours: Annotated[float | None, typer.Option(min=0, help="Of the last so many hours.", show_default=False)] = None,
) -> Answer:
    """How a run went: its distance from the parameters, its rate, how far behind its durable step was."""
    since = None if hours is None else time.time() - 3600 * hours
    found = client.history(run, since=since, points=points)
    columns = found.columns
    table = Table(("time", "step", "num_updates", "decay", "distance", "updates/s", "lag"))
    for k, moment in enumerate(columns.time):
        counts = (show.shown("", columns.step[k]), show.shown("", columns.num_updates[k]))
        figures = (columns.effective_decay[k], columns.distance[k], columns.rate[k], columns.durable_lag[k])
        table.add(show.when(moment), *counts, *map(show.number, figures))
    return Answer(found, (table if columns.time else "nothing was measured yet",))


def timeline(
    client: EmaClient,
    run: Run,
    limit: Annotated[
        int, typer.Option(min=TIMELINE_ENTRIES[0], max=TIMELINE_ENTRIES[1], help="The newest so many.")
    ] = 100,
) -> Answer:
    """What was done to a run: decays, rewinds, trainers that took over, snapshots, damage; the newest last."""
    found = client.timeline(run, limit=limit)
    table = Table(("time", "step", "what"))
    for entry in found.entries:
        table.add(show.when(entry.time), show.shown("", entry.step), entry.text)
    return Answer(found, (table if found.entries else "nothing was done yet",))


@dataclass(slots=True)
class _Row:
    """A run in the live table. rate: updates per second. lag: steps that are not durable yet."""

    run: str
    status: str
    step: int | None
    rate: float | None
    distance: float | None
    lag: int | None
    updated_at: float
    version: str | None


def top(
    client: EmaClient,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many looks.", show_default=False)] = None,
) -> Iterator[Answer]:
    """Watch all runs: rate, distance from the parameters, steps that are not durable yet; the latest first."""
    looks = 0
    table = _Top(client)
    while True:
        rows = table.look()
        yield Answer([asdict(row) for row in rows], tuple(_drawn(rows)), replaces=True)
        looks += 1
        if looks == count:
            return
        time.sleep(interval)


def _drawn(rows: Sequence[_Row]) -> Iterator[str | Table]:
    table = Table(("run", "status", "step", "updates/s", "distance", "lag", "updated"))
    for row in rows:
        figures = (show.number(row.rate, 3), show.number(row.distance, 3), show.shown("", row.lag))
        age = show.age(time.time() - row.updated_at)
        table.add(row.run, row.status, show.shown("", row.step), *figures, age)
    yield table if rows else "no runs yet"


class _Top:
    """Looks at all runs again and again; asks of the history only those that moved since the look before."""

    def __init__(self, client: EmaClient) -> None:
        self._client = client
        self._rows: dict[str, _Row] = {}
        self._looked = 0.0
        self._measured = True

    def look(self) -> list[_Row]:
        """A row for each run, the one with the latest update first."""
        found, now = self._client.runs(), time.monotonic()
        self._rows = {info.run: self._row(info, now - self._looked) for info in found}
        self._looked = now
        return sorted(self._rows.values(), key=lambda row: -row.updated_at)

    def _row(self, info: RunInfo, passed: float) -> _Row:
        before = self._rows.get(info.run)
        moved = before is None or before.version != info.version
        newest = self._newest(info.run) if moved else None
        rate, distance = (None, None) if newest is None else (newest.rate[-1], newest.distance[-1])
        if before is not None:
            rate = _updates(before.version, info.version) / passed
            distance = distance if moved else before.distance
        lag = None if info.step is None or info.durable_step is None else info.step - info.durable_step
        return _Row(info.run, info.status, info.step, rate, distance, lag, info.updated_at, info.version)

    def _newest(self, run: str) -> HistoryColumns | None:
        """The newest measurement of a run; None where there is none, or the service measures nothing."""
        try:
            columns = self._client.history(run, points=1).columns if self._measured else None
        except RouteNotFound:
            self._measured = False
            return None
        except RunNotFound:
            # Deleted since the list.
            return None
        return columns if columns and columns.time else None


def _updates(before: str | None, now: str | None) -> int:
    """How many updates lie between two versions; 0 where the run went back meanwhile."""
    (epoch, old), (new_epoch, new) = ((each or "0.0").split(".") for each in (before, now))
    return int(new) - int(old) if epoch == new_epoch else 0
