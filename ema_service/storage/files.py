"""Files that are there whole or not at all (written to a temporary name, synced, renamed, the folder synced); reading.

Knows paths and bytes. Does not know what the bytes mean, beyond the safetensors header in front of them.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from ema_client.errors import MalformedBody
from ema_client.wire import LENGTH_BYTES, Header, parse_header, parse_length

__all__ = [
    "FolderLock",
    "FolderLocked",
    "TensorFile",
    "file_name",
    "refuse_link",
    "remove_tree",
    "sync_folder",
    "write_whole",
]

_log = logging.getLogger(__name__)

_TEMPORARY = ".tmp"
#: One write of this size keeps the page cache busy without holding a whole model in a system call.
_WRITE_BYTES = 8 << 20
#: One read of this size is still in the processor's cache when it is looked at.
_READ_BYTES = 1 << 20


def file_name(average: str) -> str:
    return f"{average}.safetensors"


def write_whole(path: Path, chunks: Iterable[bytes | memoryview]) -> int:
    """Write a file that appears under its name only when every byte is on disk. Returns its size.

    Raises OSError (no space, no permission); the temporary file is gone then and ``path`` is as it was.
    """
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb", buffering=0) as file:  # a new file: a link that was planted there is not followed
            written = sum(_write_all(file.fileno(), chunk) for chunk in chunks)
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return written


def sync_folder(folder: Path) -> None:
    """Make renames and removals in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_link(folder: Path, within: str = "") -> None:
    """Raises OSError where a symbolic link stands in the place of a run's folder: what it leads to is not ours.

    within: a path in the folder, none of whose parts may be one either.
    """
    path = folder
    for part in ("", *Path(within).parts):
        path /= part
        if path.is_symlink():
            raise OSError(
                errno.ELOOP,
                f"{path} is a symbolic link, which is not followed: put the run's own folder or file there and "
                "restart the server, or delete the run",
            )


def remove_tree(folder: Path) -> None:
    """Remove what no row speaks of. A failure is logged: it costs disk space, never correctness.

    Of a link only the link is removed.
    """
    try:
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as fault:
        _log.warning("cannot remove %s: %s", folder, fault)


def _write_all(descriptor: int, chunk: bytes | memoryview) -> int:
    rest = memoryview(chunk)
    while rest:
        rest = rest[os.write(descriptor, rest[:_WRITE_BYTES]) :]
    return len(chunk)


class TensorFile:
    """A safetensors file open for reading. Reads are positional, so many threads may share it.

    The file stays readable after its name was removed, until close().
    """

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError, or MalformedBody where the file is not whole."""
        self._file = path.open("rb", buffering=0)
        try:
            self.header, self._data_begin = self._read_header(path)
        except (MalformedBody, OSError):
            self._file.close()
            raise

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of the data section. Raises OSError if the file ends before."""
        buffer = memoryview(bytearray(stop - start))
        self.read_into(buffer, start)
        return buffer

    def read_into(self, buffer: memoryview, start: int = 0) -> None:
        """Fill ``buffer`` from byte ``start`` of the data section on. Raises OSError if the file ends before."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._file.fileno(), [buffer[done:]], self._data_begin + start + done)
            if not count:
                raise OSError(f"{self._file.name} ends at byte {self._data_begin + start + done}: it was cut short")
            done += count

    def read_whole(self, buffer: memoryview) -> Iterator[memoryview]:
        """Fill ``buffer``, as long as the data section, piece by piece: each while it is in the processor's cache.

        Raises OSError if the file ends before.
        """
        for start in range(0, len(buffer), _READ_BYTES):
            piece = buffer[start : start + _READ_BYTES]
            self.read_into(piece, start)
            yield piece

    @property
    def name(self) -> str:
        """Where it lies, for messages."""
        return str(self._file.name)

    @property
    def identity(self) -> str:
        """Another one for each file ever written here, the same after a restart."""
        status = os.fstat(self._file.fileno())
        return f"{status.st_ino}-{status.st_mtime_ns}"

    def close(self) -> None:
        self._file.close()

    def _read_header(self, path: Path) -> tuple[Header, int]:
        descriptor = self._file.fileno()
        size = os.fstat(descriptor).st_size
        length = parse_length(os.pread(descriptor, LENGTH_BYTES, 0))
        header = parse_header(os.pread(descriptor, length, LENGTH_BYTES))
        begin = LENGTH_BYTES + length
        if size != begin + header.data_bytes:
            raise MalformedBody(f"{path} has {size} bytes, its header says {begin + header.data_bytes}")
        return header, begin


class FolderLocked(OSError):
    """Another process has the data folder."""


class FolderLock:
    """An exclusive lock on a folder that dies with the process (flock)."""

    def __init__(self, folder: Path) -> None:
        """Raises FolderLocked."""
        self._file = (folder / "lock").open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise FolderLocked(
                f"another server uses the data dir {folder}: stop it, or give this one another --data-dir"
            ) from None

    def release(self) -> None:
        self._file.close()
