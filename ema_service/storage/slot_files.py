"""The files of one slot: made with all the space they take, opened when needed, written in place, synced.

Data are written past the page cache where that can be (O_DIRECT): 1 GiB took 0.37 s of the disk's time and 0.01 s of a
core's, where through the cache, fdatasync included, it took 0.6 s and 0.2 s. That is a core which receives the next
push, and a cache that keeps what others read.

The descriptors that write are those that sync, so that an error of the kernel's write-back in between is seen.

Knows folders, descriptors and bytes. Does not know who writes, when, or which file counts.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ema_client.wire import LENGTH_BYTES
from ema_service.storage.files import file_name, refuse_link, remove_tree, sync_folder

__all__ = ["Extent", "SlotFiles", "padded_bytes"]

_PAGE = 4096


def padded_bytes(header: bytes) -> int:
    """How long a header of at most this length is in a slot's file."""
    return -(-len(header) // _PAGE) * _PAGE


@dataclass(frozen=True, slots=True)
class Extent:
    """The size of one average's file: bytes of the padded header, and of the data behind the header."""

    header: int
    data: int


class SlotFiles:
    """The files of one slot, one for each average. Not thread-safe, but for write() once the files are open.

    folder: where they lie. direct: whether data may be written past the page cache; for small files it is not worth it.
    """

    def __init__(self, run_folder: Path, name: str, extents: Mapping[str, Extent], *, direct: bool) -> None:
        self.folder = run_folder / name
        self._run_folder = run_folder
        self._name = name
        self._extents = extents
        self._direct = direct
        #: By the average, and whether the descriptor writes past the page cache.
        self._descriptors: dict[tuple[str, bool], int] = {}

    @property
    def past_cache(self) -> bool:
        """Whether open files are written past the page cache."""
        return self._direct and any(direct for _, direct in self._descriptors)

    def open(self) -> None:
        """Open the files and make them if they are not there, with all the space they take. Raises OSError."""
        if self._descriptors:
            return
        refuse_link(self._run_folder, self._name)
        new = not self.folder.exists()
        try:
            if new:
                # Not the run's own folder: where that is gone the run was deleted, and must not come back.
                self.folder.parent.mkdir(exist_ok=True)
                self.folder.mkdir()
            made = [self._open_file(average, extent) for average, extent in self._extents.items()]
            if any(made):
                for folder in (self.folder, *self.folder.parents[:2]):
                    sync_folder(folder)
        except OSError:
            self.close()
            if new:
                remove_tree(self.folder)
            raise

    def write(self, average: str, data: memoryview, start: int, *, cached: bool) -> None:
        """Write data of an average from byte ``start`` of its data on. Many threads may write at once. Raises OSError.

        cached: leave the data in the page cache. Else whole pages of memory that become whole pages of the file go past
        the cache.
        """
        position = self._extents[average].header + start
        through = self._descriptors[average, False]
        past = None if cached or not self._direct else self._descriptors.get((average, True))
        before = min(-position % _PAGE, len(data))
        whole = (len(data) - before) // _PAGE * _PAGE
        if past is None or not whole or (_address(data) + before) % _PAGE:
            _write_all(through, data, position)
            return
        try:
            _write_all(past, data[before : before + whole], position + before)
        except OSError as fault:
            if fault.errno != errno.EINVAL:
                raise
            # A file system that wants more than whole pages. Another thread may be using the descriptor: it stays open.
            self._direct = False
            _write_all(through, data, position)
            return
        _write_all(through, data[:before], position)
        _write_all(through, data[before + whole :], position + before + whole)

    def write_header(self, average: str, header: bytes) -> None:
        """Put a header in front of an average's data. Raises OSError."""
        padded = _padded(header, self._extents[average].header)
        _write_all(self._descriptors[average, False], memoryview(padded), 0)

    def sync(self) -> None:
        """Return when the files' bytes are on the medium, and close them: runs may be many and idle, descriptors are
        few. Raises OSError; then a later call must not be believed."""
        self.open()
        for (_, direct), descriptor in self._descriptors.items():
            if not direct:
                _sync_data(descriptor)
        self.close()

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _open_file(self, average: str, extent: Extent) -> bool:
        """Whether the file was not there, or of another size."""
        path, size = self.folder / file_name(average), extent.header + extent.data
        refuse_link(self._run_folder, f"{self._name}/{path.name}")  # says more than what O_NOFOLLOW makes of it
        descriptor = self._descriptors[average, False] = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
        )
        if self._direct and (direct := _open_direct(path)) is not None:
            self._descriptors[average, True] = direct
        if os.fstat(descriptor).st_size == size:
            return False
        os.ftruncate(descriptor, 0)  # what is left of another use or another version of this software
        _allocate(descriptor, size)
        return True


def _allocate(descriptor: int, size: int) -> None:
    """Give a file its size, with blocks behind it where the system can. Raises OSError."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as fault:
            os.ftruncate(descriptor, 0)
            if fault.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(descriptor, size)


def _sync_data(descriptor: int) -> None:
    os.fdatasync(descriptor) if hasattr(os, "fdatasync") else os.fsync(descriptor)


def _open_direct(path: Path) -> int | None:
    """A descriptor that writes past the page cache; None where the system or the file system has no such thing."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECT)
    except (AttributeError, OSError):
        return None


def _address(data: memoryview) -> int:
    return int(np.frombuffer(data, np.uint8).ctypes.data)


def _write_all(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count


def _padded(header: bytes, size: int) -> bytes:
    """The header made ``size`` bytes long by spaces behind its JSON."""
    text = header[LENGTH_BYTES:].ljust(size - LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
