"""How a whole run went, of what its hosts noted each by itself: measurements, distances of tensors, the timeline.

Hosts measure when it suits them, so a row of the whole run is one of host 0, with what each other host measured last up
to that step. Norms add up as squares; a distance, of all tensors, a group or a tensor, is the hosts' distances, weighed
with their parameters' norms.

Pure. Knows the dataclasses of the protocol, and which facts add up. Does not know HTTP, or how anything is measured.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ema_client.protocol import (
    DEFAULT_ENTRIES,
    TIMELINE_ENTRIES,
    Distances,
    History,
    Timeline,
    TimelineEntry,
)

__all__ = ["asked_of_hosts", "whole_distances", "whole_history", "whole_timeline"]

#: Significant digits of what is told, as a server has them.
_DIGITS = 7
#: Numbers in a request for a timeline, as our client writes them.
_LIMIT, _TIME = re.compile(r"[1-9][0-9]{0,3}", re.ASCII), re.compile(r"[0-9]{1,11}(\.[0-9]{0,24})?", re.ASCII)
#: What is done on all hosts or on none, and so told by each of them.
_TOGETHER = (
    "created",
    "decay_changed",
    "reset",
    "average_added",
    "average_removed",
    "writer",
    "snapshot",
    "snapshot_deleted",
    "rewound",
)
#: Columns of which the whole run has what its slowest host has.
_WORST = ("durable_lag", "seconds_receive", "seconds_average", "seconds_commit")


def whole_history(histories: Sequence[History]) -> History:
    """The history of the whole run. histories: the hosts', by place."""
    first = histories[0]
    seen = [_Seen(each) for each in histories]
    rows = [[each.at(key) for each in seen] for key in seen[0].keys]
    columns: dict[str, Any] = {
        "distance": [_distance(row) for row in rows],
        "shadow_norm": [_norm(row, "shadow_norm") for row in rows],
        "parameter_norm": [_norm(row, "parameter_norm") for row in rows],
        "bytes_per_second": [_sum(row, "bytes_per_second") for row in rows],
        **{name: [_worst(row, name) for row in rows] for name in _WORST},
    }
    begins = [each.begin for each in histories]
    return replace(
        first,
        version=_oldest([each.version for each in histories]),
        seen=min(each.seen for each in histories),
        begin=None if None in begins else max(begin for begin in begins if begin is not None),
        columns=replace(first.columns, **{name: tuple(values) for name, values in columns.items()}),
        groups={
            name: tuple(_distance_of_group(row, [name in each.groups for each in histories], name) for row in rows)
            for name in dict.fromkeys(name for each in histories for name in each.groups)
        },
        group_norms={},
    )


def whole_distances(found: Sequence[Distances]) -> Distances:
    """The distances of all tensors. found: the hosts', by place; of a tensor that was cut several have rows."""
    rows: dict[str, list[tuple[float | None, float | None]]] = {}
    for each in found:
        for name, value in each.tensors.items():
            rows.setdefault(name, []).append((value, each.norms.get(name)))
    tensors = {name: _put_together(each) if len(each) > 1 else each[0][0] for name, each in rows.items()}
    steps = [each.step for each in found]
    step = None if None in steps else min(step for step in steps if step is not None)
    version = _oldest([each.version for each in found])
    return replace(found[0], version=version, step=step, tensors=tensors, norms={})


def asked_of_hosts(query: Mapping[str, str]) -> tuple[int, float, dict[str, str]]:
    """How many entries of a timeline, and later than when, a request asks for, and the query for the hosts: for all
    that they have, as of one thing their entries have different times. What is written otherwise than our client does
    is left to the hosts, which refuse what is wrong."""
    most, since = query.get("limit", str(DEFAULT_ENTRIES)), query.get("since", "0")
    plain = _LIMIT.fullmatch(most) and _TIME.fullmatch(since)
    if not plain or not TIMELINE_ENTRIES[0] <= int(most) <= TIMELINE_ENTRIES[1]:
        return TIMELINE_ENTRIES[1], 0.0, dict(query)
    return int(most), float(since), {"limit": str(TIMELINE_ENTRIES[1])}


def whole_timeline(timelines: Sequence[Timeline], most: int, since: float = 0.0) -> Timeline:
    """What was done to the whole run: the newest ``most`` that is later than ``since``. timelines: all that hosts have.

    What hosts make together is told once, as soon as one of them has noted it: the verdict is on its way to the others,
    or they were filled from their twins, which lend no timeline. Of anything else what all hosts noted is told once,
    and with the host's name what some of them did.
    """
    noted: dict[tuple[object, ...], dict[int, TimelineEntry]] = {}
    for place, timeline in enumerate(timelines):
        times: Counter[tuple[object, ...]] = Counter()
        for entry in timeline.entries:
            about = _about(entry)
            times[about] += 1
            noted.setdefault((*about, times[about]), {})[place] = entry
    entries = [each for places in noted.values() for each in _told(places, len(timelines))]
    later = [entry for entry in entries if entry.time > since]
    return Timeline(timelines[0].run, tuple(sorted(later, key=lambda entry: entry.time)[-most:]))


