"""Slots: the files that a run's versions are written to, again and again.

A slot is a folder with one safetensors file for each average, allocated once and written in place ever after: the first
use of a disk's blocks runs at 0.3 GB/s, their reuse at 8.7. The header is padded with spaces (which the format allows)
to whole pages, so that the data of every version begin at the same page.

A large version is written behind its computation, on threads: write() notes how much is computed, and finish() waits
for the disk. Two threads take turns, so that the disk has work while one thread waits for a busy core: with one thread,
a quarter of 1 GiB was still to be written at the end.

Whoever takes a slot has it for as long as the Slot object lives. As with the memory of arenas, there is no call that
gives a slot back, to be forgotten or made too early while another thread still writes.

Knows which slots there are, who has them, and how much of a version is written. Does not know how bytes reach the disk
(slot_files), what a slot holds, which slot counts (rows of the catalog say so), or when a slot must be on the medium.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ema_service.storage.files import file_name, refuse_link
from ema_service.storage.slot_files import Extent, SlotFiles

__all__ = ["Slot", "Slots"]

_FOLDER = "slots"
#: A slot of so many bytes is written on threads; a smaller one is written sooner than a thread is woken.
_BEHIND_BYTES = 4 << 20
#: Bytes of one write, and how many threads write one slot. Past the page cache, 1 GiB took 0.45 s by 1 MiB at once,
#: 0.37 by 4 MiB, 0.36 by 16 MiB; one thread with 4 MiB at once took twice as long while the cores were busy receiving.
_WRITTEN_AT_ONCE = 8 << 20
_WRITERS = 2


class Slots:
    """The slots of one run. Thread-safe."""

    def __init__(
        self,
        folder: Path,
        extents: Mapping[str, Extent],
        known: Iterable[str],
        threads: Executor | None,
        *,
        patient: bool = False,
        hold: Callable[[], None] = lambda: None,
    ) -> None:
        """hold: as for SlotFiles. known: slots that rows speak of, relative to ``folder``; the first are overwritten
        last.

        threads: to write on; they must drop finished work at once (Threads), for the work refers to a slot. None: on
        the caller's thread. patient: write everything to the disk; else what the disk has not taken by finish() is left
        in the page cache.
        """
        self._folder = folder
        self._hold = hold
        #: By name of the average; another mapping at each change, never changed itself.
        self._extents = dict(extents)
        self._threads = threads
        self._patient = patient
        self._lock = threading.Lock()
        made = (f"{_FOLDER}/{path.name}" for path in (folder / _FOLDER).glob("*"))
        names = dict.fromkeys([*known, *sorted(made)])
        self._names = set(names)
        # Last in, first out: pages written a moment ago, and superseded since, need never reach the disk.
        self._free = deque(names)

    def take(self, averages: Collection[str] | None = None) -> Slot:
        """A slot that nobody has, perhaps a new one. Touches no disk.

        averages: of the version to be written; None: all. Raises KeyError for one that the slots have no file of.
        """
        extents = self._extents
        chosen = extents if averages is None else {average: extents[average] for average in averages}
        with self._lock:
            try:
                name = self._free.pop()
            except IndexError:
                name = self._new_name()
        return self._lend(name, chosen)

    def hold(self, name: str) -> Slot:
        """The slot of this name, with the version in it; nobody may have it yet, and nobody else gets it meanwhile."""
        with self._lock:
            self._free.remove(name)
        return self._lend(name, self._extents)

    def allocate(self, count: int) -> None:
        """Make ``count`` slots for later use. Raises OSError (no space); the slot that failed is removed then."""
        for slot in [self.take() for _ in range(count)]:
            slot.files.open()

    def lacking(self, extents: Mapping[str, Extent]) -> dict[str, Extent]:
        """Those averages of which the slots have no file of this size."""
        return {average: extent for average, extent in extents.items() if self._extents.get(average) != extent}

    def add(self, extents: Mapping[str, Extent]) -> None:
        """Give every slot that is there files of more averages, with all the space they take.

        Raises OSError (no space), and then gave none.
        """
        with ExitStack() as made, ExitStack() as undo:
            for name in self._on_disk():
                files = SlotFiles(self._folder, name, extents, direct=False, hold=self._hold)
                made.callback(files.close)
                for average in extents:
                    undo.callback(files.remove, average)
                files.open()
            undo.pop_all()
        self._extents = {**self._extents, **extents}

    def keep_only(self, averages: Collection[str]) -> None:
        """Remove the files of all other averages from every slot; whoever has such a file open goes on with it."""
        self._extents = {name: extent for name, extent in self._extents.items() if name in averages}
        for name in self._on_disk():
            SlotFiles(self._folder, name, {}, direct=False).keep_only(self._extents)

    def _on_disk(self) -> list[str]:
        """The slots whose folder is there: others are made when they are first written."""
        return [name for name in sorted(self._names) if (self._folder / name).is_dir()]

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

    def _lend(self, name: str, extents: Mapping[str, Extent]) -> Slot:
        """The Slot object of a slot; when it dies, its files are closed and the slot is free."""
        small = sum(extent.data for extent in extents.values()) < _BEHIND_BYTES
        files = SlotFiles(self._folder, name, extents, direct=not small, hold=self._hold)
        slot = Slot(name, files, extents, None if small else self._threads, patient=self._patient)
        weakref.finalize(slot, self._take_back, name, files).atexit = False
        return slot

    def _take_back(self, name: str, files: SlotFiles) -> None:
        # Runs wherever the last reference to the slot dies, perhaps inside a locked region, so nothing here may lock
        # (append is atomic).
        files.close()
        if any(average not in self._extents for average in files.averages):
            # Removed while the slot was had, and perhaps opened since.
            files.keep_only(self._extents)
        self._free.append(name)


@dataclass(slots=True)
class _Stretch:
    """Bytes of an average that become final in order, from ``start`` on.

    made: up to where they are computed. taken: up to where they are written or being written. again: whether they are
    computed once more, so that what was written of them is not what counts.
    """

    average: str
    start: int
    made: int
    taken: int
    again: bool = False


class Slot:
    """One slot, taken by one holder. Its files are garbage until finish().

    name: relative to the run's folder. files: the slot's files. write() may be called by many threads at once, each
    with stretches of its own.
    """

    def __init__(
        self, name: str, files: SlotFiles, extents: Mapping[str, Extent], threads: Executor | None, *, patient: bool
    ) -> None:
        """Made by Slots, which closes ``files`` when the slot dies. threads: None writes at once, on the caller's
        thread."""
        self.name = name
        self.files = files
        self._extents = extents
        self._threads = threads
        self._patient = patient
        #: By name of the average: its data.
        self._sources: dict[str, memoryview] = {}
        #: By name of the average and first byte.
        self._stretches: dict[tuple[str, int], _Stretch] = {}
        self._writing: list[Future[None]] = []
        self._hurried = False
        self._fault: tuple[int, str] | None = None
        self._lock = threading.Lock()

    def write(self, average: str, data: memoryview, upto: int, start: int = 0) -> None:
        """Write bytes ``start`` to ``upto`` of an average, perhaps behind the caller.

        data: the whole average, the same memory at each call, read until finish() returns. start: of a stretch whose
        bytes become final in order. upto: bytes that are final, more each time; fewer where the stretch is computed
        once more, and then finish() writes it. Never raises: faults are raised by finish().
        """
        with self._lock:
            self._sources[average] = data
            stretch = self._stretches.setdefault((average, start), _Stretch(average, start, start, start))
            # Written behind the caller as before, the bytes of the first time might come last.
            stretch.again |= upto < stretch.made
            stretch.made = upto
            if self._threads and not stretch.again and upto - stretch.taken >= _WRITTEN_AT_ONCE:
                self._write_behind(self._threads)
        if self._threads is None:
            self._write_made(1)

    def written(self, average: str) -> int:
        """How many bytes of the average write() was told of."""
        return sum(each.made - each.start for each in self._of(average))

    def finish(self, headers: Mapping[str, bytes]) -> None:
        """Write the rest of the data, then the headers: the files are whole.

        Raises OSError, also for faults that write() met.
        """
        self._hurried = not self._patient
        for writing in self._writing:
            writing.result()
        for stretch in self._stretches.values():
            if stretch.again:
                stretch.taken, stretch.again = stretch.start, False
        self._write_made(1)
        self._sources.clear()
        if self._fault:
            raise OSError(*self._fault, str(self.files.folder))
        self.files.open()
        for average, header in headers.items():
            taken = sum(each.taken - each.start for each in self._of(average))
            if taken != self._extents[average].data:
                raise OSError(f"{self.files.folder}: {average} has {taken} bytes")
            self.files.write_header(average, header)

    def _write_behind(self, threads: Executor) -> None:
        """Have a thread write what is computed, unless enough threads do. Under the lock."""
        # A write that ended in a defect stays in the list: finish() must raise it, for its bytes were not written.
        self._writing = [each for each in self._writing if not each.done() or each.exception()]
        if len(self._writing) < _WRITERS:
            self._writing.append(threads.submit(partial(self._write_made, _WRITTEN_AT_ONCE)))

    def _of(self, average: str) -> list[_Stretch]:
        with self._lock:
            return [each for each in self._stretches.values() if each.average == average]

    def _write_made(self, least: int) -> None:
        """Write what is computed and nobody else is writing, while that is ``least`` bytes or more of an average."""
        while piece := self._take(least):
            self._write(*piece)

    def _take(self, least: int) -> tuple[str, int, int] | None:
        """The next bytes to write: average, start and stop; None where fewer than ``least`` are to be written."""
        with self._lock:
            for each in self._stretches.values():
                start, stop = each.taken, min(each.taken + _WRITTEN_AT_ONCE, each.made)
                if stop - start >= least and not each.again and not self._fault:
                    each.taken = stop
                    return each.average, start, stop
        return None

    def _write(self, average: str, start: int, stop: int) -> None:
        """Write bytes of an average to its file, and note a fault for finish()."""
        try:
            with self._lock:
                self.files.open()
            self.files.write(average, self._sources[average][start:stop], start, cached=self._hurried)
        except OSError as fault:
            # Without the traceback, whose frames refer to this slot: it would live until a garbage collection.
            self._fault = (fault.errno or 0, fault.strerror or str(fault))
