"""Measurements of a run as the bytes of a file, and back: their digest, a line of JSON, and arrays of float64.

Knows the file's form, and that a file may be damaged. Does not know what the columns mean, or where files lie.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

__all__ = ["StoredMeasurements"]

_DIGEST_BYTES = 16
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StoredMeasurements:
    """What is kept of a run's measurements.

    columns: names of the columns of ``rows``, which is (rows, columns), oldest first. seen: how many measurements there
    were. begin: the time of the first. version: of the newest. distances: of each tensor, at ``distances_version`` and
    ``distances_step``; norms: of each tensor's parameters then, empty where they are not kept.
    """

    columns: tuple[str, ...]
    rows: Floats
    seen: int
    begin: float | None
    version: str | None
    distances: Floats
    norms: Floats
    distances_version: str | None
    distances_step: int | None

    def dump(self) -> bytes:
        """The bytes of the file."""
        head = {
            "columns": self.columns,
            "rows": len(self.rows),
            "seen": self.seen,
            "begin": self.begin,
            "norms": len(self.norms),
            "version": self.version,
            "distances_version": self.distances_version,
            "distances_step": self.distances_step,
        }
        arrays = b"".join(each.tobytes() for each in (self.rows, self.distances, self.norms))
        data = json.dumps(head).encode() + b"\n" + arrays
        return xxhash.xxh3_128_digest(data) + data

    @classmethod
    def load(cls, raw: bytes) -> StoredMeasurements:
        """What dump() wrote. Raises ValueError for anything else: a file that was cut short, or damaged."""
        data = raw[_DIGEST_BYTES:]
        if xxhash.xxh3_128_digest(data) != raw[:_DIGEST_BYTES]:
            raise ValueError("its digest is another")
        line, _, arrays = data.partition(b"\n")
        head = json.loads(line)
        columns, count = tuple(head["columns"]), head["rows"]
        values = np.frombuffer(arrays, np.float64)
        rows, distances, norms = np.split(values, [count * len(columns), len(values) - head.get("norms", 0)])
        return cls(
            columns,
            rows.reshape(count, len(columns)),
            head["seen"],
            head["begin"],
            head["version"],
            distances,
            norms,
            head["distances_version"],
            head["distances_step"],
        )

    def in_columns(self, columns: tuple[str, ...]) -> Floats:
        """The rows in these columns; NaN in those that were not kept."""
        rows = np.full((len(self.rows), len(columns)), np.nan)
        for at, name in enumerate(columns):
            if name in self.columns:
                rows[:, at] = self.rows[:, self.columns.index(name)]
        return rows