# --- measurements ----------------------------------------------------------------------------------------------------

#: Of a column, or of a group and what was measured of it.
_Name = str | tuple[str, str]


@dataclass(frozen=True, slots=True)
class _Row:
    """What a host had measured up to one step. measured: the newest of the columns that are not measured each time."""

    values: Mapping[str, Any]
    measured: Mapping[_Name, Any]


class _Seen:
    """One host's rows. keys: of each row, by which rows of several hosts are in one order."""

    def __init__(self, history: History) -> None:
        columns = history.columns
        self.keys = _keys(columns.step)
        names = ("bytes_per_second", *_WORST)
        self._rows: list[_Row] = []
        measured: dict[_Name, Any] = {}
        for at in range(len(self.keys)):
            if columns.parameter_norm[at] is not None:
                measured = {name: getattr(columns, name)[at] for name in ("distance", "shadow_norm", "parameter_norm")}
                measured |= {(name, "distance"): each[at] for name, each in history.groups.items()}
                measured |= {(name, "norm"): each[at] for name, each in history.group_norms.items()}
            self._rows.append(_Row({name: getattr(columns, name)[at] for name in names}, measured))

    def at(self, key: tuple[int, int]) -> _Row | None:
        """The latest row up to this one; None before there is any."""
        place = bisect_right(self.keys, key)
        return self._rows[place - 1] if place else None


def _keys(steps: Sequence[int | None]) -> list[tuple[int, int]]:
    """Of each row, how often the run went back to an earlier step after it (less is later), and its step."""
    plain = [-1 if step is None else step for step in steps]
    back, keys = 0, []
    for at in range(len(plain) - 1, -1, -1):
        if at + 1 < len(plain) and plain[at] > plain[at + 1]:
            back += 1
        keys.append((-back, plain[at]))
    return keys[::-1]


def _of(row: _Row | None, name: _Name) -> float | None:
    """What a host measured; None where it did not."""
    if row is None:
        return None
    return row.values[name] if isinstance(name, str) and name in row.values else row.measured.get(name)


def _all(row: Sequence[_Row | None], name: str) -> list[float] | None:
    """What all hosts measured; None where one did not."""
    found = [_of(each, name) for each in row]
    return None if None in found else [float(value) for value in found if value is not None]


def _distance(row: Sequence[_Row | None]) -> float | None:
    return _put_together([(_of(each, "distance"), _of(each, "parameter_norm")) for each in row])


def _distance_of_group(row: Sequence[_Row | None], has: Sequence[bool], name: str) -> float | None:
    """has: by place, whether a host has any of the group's tensors."""
    having = [each for each, has_any in zip(row, has, strict=True) if has_any]
    return _put_together([(_of(each, (name, "distance")), _of(each, (name, "norm"))) for each in having])


def _put_together(parts: Sequence[tuple[float | None, float | None]]) -> float | None:
    """The distance of tensors of which several hosts have parts. parts: each the distance, and the parameters' norm."""
    apart = []
    for distance, norm in parts:
        if norm is None or (norm and distance is None):
            return None
        apart.append((distance or 0.0) * norm)
    whole = math.hypot(*(norm for _, norm in parts if norm))
    return _rounded(math.hypot(*apart) / whole) if whole else None


def _norm(row: Sequence[_Row | None], name: str) -> float | None:
    norms = _all(row, name)
    return None if norms is None else _rounded(math.hypot(*norms))


def _sum(row: Sequence[_Row | None], name: str) -> float | None:
    values = _all(row, name)
    return None if values is None else _rounded(sum(values))


def _worst(row: Sequence[_Row | None], name: str) -> float | None:
    values = _all(row, name)
    return None if values is None else max(values)


def _rounded(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def _oldest(versions: Sequence[str | None]) -> str | None:
    """The version that every host has measured, or a later one."""
    found = [version for version in versions if version is not None]
    return None if len(found) < len(versions) else min(found, key=lambda each: [int(part) for part in each.split(".")])


# --- the timeline ----------------------------------------------------------------------------------------------------


def _about(entry: TimelineEntry) -> tuple[object, ...]:
    """What is the same in all hosts' entries of one thing."""
    text = "" if entry.kind == "created" else entry.text  # of the host's own tensors
    return entry.kind, entry.step, entry.num_updates, text


def _told(places: Mapping[int, TimelineEntry], hosts: int) -> Iterator[TimelineEntry]:
    """The entries of one thing, which these hosts noted: at the earliest time, which stays when others note it."""
    first = min(places.values(), key=lambda entry: entry.time)
    if len(places) < hosts and first.kind not in _TOGETHER:
        yield from (replace(entry, text=f"host {place}: {entry.text}") for place, entry in places.items())
        return
    yield replace(first, text=f"created on {hosts} hosts") if first.kind == "created" else first
