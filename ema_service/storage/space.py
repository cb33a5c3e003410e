"""How much room a disk has, and how much a folder takes of it.

Knows the file system's own counts. Does not know what the files are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DiskSpace", "bytes_below", "disk_space"]

#: Free space that new runs and snapshots leave to updates and the catalog: a twentieth of the disk, at most this.
_FLOOR_BYTES = 5 << 30


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """Bytes of a disk: those this user may still take, all there are, and those that new runs and snapshots leave."""

    free: int
    total: int
    floor: int

    @property
    def full(self) -> bool:
        """Whether new runs and snapshots, however small, are refused."""
        return self.free < self.floor


def disk_space(folder: Path) -> DiskSpace:
    """The room of the disk that a folder lies on. Raises OSError."""
    found = os.statvfs(folder)
    total = found.f_blocks * found.f_frsize
    return DiskSpace(found.f_bavail * found.f_frsize, total, min(total // 20, _FLOOR_BYTES))


def bytes_below(folder: Path) -> int:
    """Bytes that the files below a folder take of the disk; files that go away meanwhile are left out."""
    return sum(_blocks(folder))


def _blocks(folder: Path | str) -> Iterator[int]:
    try:
        with os.scandir(folder) as found:
            for each in found:
                if each.is_dir(follow_symlinks=False):
                    yield from _blocks(each.path)
                else:
                    yield each.stat(follow_symlinks=False).st_blocks * 512
    except OSError:
        return
