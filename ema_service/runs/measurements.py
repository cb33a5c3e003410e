"""How a run went: what was measured of its updates, over time.

Every update is noted, and the newest is told exactly; but of updates that come close together one has a row. The
distance of shadow and parameters, which costs an eighth of the averaging, is taken where four times as long has passed
since it was taken last as the averaging took, and 50 ms at least. So measuring takes at most a thirtieth of the time,
whatever the model and its pace.

Knows what a row means, and the groups of a layout's tensors. Does not know how sums come about (shadows), which rows
stay (averaging/series), files, or HTTP.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ema_client.protocol import MAX_STEP, Distances, History, HistoryColumns
from ema_service.averaging import can_measure
from ema_service.averaging.series import MOST_ROWS, Series, evenly
from ema_service.memory import Layout
from ema_service.persistence.measured import StoredMeasurements
from ema_service.shadows.state import Version

__all__ = ["MOST_BYTES", "Measured", "Measurements", "group_names"]

Floats = npt.NDArray[np.float64]

#: Seconds between two rows at least: rows closer in time cost more than they show.
_APART_SECONDS = 0.05
#: Distances are taken again after so many times the seconds that the averaging took.
_PAUSE = 4.0
#: Groups at most: as many lines as a chart can hold.
_MOST_GROUPS = 24
#: Significant digits of what is told; float32 has as many.
_DIGITS = 7
_COLUMNS = tuple(each.name for each in fields(HistoryColumns))
#: Before the columns of a row: the measurement's number.
_NUMBER = "number"
#: What the table of a run takes once it is full; of a shard with the norms of its groups.
MOST_BYTES = MOST_ROWS * 8 * (1 + len(_COLUMNS) + 2 * _MOST_GROUPS)
#: Columns of groups, before a group's name: distances of all, and norms of the parameters of a shard's.
_DISTANCE_OF, _NORM_OF = "distance of ", "norm of "
#: Columns that are told as they are, the first: time, step, num_updates, effective_decay.
_EXACT = 4
#: Columns of the run's first average alone.
_OF_AVERAGE = ("effective_decay", "distance", "shadow_norm")


# Not frozen: making a frozen one takes longer than everything else that is done for an update without a row.
@dataclass(slots=True)
class Measured:
    """What was measured of one update. Never changed.

    version: that the update made. sums: by tensor, the sums of squares of (shadow - parameters), parameters and shadow;
    NaN where a tensor is copied, None where none was measured. nbytes: of parameters. durable_lag: steps that the
    durable version is behind. receive, average, commit: seconds, see HistoryColumns. left_out: whether distances were
    not asked for.
    """

    version: Version
    sums: Floats | None
    nbytes: int
    durable_lag: int | None = None
    receive: float | None = None
    average: float | None = None
    commit: float | None = None
    left_out: bool = False


@dataclass(slots=True)
class _Noted:
    """A measurement, never changed, with its place among all. time: never before that of an earlier one."""

    measured: Measured
    number: int
    time: float


class Measurements:
    """The measurements of one run. Thread-safe."""

    def __init__(self, run: str, layout: Layout, whole: Sequence[str] | None = None) -> None:
        """whole: of a shard, the names of the whole run's averaged tensors, which make the groups; then norms are told,
        for what the shards measured to be put together."""
        self._run = run
        self._layout = layout
        self._whole = whole
        self._newest: _Noted | None = None
        #: The newest one with sums, and when distances are to be taken again, by time.monotonic().
        self._summed: Measured | None = None
        self._due = 0.0
        #: The number and the time of the newest row, where that was measured since the start.
        self._kept: tuple[int, float] | None = None
        self._before: StoredMeasurements | None = None
        self._seen = 0
        self._begin: float | None = None
        self._saved = 0
        self._lock = threading.Lock()

    def due(self) -> bool:
        """Whether the distance of shadow and parameters is to be taken of the next update."""
        return can_measure() and time.monotonic() >= self._due

    def note(self, measured: Measured) -> None:
        """Note an update that was applied."""
        with self._lock:
            newest = self._newest
            if newest and self._stays(newest):
                self._series.add(self._row(newest))
                self._kept = newest.number, newest.time
            self._seen += 1
            if measured.sums is not None:
                self._summed = measured
                self._due = time.monotonic() + max(_APART_SECONDS, _PAUSE * (measured.average or 0.0))
            at = max(round(measured.version.updated_at, 6), newest.time if newest else self._last_time)
            self._newest = _Noted(measured, self._seen, at)
            if self._begin is None:
                self._begin = at

    @property
    def tag(self) -> str:
        """A text that differs after each measurement."""
        with self._lock:
            newest = self._newest
            return f"{self._seen}-{newest.time if newest else self._last_time!r}"

    @property
    def distance(self) -> float | None:
        """|shadow - parameters| / |parameters| of the first average, as taken last; None where it never was, or is no
        number."""
        with self._lock:
            if self._summed:
                found = self._groups.fold(self._summed.sums)[0]
            else:
                rows = self._series.rows
                found = float(rows[-1, _COLUMNS.index("distance")]) if len(rows) else math.nan
        return found if math.isfinite(found) else None

    def history(self, average: str, *, since: float, points: int, measured: bool = True) -> History:
        """What was measured after ``since``, at most so many points, evenly over time.

        average: the name of the run's first; of another, which is not ``measured``, distances and norms are None.
        """
        with self._lock:
            seen, begin, version = self._seen, self._begin, self._version
            rows = self._rows()[:, 1:]
        rows = rows[rows[:, 0] > since]
        rows = rows[evenly(rows[:, 0], points)]
        rows[:, _EXACT:] = _rounded(rows[:, _EXACT:])
        if not measured:
            rows[:, [_COLUMNS.index(name) for name in _OF_AVERAGE]] = np.nan
        told: dict[str, Any] = {name: _told(rows[:, at], name) for at, name in enumerate(self._names[1:])}
        columns = HistoryColumns(**{name: told[name] for name in _COLUMNS})
        names = self._groups.names if measured else ()
        groups = {name: told[_DISTANCE_OF + name] for name in names}
        norms = {name: told[_NORM_OF + name] for name in names if self._whole is not None}
        return History(self._run, average, version, seen, begin, columns, groups, norms)

    def distances(self, average: str) -> Distances:
        """The distances of all tensors, when they were taken last. average: the name of the run's first."""
        with self._lock:
            version, step = self._summed_at()
            found, norms = self._distances()
        names = [entry.name for entry in self._layout.params]
        tensors = dict(zip(names, _told(_rounded(found), "distance"), strict=True))
        told = dict(zip(names, _told(_rounded(norms), "norm"), strict=False)) if len(norms) else {}
        return Distances(self._run, average, version, step, tensors, told)

    # --- beyond the server's end ------------------------------------------------------------------------------------

    def save(self, write: Callable[[bytes], None]) -> None:
        """Have ``write`` keep everything, if there is anything new. Raises what ``write`` raises, and tries again when
        called again."""
        with self._lock:
            if self._seen == self._saved:
                return
            seen = self._seen
            stored = StoredMeasurements(
                self._names,
                self._rows(),
                seen,
                self._begin,
                self._version,
                *self._distances(),
                *self._summed_at(),
            )
        write(stored.dump())
        self._saved = seen

    def restore(self, stored: StoredMeasurements) -> None:
        """Take up what was kept."""
        with self._lock:
            self._series.fill(stored.in_columns(self._names))
            self._before, self._seen, self._saved, self._begin = stored, stored.seen, stored.seen, stored.begin

    # ----------------------------------------------------------------------------------------------------------------

    @cached_property
    def _groups(self) -> _Groups:
        return _Groups.of(self._layout, self._whole)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        """Of the numbers in a row."""
        names = self._groups.names
        norms = () if self._whole is None else names
        return (_NUMBER, *_COLUMNS, *(_DISTANCE_OF + name for name in names), *(_NORM_OF + name for name in norms))

    @cached_property
    def _series(self) -> Series:
        return Series(len(self._names))

    @property
    def _last_time(self) -> float:
        rows = self._series.rows
        return float(rows[-1, 1]) if len(rows) else 0.0

    def _rows(self) -> Floats:
        """All rows, and that of the newest measurement."""
        rows = self._series.rows
        return np.vstack([rows, self._row(self._newest)]) if self._newest else rows.copy()

    @property
    def _version(self) -> str | None:
        if self._newest:
            return str(self._newest.measured.version)
        return self._before.version if self._before else None

    def _stays(self, noted: _Noted) -> bool:
        """Whether a measurement has a row, now that it is no longer the newest."""
        apart = self._kept is None or noted.time - self._kept[1] >= _APART_SECONDS
        return apart and not noted.measured.left_out

    def _summed_at(self) -> tuple[str | None, int | None]:
        """Version and step of the distances."""
        if self._summed:
            return str(self._summed.version), self._summed.version.step
        return (self._before.distances_version, self._before.distances_step) if self._before else (None, None)

    def _distances(self) -> tuple[Floats, Floats]:
        """Of each tensor, when they were taken last, NaN where they were not; and the parameters' norms of a shard's
        tensors."""
        sums = self._summed.sums if self._summed else None
        nothing = np.full(0 if self._whole is None else len(self._layout), np.nan)
        if sums is not None:
            return _ratio(sums[:, 0], sums[:, 1]), np.sqrt(sums[:, 1]) if len(nothing) else nothing
        before = self._before
        if before and len(before.distances) == len(self._layout):
            return before.distances, before.norms if len(before.norms) == len(nothing) else nothing
        return np.full(len(self._layout), np.nan), nothing

    def _row(self, noted: _Noted) -> list[float]:
        """The row of a measurement, as it follows the row before."""
        measured, version = noted.measured, noted.measured.version
        rate = math.nan
        if self._kept and noted.time > self._kept[1]:
            rate = (noted.number - self._kept[0]) / (noted.time - self._kept[1])
        distance, shadow, parameters, groups, norms = self._groups.fold(measured.sums)
        return [
            noted.number,
            noted.time,
            *map(_number, (version.step, version.num_updates, version.averages[0].effective_decay)),
            *(distance, shadow, parameters, rate, rate * measured.nbytes),
            *map(_number, (measured.durable_lag, measured.receive, measured.average, measured.commit)),
            *groups,
            *(norms if self._whole is not None else ()),
        ]


