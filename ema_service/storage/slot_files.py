"""The files of one slot: made with all the space they take, opened when needed, written in place, synced.

Data are written past the page cache where the file system can (O_DIRECT). 1 GiB takes 0.37 s of the disk's time and
0.01 s of a core's; through the cache, fdatasync included, 0.6 s and 0.2 s. The core receives the next push meanwhile,
and the cache keeps what others read.

A file is synced through the descriptor that wrote it, so that an error of the kernel's write-back is reported.

Knows folders, descriptors and bytes. Does not know who writes, when, or which file counts.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ema_client.wire import LENGTH_BYTES
from ema_service.storage.files import file_name, refuse_link, remove_tree, sync_folder

__all__ = ["Extent", "SlotFiles", "padded_bytes"]

_log = logging.getLogger(__name__)

#: Bytes of a page, of memory and of the disk. Writes past the page cache are whole pages of both.
_PAGE = 4096


def padded_bytes(header: bytes) -> int:
    """The length of the header in a slot's file, padded to whole pages; shorter headers are padded to the same
    length."""
    return -(-len(header) // _PAGE) * _PAGE


@dataclass(frozen=True, slots=True)
class Extent:
    """The size of one average's file: bytes of the padded header, and of the data behind the header."""

    header: int
    data: int


class SlotFiles:
    """The files of one slot, one for each average. Not thread-safe, but for write() once the files are open.

    folder: where the files lie. direct: whether data may be written past the page cache; not worth it for small files.
    hold: called before anything is written, as FolderLock.hold(), whose errors any method raises.
    """

    def __init__(
        self,
        run_folder: Path,
        name: str,
        extents: Mapping[str, Extent],
        *,
        direct: bool,
        hold: Callable[[], None] = lambda: None,
    ) -> None:
        self._hold = hold
        self.folder = run_folder / name
        self._run_folder = run_folder
        self._name = name
        self._extents = extents
        self._direct = direct
        #: By name of the average, and whether the descriptor writes past the page cache.
        self._descriptors: dict[tuple[str, bool], int] = {}

    @property
    def averages(self) -> Collection[str]:
        """The averages that have a file each."""
        return self._extents.keys()

    @property
    def past_cache(self) -> bool:
        """Whether the open files are written past the page cache."""
        return self._direct and any(direct for _, direct in self._descriptors)

    def open(self) -> None:
        """Open the files; those that are missing are made, with all the space they take. Raises OSError."""
        if self._descriptors:
            return
        self._hold()
        refuse_link(self._run_folder, self._name)
        new = not self.folder.exists()
        with ExitStack() as undo:
            if new:
                undo.callback(remove_tree, self.folder)
                # mkdir() without parents: where the run's own folder is gone, the run was deleted and must not come
                # back.
                self.folder.parent.mkdir(exist_ok=True)
                self.folder.mkdir()
            undo.callback(self.close)
            made = [self._open_file(average, extent) for average, extent in self._extents.items()]
            if any(made):
                for folder in (self.folder, *self.folder.parents[:2]):
                    sync_folder(folder)
            undo.pop_all()

    def write(self, average: str, data: memoryview, start: int, *, cached: bool) -> None:
        """Write data of an average, from byte ``start`` of the average on. Many threads may write at once.

        Raises OSError.

        cached: write through the page cache. Else whole pages of memory that become whole pages of the file go past the
        cache.
        """
        self._hold()
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
            # The file system wants a larger alignment than pages. The descriptor stays open: another thread may be
            # using it.
            self._direct = False
            _write_all(through, data, position)
            return
        _write_all(through, data[:before], position)
        _write_all(through, data[before + whole :], position + before + whole)

    def write_header(self, average: str, header: bytes) -> None:
        """Write the header in front of an average's data. Raises OSError."""
        self._hold()
        padded = _padded(header, self._extents[average].header)
        _write_all(self._descriptors[average, False], memoryview(padded), 0)

    def sync(self) -> None:
        """Return when the files' bytes are on the medium, and close the files: runs may be many and idle, descriptors
        are few.

        Raises OSError. A later call would succeed and prove nothing: the kernel forgets which pages it failed to write.
        """
        self.open()
        for (_, direct), descriptor in self._descriptors.items():
            if not direct:
                _sync_data(descriptor)
        self.close()

    def close(self) -> None:
        """Close the files that are open."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def remove(self, average: str) -> None:
        """Remove the file of an average, if it is there; a failure is logged."""
        self._unlink(self.folder / file_name(average))

    def keep_only(self, averages: Collection[str]) -> None:
        """Remove the files of all averages but these; nothing behind a symbolic link. A failure is logged."""
        kept = {file_name(average) for average in averages}
        try:
            refuse_link(self._run_folder, self._name)
            found = [path for path in self.folder.glob(file_name("*")) if path.name not in kept]
        except OSError as fault:
            _log.warning("cannot look after %s: %s", self.folder, fault)
            return
        for path in found:
            self._unlink(path)

    def _unlink(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as fault:
            _log.warning("%s could not be removed, and takes room: %s", path, fault)

    def _open_file(self, average: str, extent: Extent) -> bool:
        """Open the file of one average, and say whether it had to be made: it was missing, or of another size."""
        path, size = self.folder / file_name(average), extent.header + extent.data
        refuse_link(self._run_folder, f"{self._name}/{path.name}")  # with a better message than O_NOFOLLOW's
        descriptor = self._descriptors[average, False] = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
        )
        if self._direct and (direct := _open_direct(path)) is not None:
            self._descriptors[average, True] = direct
        if os.fstat(descriptor).st_size == size:
            return False
        os.ftruncate(descriptor, 0)  # the rest of another use, or of another version of this software
        _allocate(descriptor, size)
        return True


def _allocate(descriptor: int, size: int) -> None:
    """Give a file its size, with blocks on the disk where the system can reserve them. Raises OSError."""
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
    """A descriptor that writes past the page cache; None where the system or the file system cannot."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECT)
    except (AttributeError, OSError):
        return None


def _address(data: memoryview) -> int:
    """The memory address of the first byte of ``data``."""
    return int(np.frombuffer(data, np.uint8).ctypes.data)


def _write_all(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count


def _padded(header: bytes, size: int) -> bytes:
    """The header, ``size`` bytes long by spaces behind its JSON."""
    text = header[LENGTH_BYTES:].ljust(size - LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
