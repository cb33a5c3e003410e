"""Strides: by how much a counter moved at each of many updates, kept as runs of equal ones.

A trainer that pushes every step, or every k-th, makes one run of them; where steps are skipped at random, a run is of
few updates and takes 16 bytes.

Knows integers. Does not know what is counted, or where strides are stored.
"""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

__all__ = ["Strides"]


class Strides:
    """The strides of the updates since a beginning, in order.

    runs: (runs, 2), int64, each a stride and how many updates had it; of an earlier Strides.runs.
    """

    def __init__(self, runs: npt.NDArray[np.int64] | None = None) -> None:
        given = np.empty((0, 2), np.int64) if runs is None else runs
        self._strides, self._counts = array("q", given[:, 0].tobytes()), array("q", given[:, 1].tobytes())
        self.updates = int(given[:, 1].sum())

    def append(self, stride: int, count: int = 1) -> None:
        """So many more updates of this stride."""
        if self._strides and self._strides[-1] == stride:
            self._counts[-1] += count
        else:
            self._strides.append(stride)
            self._counts.append(count)
        self.updates += count

    def spread(self, distance: int, count: int) -> None:
        """So many more updates, over this distance as evenly as integers are: nobody knows their strides."""
        least, more = divmod(distance, count)
        for stride, times in ((least, count - more), (least + 1, more)):
            if times:
                self.append(stride, times)

    def cut(self, updates: int) -> None:
        """Forget all but the first ``updates``."""
        while self.updates > updates:
            dropped = min(self._counts[-1], self.updates - updates)
            self._counts[-1] -= dropped
            self.updates -= dropped
            if not self._counts[-1]:
                del self._strides[-1], self._counts[-1]

    @property
    def distance(self) -> int:
        """By how much the counter moved in all."""
        strides, counts = self.runs.T
        return int((strides * counts).sum())

    @property
    def runs(self) -> npt.NDArray[np.int64]:
        """The runs, (runs, 2): a stride and how many updates had it."""
        return np.array([self._strides, self._counts], np.int64).T.reshape(-1, 2)

    def counters(self, begin: int, updates: int) -> npt.NDArray[np.int64]:
        """The counter after each of the first ``updates``, (updates,), from ``begin`` before the first."""
        strides, counts = self.runs.T
        return begin + np.cumsum(np.repeat(strides, counts)[:updates], dtype=np.int64)