@dataclass(frozen=True, slots=True)
class _Groups:
    """The groups of a layout's averaged tensors. index: of the group of each tensor; copied ones have a group of their
    own, the last. names: of the groups; none where they would be too many, and then all averaged tensors are one. Of a
    shard they are those of the whole run's tensors that have a row here, perhaps one of no elements."""

    names: tuple[str, ...]
    index: npt.NDArray[np.intp]
    count: int

    @classmethod
    def of(cls, layout: Layout, whole: Sequence[str] | None = None) -> _Groups:
        copied = frozenset(layout.copied)
        averaged = [entry.name for entry in layout.params if entry.name not in copied]
        named = group_names(averaged if whole is None else whole)
        few = len(set(named.values())) <= _MOST_GROUPS
        names = tuple(dict.fromkeys(named[name] for name in averaged)) if few else ()
        places = {name: at for at, name in enumerate(names)}
        count = len(names) if few else 1
        index = [count if e.name in copied else places.get(named[e.name], 0) for e in layout.params]
        return cls(names, np.array(index, np.intp), count)

    def fold(self, sums: Floats | None) -> tuple[float, float, float, Sequence[float], Sequence[float]]:
        """Distance, |shadow| and |parameters| of all averaged tensors, and of each group distance and |parameters|."""
        if sums is None:
            unknown = [math.nan] * len(self.names)
            return math.nan, math.nan, math.nan, unknown, unknown
        apart, parameters, shadow = (
            np.bincount(self.index, sums[:, at], self.count + 1)[: self.count] for at in range(3)
        )
        whole = _ratio(apart.sum(), parameters.sum())
        groups = _ratio(apart, parameters)[: len(self.names)].tolist()
        norms = np.sqrt(parameters)[: len(self.names)].tolist()
        return float(whole), math.sqrt(shadow.sum()), math.sqrt(parameters.sum()), groups, norms


