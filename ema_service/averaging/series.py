"""A bounded table of measurements: the newest rows are all there, older ones the further apart.

Rows are dropped, never merged: each row that is left is what was measured. Places are even in the fourth root of how
many measurements ago a row was: if there was one every minute for a year, a sixth of the rows lies in its older half, a
quarter in the last day. By measurements and not by time, so that a pause does not cost what was before.

Knows rows of numbers, the first of which counts measurements. Does not know what the others are, or clocks.
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
        """Add a row, whose first number is larger than the last row's. Of a full table older rows are thinned first."""
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
    return _last_of_each(np.floor(passed / max(passed[-1], 1e-300) * (most - 1)))


def _kept(numbers: Floats, most: int) -> npt.NDArray[np.intp]:
    """The indices of rows that stay of a full table: its first, its newest quarter, and at most half of the others."""
    newest = most // 4
    root = (numbers[-1] - numbers[:-newest]) ** 0.25
    places = (root[0] - root) / max(root[0] - root[-1], 1e-300) * (most // 2 - 1)
    return np.concatenate([_last_of_each(np.ceil(places)), np.arange(len(numbers) - newest, len(numbers))])


def _last_of_each(units: Floats) -> npt.NDArray[np.intp]:
    """Of units that never fall, the index of the last of each."""
    return np.flatnonzero(np.append(units[1:] != units[:-1], True))
