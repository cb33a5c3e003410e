"""The route that tells watchers what happens to a run, as server-sent events.

There is no queue. A watcher is told how the run differs from what the watcher was told last, whenever its socket has
room: a watcher that reads slowly is told of the newest version, misses those between, and costs the server no more
memory than one that keeps up.

Knows how a run may differ from one look to the next, and the text of an event stream. Does not know who changes runs,
or what a watcher does with an event.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field, replace

from fastapi import APIRouter, Depends
from fastapi.responses import Response, StreamingResponse
from fastapi.sse import format_sse_event

from ema_client.errors import InvalidRequest, Overloaded, RunNotFound, StorageDisabled
from ema_client.protocol import EventKind, RunEvent, SnapshotInfo, to_json
from ema_service.api.context import Context
from ema_service.api.errors import problem_responses
from ema_service.api.routes.parameters import RunName, Server
from ema_service.persistence import Snapshots
from ema_service.runs import Run
from ema_service.shadows import Average, Version

__all__ = ["HEARTBEAT_SECONDS", "Look", "changes", "router", "stream"]

router = APIRouter(prefix="/v1/runs/{run}", tags=["events"])

#: Seconds of silence after which a comment is sent, as the standard advises: it keeps proxies from hanging up, and a
#: watcher whose machine has died is noticed.
HEARTBEAT_SECONDS = 15.0
#: Milliseconds that a browser waits before it connects again.
_RETRY_MS = 1000
#: Sent at once, so that a client learns in one round trip whether events come through.
_OPENING = format_sse_event(comment="events", retry=_RETRY_MS)
_HEARTBEAT = format_sse_event(comment="")


async def _place(server: Server) -> AsyncIterator[None]:
    """A place among the watchers, held to the end of the answer. Raises Overloaded where all are taken."""
    with server.staying(watches=True):
        yield


@router.get(
    "/events",
    summary="Watch a run",
    dependencies=[Depends(_place)],
    response_class=Response,
    responses={
        200: {
            "description": "An event for each new version, changed decay, reset, average added or removed, snapshot "
            "made or deleted",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **problem_responses(RunNotFound, InvalidRequest, Overloaded),
    },
)
async def get_events(run: RunName, server: Server) -> Response:
    """Server-sent events, beginning with the version as it is now; there is no backlog, whatever Last-Event-ID says.

    A reader that falls behind is told of the newest version only. The stream ends when the run is deleted or made
    anew, or the server stops.
    """
    found, snapshots = server.registry.get(run), _snapshots(server, run)
    # no-transform and X-Accel-Buffering: a proxy that collects events would delay them.
    headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream(server, found, snapshots), headers=headers, media_type="text/event-stream")


@dataclass(frozen=True, slots=True)
class Look:
    """A run as it is at one moment. averages: that it is to have, with weights or before. snapshots: by name. changes:
    Snapshots.changes when the snapshots were read."""

    version: Version | None = None
    averages: tuple[Average, ...] = ()
    snapshots: Mapping[str, SnapshotInfo] = field(default_factory=dict)
    changes: int = -1


async def stream(
    server: Context, run: Run, snapshots: Snapshots | None, *, heartbeat: float = HEARTBEAT_SECONDS
) -> AsyncIterator[bytes]:
    """The body: encoded events until the run is deleted or replaced, or the server stops.

    Of a run that is replaced before it had weights nobody is told: the watcher connects again, and sees the new run.
    """
    with server.watching(run) as moved, server.metrics.watchers.track_inprogress():
        yield _OPENING
        # The present snapshots are no news; the present version is.
        before = replace(await _look(server, run, snapshots, Look()), version=None)
        while True:
            moved.clear()
            gone = run.ledger.retired
            now = before if gone else await _look(server, run, snapshots, before)
            deleted = [_event(run, "run_deleted", now.version)] if gone and not run.ledger.replaced else []
            for event in [*changes(run, before, now), *deleted]:
                server.metrics.events.labels(event.kind).inc()
                yield _encode(event)
            if gone or server.stopping:
                return
            before = now
            try:
                async with asyncio.timeout(heartbeat):
                    await moved.wait()
            except TimeoutError:
                yield _HEARTBEAT


def changes(run: Run, before: Look, now: Look) -> Iterator[RunEvent]:
    """The events for a watcher who knows ``before``: a new version, then everything else that is different."""
    old, new = before.version, now.version
    if new is not None:
        if old is None or str(new) != str(old):
            yield _event(run, "version", new)
        if old is not None:
            yield from _steered(run, old, new)
    if before.averages:
        yield from _other_averages(run, before, now)
    for name, snapshot in before.snapshots.items():
        if not _same(now.snapshots.get(name), snapshot):
            yield _event(run, "snapshot_deleted", new, snapshot)
    for name, snapshot in now.snapshots.items():
        if not _same(before.snapshots.get(name), snapshot):
            yield _event(run, "snapshot_created", new, snapshot)


def _steered(run: Run, old: Version, new: Version) -> Iterator[RunEvent]:
    """The events of changed decays and of a reset counter."""
    for average in new.averages:
        was = old.find(average.member)
        if was and was.decay != average.decay:
            yield _of(average, _event(run, "decay_changed", new))
    # Within an epoch only a reset lowers the counter.
    if new.epoch == old.epoch and new.num_updates < old.num_updates:
        yield _event(run, "num_updates_reset", new)


def _other_averages(run: Run, before: Look, now: Look) -> Iterator[RunEvent]:
    """The events of averages that were removed and added."""
    old, new = ({average.member for average in look.averages} for look in (before, now))
    for average in before.averages:
        if average.member not in new:
            yield _of(average, _event(run, "average_removed", now.version))
    for average in now.averages:
        if average.member not in old:
            yield _of(average, _event(run, "average_added", now.version))


def _of(average: Average, event: RunEvent) -> RunEvent:
    """The event as one of this average."""
    return replace(event, average=average.name, decay=average.decay, effective_decay=average.effective_decay)


def _same(one: SnapshotInfo | None, other: SnapshotInfo) -> bool:
    """Whether both tell of one snapshot, wherever its files lie by now."""
    return one is not None and replace(one, stored=other.stored) == other


def _event(run: Run, kind: EventKind, version: Version | None, snapshot: SnapshotInfo | None = None) -> RunEvent:
    """An event of the run as it is in ``version``."""
    succession = run.ledger.succession
    first = succession.averages(version)[0]
    return RunEvent(
        kind=kind,
        run=run.config.run,
        version=str(version) if version else None,
        step=version.step if version else None,
        num_updates=version.num_updates if version else succession.counter_at_start,
        average=first.name,
        decay=first.decay,
        effective_decay=first.effective_decay,
        snapshot=snapshot,
    )


def _encode(event: RunEvent) -> bytes:
    return format_sse_event(event=event.kind, data_str=json.dumps(to_json(event)), id=event.version)


async def _look(server: Context, run: Run, snapshots: Snapshots | None, before: Look) -> Look:
    """The run as it is now; the list of snapshots is read again only if it changed."""
    state = run.state
    version = state.version if state else None
    look = replace(before, version=version, averages=run.ledger.succession.averages(version))
    if snapshots is None or snapshots.changes == before.changes:
        return look
    changes = snapshots.changes
    found = await server.workers.block(snapshots.all)
    return replace(look, snapshots={snapshot.name: snapshot for snapshot in found}, changes=changes)


def _snapshots(server: Context, run: str) -> Snapshots | None:
    """The snapshots of a run, None where nothing is kept on disk."""
    try:
        return server.registry.snapshots(run)
    except StorageDisabled:
        return None
