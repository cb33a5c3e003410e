"""The store: one data folder, its lock, its catalog, and the files of each run.

    data-dir/
        lock                     held while a server runs
        catalog.db               what counts
        runs/<name>.<id>/        id makes the folder of a run that was deleted and created again another one
            checkpoint-{a,b}/<average>.safetensors
            snapshots/<name>/<average>.safetensors

Knows where files lie and in which order file, row and removal must happen so that a crash between any two leaves either
the old or the new. Does not know torch, updates, or when something is due. Safe for several threads, one per run.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from ema_service.storage.catalog import Catalog, CatalogUnusable, CheckpointRow, RunRow, SnapshotRow
from ema_service.storage.files import FolderLock, TensorFile, sync_folder, write_whole

__all__ = ["Files", "Store"]

_log = logging.getLogger(__name__)

#: average -> the chunks of its file
Files = Mapping[str, Iterable[bytes | memoryview]]


class Store:
    """Everything a server keeps on disk. Names given to it are checked by the caller (protocol.NAME_PATTERN)."""

    def __init__(self, folder: Path) -> None:
        """Open or make the data folder. Raises FolderLocked, CatalogUnusable, OSError."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._lock = FolderLock(folder)
        try:
            self._catalog = Catalog(folder / "catalog.db")
        except CatalogUnusable:
            self._lock.release()
            raise
        self._runs = folder / "runs"
        self._runs.mkdir(exist_ok=True)

    def close(self) -> None:
        self._catalog.close()
        self._lock.release()

    # --- runs -------------------------------------------------------------------------------------------------------

    def runs(self) -> list[RunRow]:
        return self._catalog.runs()

    def add_run(self, name: str, config: str, created_at: float) -> RunRow:
        row = self._catalog.add_run(name, config, created_at)
        self._run_folder(row).mkdir(parents=True, exist_ok=True)
        sync_folder(self._runs)
        return row

    def remove_run(self, row: RunRow) -> None:
        """The row goes first: a crash in between leaves files that no row speaks of, never a row without its files."""
        self._catalog.remove_run(row.id)
        _remove_tree(self._run_folder(row))

    def record(self, row: RunRow, event: str) -> None:
        """Add a line to the run's history."""
        self._catalog.add_history(row.id, time.time(), event)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(self, row: RunRow, state: str, files: Files) -> None:
        """Write a checkpoint and make it the run's; the one before is removed after. Raises OSError."""
        old = self._catalog.checkpoint(row.id)
        name = _other_folder(old.folder if old else None)
        folder = self._run_folder(row) / name
        _remove_tree(folder)
        self._write_files(folder, files)
        self._catalog.put_checkpoint(CheckpointRow(row.id, name, state, time.time()))
        if old:
            _remove_tree(self._run_folder(row) / old.folder)

    def checkpoint(self, row: RunRow) -> CheckpointRow | None:
        return self._catalog.checkpoint(row.id)

    def amend_checkpoint(self, row: RunRow, state: str) -> None:
        """Replace what the run's checkpoint says of its state; its files stay."""
        checkpoint = self._catalog.checkpoint(row.id)
        if checkpoint:
            self._catalog.put_checkpoint(replace(checkpoint, state=state))

    def open_checkpoint(self, row: RunRow, checkpoint: CheckpointRow, average: str) -> TensorFile:
        """Raises FileNotFoundError, MalformedBody."""
        return TensorFile(self._run_folder(row) / checkpoint.folder / _file_name(average))

    # --- snapshots --------------------------------------------------------------------------------------------------

    def save_snapshot(self, row: RunRow, name: str, info: str, files: Files) -> None:
        """Write a snapshot under a name that is free. Raises OSError."""
        folder = self._snapshot_folder(row, name)
        _remove_tree(folder)  # of a snapshot whose row was never written
        self._write_files(folder, files)
        self._catalog.add_snapshot(SnapshotRow(row.id, name, info, time.time()))

    def snapshots(self, row: RunRow) -> list[SnapshotRow]:
        return self._catalog.snapshots(row.id)

    def open_snapshot(self, row: RunRow, name: str, average: str) -> TensorFile:
        """Raises FileNotFoundError, MalformedBody."""
        return TensorFile(self._snapshot_folder(row, name) / _file_name(average))

    def remove_snapshot(self, row: RunRow, name: str) -> None:
        self._catalog.remove_snapshot(row.id, name)
        _remove_tree(self._snapshot_folder(row, name))

    # ----------------------------------------------------------------------------------------------------------------

    def _run_folder(self, row: RunRow) -> Path:
        return self._runs / f"{row.name}.{row.id}"

    def _snapshot_folder(self, row: RunRow, name: str) -> Path:
        return self._run_folder(row) / "snapshots" / name

    def _write_files(self, folder: Path, files: Files) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for average, chunks in files.items():
            write_whole(folder / _file_name(average), chunks)
        for parent in (folder.parent, folder.parent.parent):  # each may have a new entry
            sync_folder(parent)


def _file_name(average: str) -> str:
    return f"{average}.safetensors"


def _other_folder(name: str | None) -> str:
    """Checkpoints alternate between two folders: the one that counts is never written to."""
    return "checkpoint-b" if name == "checkpoint-a" else "checkpoint-a"


def _remove_tree(folder: Path) -> None:
    """Remove what no row speaks of. A failure is logged: it costs disk space, never correctness."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as fault:
        _log.warning("cannot remove %s: %s", folder, fault)
