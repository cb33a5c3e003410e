"""The history of one run: a line in the catalog for each thing that happened to the run.

Knows that a line is worth less than what the line tells of. Does not know what happened.
"""

from __future__ import annotations

import logging
import sqlite3

from ema_service.storage import RunRow, Store

__all__ = ["History"]

_log = logging.getLogger(__name__)


class History:
    """Writes the history of one run. Thread-safe."""

    def __init__(self, row: RunRow, store: Store) -> None:
        self._row = row
        self._store = store

    def record(self, event: str) -> None:
        """Add a line. A failure is only logged: what the line tells of has happened all the same."""
        try:
            self._store.record(self._row, event)
        except sqlite3.Error as fault:
            _log.error("run %s: %s; not noted in its history: %s", self._row.name, event, fault)
