"""Slots: the files that a run's versions are written to, again and again.

A slot is a folder with one safetensors file for each average, allocated once and written in place ever after: the first
use of a disk's blocks runs at 0.3 GB/s, their reuse at 8.7. So that the pages of one use are those of the next, the
header is padded with spaces (which the format allows) to a fixed multiple of the page size.

Whoever takes a slot has it for as long as the object lives: as with the memory of arenas there is no call that gives it
back, to be forgotten or made too early while another thread still writes.

Knows folders, bytes and checksums. Does not know what a slot holds, which one counts (rows of the catalog say so), or
when something must be on the medium.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ema_client.wire import LENGTH_BYTES
from ema_service.storage.files import file_name, remove_tree, sync_folder

__all__ = ["Extent", "Slot", "Slots", "padded_bytes"]

_PAGE = 4096
_FOLDER = "slots"


def padded_bytes(header: bytes) -> int:
    """How long a header of at most this length is in a slot's file."""
    return -(-len(header) // _PAGE) * _PAGE


@dataclass(frozen=True, slots=True)
class Extent:
    """The size of one average's file: bytes of the padded header, and of the data behind it."""

    header: int
    data: int


class Slots:
    """The slots of one run. Thread-safe."""

    def __init__(self, folder: Path, extents: Mapping[str, Extent], known: Iterable[str]) -> None:
        """known: slots that rows speak of, relative to ``folder``, those to be written to last first."""
        self._folder = folder
        self._extents = extents
        self._lock = threading.Lock()
        made = (f"{_FOLDER}/{path.name}" for path in (folder / _FOLDER).glob("*"))
        names = dict.fromkeys([*known, *sorted(made)])
        self._names = set(names)
        # Last in, first out: pages written a moment ago and superseded since need never reach the disk.
        self._free = deque(names)

    def take(self) -> Slot:
        """A slot that nobody has, perhaps a new one. On disk nothing happens before it is written to."""
        with self._lock:
            try:
                name = self._free.pop()
            except IndexError:
                name = self._new_name()
        return self._lend(name)

    def hold(self, name: str) -> Slot:
        """The slot of this name with what it holds: nobody else gets it meanwhile. Nobody has it yet."""
        with self._lock:
            self._free.remove(name)
        return self._lend(name)

    def allocate(self, count: int) -> None:
        """Make ``count`` slots for later. Raises OSError (no space); the slot that failed is gone then."""
        for slot in [self.take() for _ in range(count)]:
            slot.open()

    def _new_name(self) -> str:
        name = next(name for k in itertools.count() if (name := f"{_FOLDER}/{k}") not in self._names)
        self._names.add(name)
        return name

    def _lend(self, name: str) -> Slot:
        descriptors: dict[str, int] = {}
        slot = Slot(name, self._folder / name, self._extents, descriptors)
        weakref.finalize(slot, self._take_back, name, descriptors).atexit = False
        return slot

    def _take_back(self, name: str, descriptors: dict[str, int]) -> None:
        # Runs wherever the last reference dies, perhaps inside a locked region: it must not lock (append is atomic).
        for descriptor in descriptors.values():
            os.close(descriptor)
        self._free.append(name)


class Slot:
    """One slot, its holder's alone. One thread at a time writes; its bytes are arbitrary until finish().

    The descriptors that write are those that sync, so that an error of the kernel's write-back in between is seen.
    """

    def __init__(self, name: str, folder: Path, extents: Mapping[str, Extent], descriptors: dict[str, int]) -> None:
        """Made by Slots, which closes ``descriptors`` when the slot dies."""
        self.name = name
        self._folder = folder
        self._extents = extents
        self._descriptors = descriptors
        self._written = dict.fromkeys(extents, 0)
        self._hashes = {average: xxhash.xxh3_128() for average in extents}
        self._fault: tuple[int, str] | None = None

    def write(self, average: str, data: memoryview) -> None:
        """Write the next bytes of an average's data. Never raises: what goes wrong is told by finish()."""
        if self._fault:
            return
        try:
            self.open()
            position = self._extents[average].header + self._written[average]
            _write_all(self._descriptors[average], data, position)
        except OSError as fault:
            # Without its traceback, whose frames hold this slot: it would live on until a garbage collection.
            self._fault = (fault.errno or 0, fault.strerror or str(fault))
            return
        self._hashes[average].update(data)
        self._written[average] += len(data)

    def written(self, average: str) -> int:
        """How many bytes of the average's data are there."""
        return self._written[average]

    def finish(self, headers: Mapping[str, bytes]) -> None:
        """Put the headers in front: the files are whole. Raises OSError, also for what write() met."""
        if self._fault:
            raise OSError(*self._fault, str(self._folder))
        self.open()
        for average, header in headers.items():
            if self._written[average] != self._extents[average].data:
                raise OSError(f"{self._folder}: {average} has {self._written[average]} bytes")
            _write_all(self._descriptors[average], memoryview(_padded(header, self._extents[average].header)), 0)

    @property
    def checksums(self) -> dict[str, str]:
        """Of each average's data as far as it is written: xxh3, 128 bits, hexadecimal."""
        return {average: each.hexdigest() for average, each in self._hashes.items()}

    def sync(self) -> None:
        """Return when its bytes are on the medium. Raises OSError; then a later call must not be believed."""
        self.open()
        for descriptor in self._descriptors.values():
            _sync_data(descriptor)
        self._close()  # runs may be many and idle, descriptors are few

    def open(self) -> None:
        """Open the files and make them if they are not there, with all the space they take. Raises OSError."""
        if self._descriptors:
            return
        new = not self._folder.exists()
        try:
            if new:
                # Not the run's own folder: where that is gone the run was deleted, and must not come back.
                self._folder.parent.mkdir(exist_ok=True)
                self._folder.mkdir()
            made = [self._open_file(average, extent) for average, extent in self._extents.items()]
            if any(made):
                for folder in (self._folder, *self._folder.parents[:2]):
                    sync_folder(folder)
        except OSError:
            self._close()
            if new:
                remove_tree(self._folder)
            raise

    def _open_file(self, average: str, extent: Extent) -> bool:
        """Whether the file was not there, or of another size."""
        path, size = self._folder / file_name(average), extent.header + extent.data
        descriptor = self._descriptors[average] = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
        )
        if os.fstat(descriptor).st_size == size:
            return False
        os.ftruncate(descriptor, 0)  # what is left of another use or another version of this software
        _allocate(descriptor, size)
        return True

    def _close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


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


def _write_all(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count


def _padded(header: bytes, size: int) -> bytes:
    """The header made ``size`` bytes long by spaces behind its JSON."""
    text = header[LENGTH_BYTES:].ljust(size - LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
