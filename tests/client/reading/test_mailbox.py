"""The mailbox between a reader of events and a slow loop. Knows events only."""

from __future__ import annotations

from typing import Any

import pytest

from ema_client.errors import ProtocolError
from ema_client.protocol import RunEvent, SnapshotInfo
from ema_client.reading.mailbox import Mailbox


def an_event(kind: str = "version", n: int = 1, **fields: Any) -> RunEvent:
    return RunEvent(kind, "r", f"1.{n}", n, n, "ema", 0.5, 0.5, **fields)  # type: ignore[arg-type]


def a_snapshot(name: str) -> SnapshotInfo:
    return SnapshotInfo("r", name, "1.1", 1, 1, ("ema",), 8, 1.0)


def test_mailbox_keeps_the_newest_of_each_kind() -> None:
    """Old news is replaced, not queued; a deleted snapshot takes the place of its creation; order is of arrival."""
    mailbox = Mailbox(frozenset({"version", "snapshot_created", "snapshot_deleted", "decay_changed"}))
    mailbox.deliver(an_event(n=1))
    mailbox.deliver(an_event("snapshot_created", snapshot=a_snapshot("a")))
    mailbox.deliver(an_event("snapshot_created", snapshot=a_snapshot("b")))
    mailbox.deliver(an_event("num_updates_reset"))
    mailbox.deliver(an_event("snapshot_deleted", snapshot=a_snapshot("a")))
    mailbox.deliver(an_event(n=2))
    mailbox.close()
    taken = list(iter(lambda: mailbox.take(0.0), None))
    assert [(event.kind, event.snapshot.name if event.snapshot else event.version) for event in taken] == [
        ("snapshot_created", "b"),
        ("snapshot_deleted", "a"),
        ("version", "1.2"),
    ]


def test_mailbox_knows_what_it_was_told_before() -> None:
    """A version or a snapshot that a new connection tells of again is no news, even if it was taken meanwhile."""
    mailbox = Mailbox(frozenset({"version", "snapshot_created"}))
    for _ in range(2):
        mailbox.deliver(an_event(n=1))
        mailbox.deliver(an_event("snapshot_created", snapshot=a_snapshot("a")))
        taken = [mailbox.take(0.0), mailbox.take(0.0)]
    assert taken == [None, None]


def test_mailbox_gives_events_before_the_fault() -> None:
    """What came before the end is still given; then the fault is raised."""
    mailbox = Mailbox(frozenset({"version"}))
    mailbox.deliver(an_event())
    mailbox.close(ProtocolError("broken"))
    assert mailbox.take(0.0) is not None
    with pytest.raises(ProtocolError, match="broken"):
        mailbox.take(0.0)
