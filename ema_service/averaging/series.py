"""A bounded table of what was measured over time: the newest rows are all there, older ones the further apart.

Rows are dropped, never merged: each row that is left is what was measured. Places are even in the fourth root of their
age: of the rows of a year a sixth lies in its older half, a quarter in the last day, and one in thirty in the last
minute.

Knows numbers in rows, the first of which is a time that never falls. Does not know what they measure, or clocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["MOST_ROWS", "Series", "evenly"]

Floats = npt.NDArray[np.float64]

#: Rows of a series at most: 300 KiB where a row has 37 numbers.
MOST_ROWS = 1024
_FIRST_ROWS = 32


class Series:
    """Rows of float64, oldest first. Not thread-safe."""

    def __init__(self, columns: int, *, most: int = MOST_ROWS) -> None:
        self._most = most
        self._table: Floats = np.empty((0, columns))
        self._count = 0

    @property
    def rows(self) -> Floats:
        """The rows, (rows, columns): a view, which the next add() may change."""
        return self._table[: self._count]

    def add(self, row: Sequence[float]) -> None:
        """Add a row, whose time is no earlier than the last row's. Of a full table older rows are thinned first."""
        if self._count == self._most:
            self.fill(self.rows[_kept(self.rows[:, 0], self._most)])
        if self._count == len(self._table):
            size = min(self._most, max(_FIRST_ROWS, 2 * self._count))
            self._table = np.concatenate([self.rows, np.empty((size - self._count, self._table.shape[1]))])
        self._table[self._count] = row
        self._count += 1

    def fill(self, rows: Floats) -> None:
        """Have these rows in place of all others; only the newest of too many."""
        kept = rows[-self._most :]
        self._table, self._count = np.array(kept, np.float64), len(kept)


def evenly(times: Floats, most: int) -> npt.NDArray[np.intp]:
    """The indices of at most ``most`` times, evenly over the time from the first to the last, which is among them."""
    if len(times) <= most:
        return np.arange(len(times))
    passed = times - times[0]
    return _last_of_each(passed / max(passed[-1], 1e-300) * (most - 1))


def _kept(times: Floats, most: int) -> npt.NDArray[np.intp]:
    """The indices of rows that stay of a full table: its newest quarter, and half as many again of all the others."""
    newest = most // 4
    age = times[-1] - times[:-newest]
    oldest = max(age[0], 1e-300)
    places = -((age / oldest) ** 0.25) * (most // 2 - 1)
    return np.concatenate([_last_of_each(places), np.arange(len(times) - newest, len(times))])


def _last_of_each(places: Floats) -> npt.NDArray[np.intp]:
    """Of places that never fall, the index of the last in each unit."""
    units = np.floor(places)
    return np.flatnonzero(np.append(units[1:] != units[:-1], True))
