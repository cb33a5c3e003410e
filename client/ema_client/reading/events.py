"""Events of a run: read from the text of an event stream, or found by comparing two answers about the run.

Knows: the format of server-sent events, what of a run changes with which kind of event. Does not know: sockets,
threads, when to ask. No I/O.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace

from ema_client import protocol
from ema_client.errors import ProtocolError
from ema_client.protocol import AverageInfo, EventKind, RunEvent, RunInfo, SnapshotInfo

__all__ = ["CONTENT_TYPE", "differences", "event_of", "parse", "read_event"]

CONTENT_TYPE = "text/event-stream"
#: The most data of an event that is read, in characters: a thousand times what the service sends.
EVENT_LIMIT = 1 << 20


def parse(lines: Iterable[bytes]) -> Iterator[str]:
    """The data of each event of an event stream; an event that is not finished is dropped, as the standard says.

    Raises ProtocolError for an event without end.
    """
    data: list[str] = []
    length = 0
    for raw in lines:
        line = raw.decode("utf-8", "replace").rstrip("\r\n")
        if line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))
            length += len(line)
            if length > EVENT_LIMIT:
                raise ProtocolError(f"an event of more than {EVENT_LIMIT} characters")
        elif not line and data:
            yield "\n".join(data)
            data, length = [], 0


def read_event(url: str, data: str) -> RunEvent:
    """The event that ``data`` is, as JSON. Raises ProtocolError naming ``url``, where the data came from."""
    try:
        return protocol.from_json(RunEvent, json.loads(data))
    except ValueError as fault:
        raise ProtocolError(f"{url} sent an event that is none: {fault}") from None


def differences(old: RunInfo | None, new: RunInfo) -> Iterator[RunEvent]:
    """The events that a stream would have told between two answers to ``GET /v1/runs/{run}``. old: None at first."""
    if new.version is not None and (old is None or old.version != new.version):
        yield event_of("version", new)
    if old:
        yield from _of_averages(old, new)
    if old and new.num_updates < old.num_updates:
        yield event_of("num_updates_reset", new)


def _of_averages(old: RunInfo, new: RunInfo) -> Iterator[RunEvent]:
    """The events of averages that were removed, that were added, and whose decay was changed."""
    were, are = ({(each.name, each.schedule): each for each in info.averages} for info in (old, new))
    kinds: list[tuple[EventKind, list[AverageInfo]]] = [
        ("average_removed", [average for key, average in were.items() if key not in are]),
        ("average_added", [average for key, average in are.items() if key not in were]),
        (
            "decay_changed",
            [average for key, average in are.items() if key in were and were[key].decay != average.decay],
        ),
    ]
    for kind, averages in kinds:
        for average in averages:
            event = event_of(kind, new)
            yield replace(event, average=average.name, decay=average.decay, effective_decay=average.effective_decay)


def event_of(kind: EventKind, info: RunInfo, snapshot: SnapshotInfo | None = None) -> RunEvent:
    """An event of a run that stands as ``info`` says, with the decay of the run's first average."""
    return RunEvent(
        kind=kind,
        run=info.run,
        version=info.version,
        step=info.step,
        num_updates=info.num_updates,
        average=info.averages[0].name,
        decay=info.decay,
        effective_decay=info.effective_decay,
        snapshot=snapshot,
    )
