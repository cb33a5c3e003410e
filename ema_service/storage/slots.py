"""Slots: the files that a run's versions are written to, again and again.

A slot is a folder with one safetensors file for each average, allocated once and written in place ever after: the first
use of a disk's blocks runs at 0.3 GB/s, their reuse at 8.7. So that the pages of one use are those of the next, the
header is padded with spaces (which the format allows) to a fixed multiple of the page size.

A version of many bytes is written behind its computation, on threads: write() takes note of what is to be written, and
finish() waits for it. Two threads take turns, so that the disk has something to do while one thread waits for a busy
core: with one thread, a quarter of 1 GiB was left for the end.

Whoever takes a slot has it for as long as the object lives: as with the memory of arenas there is no call that gives it
back, to be forgotten or made too early while another thread still writes.

Knows which slots there are, who has them, and what of a version is written. Does not know how bytes reach the disk
(slot_files), what a slot holds, which one counts (rows of the catalog say so), or when it must be on the medium.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path

from ema_service.storage.files import file_name, refuse_link
from ema_service.storage.slot_files import Extent, SlotFiles

__all__ = ["Slot", "Slots"]

_FOLDER = "slots"
#: A slot of so many bytes is written on a thread; less is written sooner than a thread is woken.
_BEHIND_BYTES = 4 << 20
#: Bytes written at a time, and by how many threads. Past the page cache, 1 MiB at a time took 0.45 s for 1 GiB, 4 MiB
#: 0.37, 16 MiB 0.36; while the cores were busy receiving it took one thread twice that with 4 MiB at a time.
_WRITTEN_AT_ONCE = 8 << 20
_WRITERS = 2


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
        is written to the disk; else what the disk did not take by finish() is left in the page cache.
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
            slot.files.open()

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
        small = sum(extent.data for extent in self._extents.values()) < _BEHIND_BYTES
        files = SlotFiles(self._folder, name, self._extents, direct=not small)
        slot = Slot(name, files, self._extents, None if small else self._threads, patient=self._patient)
        weakref.finalize(slot, self._take_back, name, files).atexit = False
        return slot

    def _take_back(self, name: str, files: SlotFiles) -> None:
        # Runs wherever the last reference dies, perhaps inside a locked region: it must not lock (append is atomic).
        files.close()
        self._free.append(name)


class Slot:
    """One slot, its holder's alone: one thread at a time calls it. Its bytes are arbitrary until finish().

    name: relative to the run's folder. files: where its bytes go.
    """

    def __init__(
        self, name: str, files: SlotFiles, extents: Mapping[str, Extent], threads: Executor | None, *, patient: bool
    ) -> None:
        """Made by Slots, which closes ``files`` when the slot dies. threads: None writes at once."""
        self.name = name
        self.files = files
        self._extents = extents
        self._threads = threads
        self._patient = patient
        #: Of each average: all its data, how many bytes are made, and how many are written or being written.
        self._sources: dict[str, memoryview] = {}
        self._made = dict.fromkeys(extents, 0)
        self._taken = dict.fromkeys(extents, 0)
        self._writing: list[Future[None]] = []
        self._hurried = False
        self._fault: tuple[int, str] | None = None
        self._lock = threading.Lock()

    def write(self, average: str, data: memoryview, upto: int) -> None:
        """Write an average's data as far as they are made, perhaps behind the caller.

        data: all of them, the same at each call. upto: bytes that do not change any more, more each time. Never raises:
        what goes wrong is told by finish().
        """
        self._sources[average] = data
        self._made[average] = upto
        if self._threads is None:
            self._write_made(1)
        elif upto - self._taken[average] >= _WRITTEN_AT_ONCE:
            # A thread that met a defect stays: finish() must raise it, for its bytes are nowhere.
            self._writing = [each for each in self._writing if not each.done() or each.exception()]
            if len(self._writing) < _WRITERS:
                self._writing.append(self._threads.submit(partial(self._write_made, _WRITTEN_AT_ONCE)))

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
            raise OSError(*self._fault, str(self.files.folder))
        self.files.open()
        for average, header in headers.items():
            if self._taken[average] != self._extents[average].data:
                raise OSError(f"{self.files.folder}: {average} has {self._taken[average]} bytes")
            self.files.write_header(average, header)

    def _write_made(self, least: int) -> None:
        """Write of each average what is made and nobody else writes, as long as that is ``least`` bytes or more."""
        while piece := self._take(least):
            self._write(*piece)

    def _take(self, least: int) -> tuple[str, int, int] | None:
        with self._lock:
            for average, start in self._taken.items():
                stop = min(start + _WRITTEN_AT_ONCE, self._made[average])
                if stop - start >= least and not self._fault:
                    self._taken[average] = stop
                    return average, start, stop
        return None

    def _write(self, average: str, start: int, stop: int) -> None:
        try:
            with self._lock:
                self.files.open()
            self.files.write(average, self._sources[average][start:stop], start, cached=self._hurried)
        except OSError as fault:
            # Without its traceback, whose frames hold this slot: it would live on until a garbage collection.
            self._fault = (fault.errno or 0, fault.strerror or str(fault))