def group_names(names: Sequence[str]) -> dict[str, str]:
    """By tensor, the name of its group: as many leading components of its name as make at most 24 groups, one at
    least."""
    parts = {name: name.split(".") for name in names}
    found = {name: each[0] for name, each in parts.items()}
    for depth in range(2, max(map(len, parts.values()), default=1) + 1):
        deeper = {name: ".".join(each[:depth]) for name, each in parts.items()}
        if len(set(deeper.values())) > _MOST_GROUPS:
            break
        found = deeper
    return found


def _ratio(apart: Any, parameters: Any) -> Floats:
    """The distances of sums of squares; NaN or Inf where there are no parameters, or only zeros."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.asarray(np.sqrt(apart / parameters))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _rounded(values: Floats) -> Floats:
    """The values to seven significant digits."""
    with np.errstate(all="ignore"):
        scale = 10.0 ** (_DIGITS - 1 - np.floor(np.log10(np.abs(values))))
        rounded = np.round(values * scale) / scale
    return np.where(np.isfinite(rounded), rounded, values)


def _told(values: Floats, name: str) -> tuple[float | None, ...]:
    """A column as the protocol has it: None where nothing was measured, or what was measured is no number."""
    if name in ("step", "num_updates"):
        return tuple(min(int(value), MAX_STEP) if math.isfinite(value) else None for value in values.tolist())
    return tuple(value if math.isfinite(value) else None for value in values.tolist())
