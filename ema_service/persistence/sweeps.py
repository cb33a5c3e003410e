"""What sweeps over the averages of one run found: the newest few, as they were reported.

Knows their rows. Does not know how an average is worked out, or how one was evaluated: the results are the reporter's.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

from ema_client.errors import RunNotFound, StorageFailed
from ema_client.protocol import SWEEPS_KEPT, SweepInfo, SweepReport, from_json, to_json
from ema_service.shadows.state import Version
from ema_service.storage import RunRow, Store, SweepRow

__all__ = ["Sweeps"]

_log = logging.getLogger(__name__)


class Sweeps:
    """Writes and reads the sweeps of one run: in the catalog, or in memory where there is none. Thread-safe."""

    def __init__(self, run: str, row: RunRow | None, store: Store | None) -> None:
        self._run = run
        self._row = row
        self._store = store
        self._lock = threading.Lock()
        #: The sweeps, of a server that keeps nothing on disk.
        self._rows = deque[SweepRow](maxlen=SWEEPS_KEPT)

    def add(self, report: SweepReport, version: Version | None, key: str | None = None) -> tuple[SweepInfo, bool]:
        """The sweep as it is kept, and whether it is new: not where one of the kept has the same key.

        version: the run's by now. Of more than protocol.SWEEPS_KEPT the oldest goes. Raises StorageFailed; RunNotFound
        where the run was deleted meanwhile.
        """
        with self._lock:
            for row in self._read() if key is not None else ():
                if row.key == key and (known := self._parsed(row)):
                    return known, False
            info = SweepInfo(
                kind=report.kind,
                points=report.points,
                at=report.at,
                highest=report.highest,
                name=report.name,
                time=time.time(),
                version=str(version) if version else None,
                num_updates=version.num_updates if version else None,
            )
            self._write(SweepRow(key, json.dumps(to_json(info))))
            return info, True

    def all(self) -> tuple[SweepInfo, ...]:
        """The sweeps, the newest last. Raises StorageFailed."""
        return tuple(self._infos())

    def _infos(self) -> Iterator[SweepInfo]:
        for row in self._read():
            if info := self._parsed(row):
                yield info

    def _parsed(self, row: SweepRow) -> SweepInfo | None:
        """None, and a line in the log, where the row is damaged: SQLite does not checksum its pages."""
        try:
            return from_json(SweepInfo, json.loads(row.info))
        except ValueError as fault:
            _log.warning("run %s: a sweep in the catalog is damaged, and left out: %s", self._run, fault)
            return None

    def _read(self) -> Sequence[SweepRow]:
        if self._store is None or self._row is None:
            return tuple(self._rows)
        try:
            return self._store.sweeps(self._row)
        except sqlite3.Error as fault:
            raise StorageFailed(f"the sweeps of run {self._run!r} cannot be read: {fault}", retry_after=1.0) from fault

    def _write(self, row: SweepRow) -> None:
        if self._store is None or self._row is None:
            self._rows.append(row)
            return
        try:
            self._store.add_sweep(self._row, row)
        except sqlite3.IntegrityError as fault:
            raise RunNotFound(f"run {self._run!r} was deleted") from fault
        except sqlite3.Error as fault:
            raise StorageFailed(f"the sweep of run {self._run!r} was not kept: {fault}", retry_after=1.0) from fault
