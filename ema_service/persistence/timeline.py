"""The timeline of one run: a line for each thing that somebody, or the service, did to the run, and what lines say.

Knows that a line is worth less than what the line tells of. Does not know what happened, or how a run is measured
(runs/measurements).
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from ema_client.protocol import AverageConfig, SnapshotInfo, TimelineKind
from ema_service.shadows.state import Version
from ema_service.storage import TIMELINE_LINES, RunRow, Store, TimelineRow

__all__ = [
    "Timeline",
    "Told",
    "told_accepted",
    "told_average_added",
    "told_average_removed",
    "told_decay",
    "told_reset",
    "told_rewind",
    "told_snapshot",
    "told_snapshot_gone",
    "told_writer",
]

_log = logging.getLogger(__name__)

#: Lines among which one that is to be there once is looked for.
_LOOKED_AT = 8
#: Lines among which the end of a training is looked for.
_SEARCHED = 64


class Told(NamedTuple):
    """What a line says, the same wherever the run lies."""

    kind: TimelineKind
    text: str

    def line(self, at: Version | SnapshotInfo | None = None) -> TimelineRow:
        """The line, of now. at: the version that the run was at."""
        step, num_updates = (at.step, at.num_updates) if at else (None, None)
        return TimelineRow(time.time(), self.kind, step, num_updates, self.text)


def told_decay(average: str, decay: float) -> Told:
    """An average has another decay."""
    return Told("decay_changed", f"decay of {average} set to {decay}")


def told_average_added(average: AverageConfig) -> Told:
    """The run has one more average, with this schedule and its fields."""
    fields = {"decay": average.decay, **average.schedule_fields()}
    said = [f"{name} {value:g}" for name, value in fields.items() if value is not None]
    return Told("average_added", f"average {average.name} added ({', '.join([average.schedule, *said])})")


def told_average_removed(average: str) -> Told:
    """The run has one average less."""
    return Told("average_removed", f"average {average} removed")


def told_reset() -> Told:
    """The counter was reset."""
    return Told("reset", "the warm-up begins anew")


def told_accepted() -> Told:
    """An operator had a degraded run go on with what there is."""
    return Told("accepted", "the version that is there was accepted")


def told_writer(number: int) -> Told:
    """A trainer attached."""
    return Told("writer", f"trainer {number} took over")


def told_snapshot(taken: SnapshotInfo) -> Told:
    """A snapshot was taken, of a version or of an average that was worked out."""
    how = f"taken of version {taken.version}" if taken.target is None else f"of {taken.target} taken"
    return Told("snapshot", f"snapshot {taken.name} {how}")


def told_snapshot_gone(name: str) -> Told:
    """A snapshot was deleted."""
    return Told("snapshot_deleted", f"snapshot {name} deleted")


def told_rewind(snapshot: str, version: str, step: int | None, source: str | None = None) -> Told:
    """The run went back to a snapshot. version, step: of the snapshot. source: the snapshot's run, where it is another
    one."""
    where = f"snapshot {snapshot}" if source is None else f"snapshot {snapshot} of run {source}"
    return Told("rewound", f"rewound to {where} (version {version}, step {step})")


class Timeline:
    """Writes and reads the timeline of one run: in the catalog, or in memory where there is none. Thread-safe."""

    def __init__(self, run: str, row: RunRow | None, store: Store | None) -> None:
        self._run = run
        self._row = row
        self._store = store
        #: The lines, of a server that keeps nothing on disk.
        self._lines = deque[TimelineRow](maxlen=TIMELINE_LINES)

    def record(self, kind: TimelineKind, text: str, version: Version | None = None, *, once: bool = False) -> None:
        """Add a line. version: the run's by then. once: not where one of the newest lines says the same.

        A failure is only logged: what the line tells of has happened all the same. Of a run that was deleted meanwhile
        nothing is noted: its timeline went with it.
        """
        line = Told(kind, text).line(version)
        if self._store is None or self._row is None:
            self._lines.append(line)
            return
        try:
            if not once or text not in [each.text for each in self.lines(0.0, _LOOKED_AT)]:
                self._store.record(self._row, line)
        except sqlite3.IntegrityError:
            return
        except sqlite3.Error as fault:
            _log.error("run %s: %s; not noted in its timeline: %s", self._run, text, fault)

    def ended_at(self) -> float | None:
        """When the trainer that attached last said that its training is over; None where it did not, or long ago.
        Raises sqlite3.Error."""
        told = [line for line in self.lines(0.0, _SEARCHED) if line.kind in ("writer", "ended")]
        return told[-1].at if told and told[-1].kind == "ended" else None

    def lines(self, since: float, most: int) -> Sequence[TimelineRow]:
        """The newest lines later than ``since``, at most so many, the newest last. Raises sqlite3.Error."""
        if self._store is None or self._row is None:
            return [line for line in tuple(self._lines) if line.at > since][-most:]
        return self._store.timeline(self._row, since, most)
