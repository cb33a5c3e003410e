"""A host's process on a file system whose locks keep nobody out: ``ema-service`` as it is on NFS with ``nolock``.

    python unlocked.py serve ...
    python unlocked.py starved serve ...    the threads that would end the process get no turn

Knows which file system a data dir lies on, and locks. Does not know what is kept there.
"""

from __future__ import annotations

import fcntl
import sqlite3
import sys
from pathlib import Path
from typing import Any

from ema_service.__main__ import main
from ema_service.cluster.hosting import lease
from ema_service.storage import files, store
from ema_service.storage.mounts import FileSystem


def without_locks() -> None:
    """Have every lock be had, as if it were one of this machine, and the other server on another."""

    def mounted(_: Path) -> FileSystem:
        return FileSystem("nfs", frozenset({"nolock"}))

    def lock(*_: object) -> None:
        return None

    connect = sqlite3.connect

    def opened(path: Path, **more: Any) -> sqlite3.Connection:
        return connect(f"{path.absolute().as_uri()}?vfs=unix-none", uri=True, **more)

    files.file_system = store.file_system = mounted  # type: ignore[assignment]
    fcntl.flock = lock  # type: ignore[assignment]
    sqlite3.connect = opened  # type: ignore[assignment]


def without_looks() -> None:
    """Have nothing end a host that was replaced, or that nobody hears."""
    lease.Lease._look = lambda *_: None  # type: ignore[method-assign]


if __name__ == "__main__":
    without_locks()
    if sys.argv[1] == "starved":
        del sys.argv[1]
        without_looks()
    main()
