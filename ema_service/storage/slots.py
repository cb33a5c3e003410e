"""Slots: the files that a run's versions are written to, again and again.

A slot is a folder with one safetensors file for each average, allocated once and written in place ever after: the first
use of a disk's blocks runs at 0.3 GB/s, their reuse at 8.7. So that the pages of one use are those of the next, the
header is padded with spaces (which the format allows) to a fixed multiple of the page size.

A version of many bytes is written behind its computation, on threads: write() takes note of what is to be written, and
finish() waits for it. It is written past the page cache where that can be (O_DIRECT): 1 GiB took 0.37 s of the disk's
time and 0.01 s of a core's, where through the cache, fdatasync included, it took 0.6 s and 0.2 s. That is a core which
receives the next push, and a cache that keeps what others read. Two threads take turns, so that the disk has something
to do while one is waited for by a busy core: with one, a quarter of 1 GiB was left for the end.

Whoever takes a slot has it for as long as the object lives: as with the memory of arenas there is no call that gives it
back, to be forgotten or made too early while another thread still writes.

Knows folders and bytes. Does not know what a slot holds, which one counts (rows of the catalog say so), or when
something must be on the medium.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ema_client.wire import LENGTH_BYTES
from ema_service.storage.files import file_name, refuse_link, remove_tree, sync_folder

__all__ = ["Extent", "Slot", "Slots", "padded_bytes"]

_PAGE = 4096
_FOLDER = "slots"
#: A slot of so many bytes is written on a thread; less is written sooner than a thread is woken.
_BEHIND_BYTES = 4 << 20
#: Written at a time, and by how many threads. Past the page cache, 1 MiB at a time took 0.45 s for 1 GiB, 4 MiB 0.37,
#: 16 MiB 0.36; while the cores were busy receiving it took one thread twice that in pieces of 4 MiB.
_PIECE_BYTES = 8 << 20
_WRITERS = 2


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

    def __init__(
        self,
        folder: Path,
        extents: Mapping[str, Extent],
        known: Iterable[str],
        threads: Executor,
        *,
        patient: bool = False,
    ) -> None:
        """known: slots that rows speak of, relative to ``folder``, those to be written to last first.

        threads: to write on; they must let go of finished work at once (Threads), for it holds the slot. patient: all
        is written to the disk; else what it did not take by finish() is left in the page cache.
        """
        self._folder = folder
        self._extents = extents
        self._threads = threads
        self._patient = patient
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

    def check(self) -> None:
        """Raises OSError where a symbolic link stands in the place of the run's folder, of a slot or of its files."""
        refuse_link(self._folder, _FOLDER)  # there may be no slot yet
        for name in self._names:
            for average in self._extents:
                refuse_link(self._folder, f"{name}/{file_name(average)}")

    def _new_name(self) -> str:
        name = next(name for k in itertools.count() if (name := f"{_FOLDER}/{k}") not in self._names)
        self._names.add(name)
        return name

    def _lend(self, name: str) -> Slot:
        descriptors: dict[tuple[str, bool], int] = {}
        slot = Slot(name, self._folder, self._extents, descriptors, self._threads, patient=self._patient)
        weakref.finalize(slot, self._take_back, name, descriptors).atexit = False
        return slot

    def _take_back(self, name: str, descriptors: dict[tuple[str, bool], int]) -> None:
        # Runs wherever the last reference dies, perhaps inside a locked region: it must not lock (append is atomic).
        for descriptor in descriptors.values():
            os.close(descriptor)
        self._free.append(name)


