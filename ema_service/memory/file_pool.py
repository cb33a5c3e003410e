"""The memory files of one run, as a pool: buffers that outlive the process, lent and reused by reference as the host's.

A buffer is lent as often as nothing refers to its memory any more. Which file an array lies in is told by its address,
so a version can be named in a catalog by its files, and found again by them in the next process.

Knows bytes, addresses, names and the budget of memory. Does not know folders or descriptors (whoever makes the files
does), layouts, or which version counts.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

from ema_client.errors import Superseded
from ema_service.memory.pool import HostPool, lent_over
from ema_service.values import Array, address

__all__ = ["FilePool", "Files"]

_Raw = Array


class _Mapped(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def raw(self) -> _Raw: ...


class Files(Protocol):
    """Makes files of memory (storage.MemoryFiles). create() and attach() raise OSError."""

    def create(self, nbytes: int, prefix: str, count: int) -> Sequence[_Mapped]: ...
    def attach(self, name: str, nbytes: int) -> _Mapped: ...
    def remove(self, name: str) -> None: ...
    def names(self) -> set[str]: ...


class FilePool:
    """Memory of one run, in files of one size. Thread-safe.

    nbytes: of each file; whatever the run keeps fits into one. prefix: what names of the run's files begin with. host:
    the pool whose budget the files are counted in, and whose idle memory is given up for them.
    """

    def __init__(self, files: Files, nbytes: int, prefix: str, host: HostPool) -> None:
        self.nbytes = nbytes
        self._files = files
        self._host = host
        self._prefix = prefix
        self._idle: deque[tuple[str, _Raw]] = deque()
        #: By the address of its memory: the file that lies there.
        self._names: dict[int, str] = {}
        self._closed = False

    def reserve(self, count: int) -> None:
        """Have at least ``count`` files, so that a machine too small for the run says so now.

        Raises OSError where the file system has no room, MemoryError where the budget has none.
        """
        if (missing := count - len(self._names)) > 0:
            self._idle.extend(self._create(missing))

    def lend(self, nbytes: int) -> Array:
        """A uint8 array of ``nbytes`` with arbitrary content, the caller's until its last view is gone.

        Raises OSError or MemoryError where every file is in use and no other can be had; Superseded after close();
        ValueError for more than a file has.
        """
        if nbytes > self.nbytes:
            raise ValueError(f"{nbytes} bytes of a memory file of {self.nbytes} were asked for")
        try:
            name, raw = self._idle.pop()
        except IndexError:
            [(name, raw)] = self._create(1)
        return self._lent(name, raw)[:nbytes]

    def attach(self, name: str) -> Array:
        """A file of an earlier process with what it holds, the caller's as if it had been lent. Raises OSError."""
        return self._lent(name, self._attach(name))

    def adopt(self) -> None:
        """Take the run's other files of an earlier process for reuse: their memory need not be taken again."""
        for name in self._files.names().difference(self._names.values()):
            if name.startswith(self._prefix):
                try:
                    self._take_back(name, self._attach(name))
                except OSError:
                    self._files.remove(name)

    def name_of(self, array: Array) -> str | None:
        """The file whose memory begins with the array; None where there is no such file."""
        return self._names.get(address(array))

    @property
    def count(self) -> int:
        """Files there are, lent or not."""
        return len(self._names)

    @property
    def idle_bytes(self) -> int:
        """Bytes of files that are lent to nobody."""
        return self.nbytes * len(self._idle)

    def trim(self, count: int) -> None:
        """Give back files that are lent to nobody, down to ``count`` files in all."""
        while len(self._names) > count:
            try:
                name, raw = self._idle.popleft()
            except IndexError:
                return
            del self._names[address(raw)]
            self._files.remove(name)

    def close(self) -> None:
        """Give every file back, and make none from now on; memory that someone still reads goes with its last view."""
        # First: whoever is making a file at the moment looks once the file is among the names (_create()).
        self._closed = True
        names, self._names = list(self._names.values()), {}
        self._idle.clear()
        for name in names:
            self._files.remove(name)

    def _create(self, count: int) -> list[tuple[str, _Raw]]:
        """New files. Raises OSError, MemoryError; Superseded where the pool was closed, be it meanwhile."""
        self._host.claim(count * self.nbytes)
        with ExitStack() as undo:
            undo.callback(self._host.budget.give_back, count * self.nbytes)
            made = self._files.create(self.nbytes, self._prefix, count)
            undo.pop_all()
        for each in made:
            self._know(each)
        if self._closed:
            self.close()
            raise Superseded("the memory of the run was given back meanwhile", retry_after=0.0)
        return [(each.name, each.raw) for each in made]

    def _know(self, file: _Mapped) -> None:
        """A file that is counted in the budget until its memory goes."""
        self._names[address(file.raw)] = file.name
        weakref.finalize(file.raw, self._host.budget.give_back, self.nbytes).atexit = False

    def _attach(self, name: str) -> _Raw:
        file = self._files.attach(name, self.nbytes)
        # Without asking: the memory is taken already.
        self._host.budget.count(self.nbytes)
        self._know(file)
        return file.raw

    def _lent(self, name: str, raw: _Raw) -> Array:
        # As HostPool: a fresh array over the memory, whose death brings the memory back.
        lent = lent_over(raw)
        weakref.finalize(lent, self._take_back, name, raw).atexit = False
        return lent

    def _take_back(self, name: str, raw: _Raw) -> None:
        # Runs wherever the last reference dies, perhaps inside a locked region: it must not lock (append is atomic).
        if not self._closed:
            self._idle.append((name, raw))
