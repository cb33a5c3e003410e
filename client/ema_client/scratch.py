"""Temporary folders for weights: gigabytes, which nobody may find later on the disk of a machine.

A folder goes at the end of its block, however the block ends: also by SIGTERM and SIGHUP, which batch systems send
ahead of SIGKILL and which end a Python program without an exception otherwise. SIGKILL leaves the folder; the next
program of the user on that machine that makes such a folder removes what no living process holds.

Knows folders, locks and signals. Does not know what lies in a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ema_client.ending import held_back, orderly_end

__all__ = ["scratch_folder"]

_PREFIX = "ema-scratch-"
#: In each folder: holds the name of the machine, and a lock as long as the process that made the folder lives.
_HELD = ".held"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder below ``$TMPDIR`` for the block, for this user alone. Raises OSError where none can be made."""
    with orderly_end(), contextlib.ExitStack() as stack:
        with held_back():
            _sweep(Path(tempfile.gettempdir()))
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
            stack.callback(_remove, folder)
            descriptor = _held(folder, os.O_CREAT | os.O_EXCL, fcntl.LOCK_EX)
            stack.callback(os.close, descriptor)
            os.write(descriptor, _machine())
        yield folder


def _remove(folder: Path) -> None:
    # A second signal must not end the removal: batch systems send several.
    with held_back():
        shutil.rmtree(folder, ignore_errors=True)


def _machine() -> bytes:
    return socket.gethostname().encode()


def _held(folder: Path, flags: int = 0, lock: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> int:
    """A descriptor of the folder's lock file, with the lock. lock: how it is taken; a program that looks at all folders
    has that of a new one for a moment. Raises OSError, BlockingIOError where another has it."""
    descriptor = os.open(folder / _HELD, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, descriptor)
        fcntl.flock(descriptor, lock)
        undo.pop_all()
    return descriptor


def _sweep(parent: Path) -> None:
    """Remove the folders that killed programs of this user left on this machine."""
    for folder in parent.glob(f"{_PREFIX}*"):
        # Gone meanwhile, another user's, being made just now, or held by a living process.
        with contextlib.suppress(OSError):
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                continue
            with os.fdopen(_held(folder), "rb") as file:
                # A folder that several machines have may know no locks of another machine.
                if file.read() == _machine():
                    shutil.rmtree(folder, ignore_errors=True)