class Slot:
    """One slot, its holder's alone: one thread at a time calls it. Its bytes are arbitrary until finish().

    The descriptors that write are those that sync, so that an error of the kernel's write-back in between is seen.
    """

    def __init__(
        self,
        name: str,
        run_folder: Path,
        extents: Mapping[str, Extent],
        descriptors: dict[tuple[str, bool], int],
        threads: Executor,
        *,
        patient: bool,
    ) -> None:
        """Made by Slots, which closes ``descriptors`` when the slot dies."""
        self.name = name
        self._run_folder = run_folder
        self._folder = run_folder / name
        self._extents = extents
        self._descriptors = descriptors
        self._threads = threads
        self._patient = patient
        self._small = sum(extent.data for extent in extents.values()) < _BEHIND_BYTES
        self._made = dict.fromkeys(extents, 0)
        self._sources: dict[str, memoryview] = {}
        #: Bytes of each average's data that are written, or that someone is writing.
        self._taken = dict.fromkeys(extents, 0)
        self._writing: list[Future[None]] = []
        self._lock = threading.Lock()
        self._hurried = self._cached = False
        self._fault: tuple[int, str] | None = None

    def write(self, average: str, data: memoryview, upto: int) -> None:
        """Write an average's data as far as they are made, perhaps behind the caller.

        data: all of them, the same at each call. upto: bytes that do not change any more, more each time. Never raises:
        what goes wrong is told by finish().
        """
        self._sources[average] = data
        self._made[average] = upto
        if self._small:
            self._write_made(1)
        elif upto - self._taken[average] >= _PIECE_BYTES:
            # One that met a defect stays: finish() must raise it, for its bytes are nowhere.
            self._writing = [each for each in self._writing if not each.done() or each.exception()]
            if len(self._writing) < _WRITERS:
                self._writing.append(self._threads.submit(partial(self._write_made, _PIECE_BYTES)))

    def _write_made(self, least: int) -> None:
        """Write of each average what is made and nobody else writes, as long as that is ``least`` bytes or more."""
        while piece := self._take(least):
            self._write(*piece)

    def _take(self, least: int) -> tuple[str, int, int] | None:
        with self._lock:
            for average, start in self._taken.items():
                stop = min(start + _PIECE_BYTES, self._made[average])
                if stop - start >= least and not self._fault:
                    self._taken[average] = stop
                    return average, start, stop
        return None

    def _write(self, average: str, start: int, stop: int) -> None:
        try:
            with self._lock:
                self.open()
            self._put(average, self._sources[average][start:stop], self._extents[average].header + start)
        except OSError as fault:
            # Without its traceback, whose frames hold this slot: it would live on until a garbage collection.
            self._fault = (fault.errno or 0, fault.strerror or str(fault))

    def _put(self, average: str, data: memoryview, position: int) -> None:
        """Write data, past the page cache where whole pages of memory are to become whole pages of the file."""
        cached = self._descriptors[average, False]
        direct = None if self._cached else self._descriptors.get((average, True))
        before = min(-position % _PAGE, len(data))
        whole = (len(data) - before) // _PAGE * _PAGE
        if direct is None or self._hurried or not whole or (_address(data) + before) % _PAGE:
            _write_all(cached, data, position)
            return
        try:
            _write_all(direct, data[before : before + whole], position + before)
        except OSError as fault:
            if fault.errno != errno.EINVAL:
                raise
            # A file system that wants more than whole pages. The other thread may be using the descriptor.
            self._cached = True
            _write_all(cached, data, position)
            return
        _write_all(cached, data[:before], position)
        _write_all(cached, data[before + whole :], position + before + whole)

    def written(self, average: str) -> int:
        """How many bytes of the average's data write() was told of."""
        return self._made[average]

    def finish(self, headers: Mapping[str, bytes]) -> None:
        """Put the headers in front: the files are whole. Raises OSError, also for what write() met."""
        self._hurried = not self._patient
        for writing in self._writing:
            writing.result()
        self._write_made(1)
        self._sources.clear()
        if self._fault:
            raise OSError(*self._fault, str(self._folder))
        self.open()
        for average, header in headers.items():
            if self._taken[average] != self._extents[average].data:
                raise OSError(f"{self._folder}: {average} has {self._taken[average]} bytes")
            _write_all(self._descriptors[average, False], memoryview(_padded(header, self._extents[average].header)), 0)

    def sync(self) -> None:
        """Return when its bytes are on the medium. Raises OSError; then a later call must not be believed."""
        self.open()
        for (_, direct), descriptor in self._descriptors.items():
            if not direct:
                _sync_data(descriptor)
        self._close()  # runs may be many and idle, descriptors are few

    def open(self) -> None:
        """Open the files and make them if they are not there, with all the space they take. Raises OSError."""
        if self._descriptors:
            return
        refuse_link(self._run_folder, self.name)
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
        refuse_link(self._run_folder, f"{self.name}/{path.name}")  # says more than what O_NOFOLLOW makes of it
        descriptor = self._descriptors[average, False] = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
        )
        if not self._small and (direct := _open_direct(path)) is not None:
            self._descriptors[average, True] = direct
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
