"""What a power loss leaves of a data dir. Knows files, syncs and SQLite's log. Does not know what the files are for."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ema_service.storage.catalog import Catalog


class Power:
    """What the medium of a data dir is sure to hold, and what it may hold, when the power goes.

    Of a slot's file: what it held when it was last synced is sure; of what was written since any page may be there or
    not. Of the catalog: SQLite's log is written in order, so the medium holds all transactions up to the latest durable
    one, and then any number of the ones after it; here all of them, or none.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._sure: dict[Path, bytes] = {}
        self._catalog: dict[str, bytes] = {}
        self._lock = threading.Lock()
        sync, write, together = os.fdatasync, Catalog._write, Catalog._transaction

        def fdatasync(descriptor: int) -> None:
            sync(descriptor)
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            self._sure[path] = path.read_bytes()

        def transaction(catalog: Catalog, sql: str, *values: object, durable: bool = True) -> sqlite3.Cursor:
            cursor = write(catalog, sql, *values, durable=durable)
            if durable:
                self._catalog = self._catalog_files()
            return cursor

        @contextlib.contextmanager
        def transactions(catalog: Catalog, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
            with together(catalog, durable=durable) as database:
                yield database
            if durable:
                self._catalog = self._catalog_files()

        patch.setattr(os, "fdatasync", fdatasync)
        patch.setattr(Catalog, "_transaction", transactions)
        patch.setattr(Catalog, "_write", transaction)

    def lost(self, target: Path, *, seed: int) -> None:
        """Lay out in ``target`` a data dir as the power's going might leave it."""
        dice = random.Random(seed)
        shutil.copytree(self._folder, target, ignore=shutil.ignore_patterns("catalog.db*"))
        for name, content in (self._catalog if dice.random() < 0.5 else self._catalog_files()).items():
            (target / name).write_bytes(content)
        for path in self._folder.glob("runs/*/slots/*/*"):
            now = path.read_bytes()
            sure = self._sure.get(path, bytes(len(now)))
            # Small files: sectors stand for pages.
            parts = range(0, len(now), 512)
            kept = (now if dice.random() < 0.5 else sure for _ in parts)
            content = b"".join(which[at : at + 512] for which, at in zip(kept, parts, strict=True))
            (target / path.relative_to(self._folder)).write_bytes(content)

    def _catalog_files(self) -> dict[str, bytes]:
        # Without the -shm: it is an index over the log that SQLite makes anew.
        return {path.name: path.read_bytes() for path in self._folder.glob("catalog.db*") if path.suffix != ".db-shm"}
