"""The pool of host memory: buffers that are lent, come back by themselves, and are lent again; page-locked for a GPU.

A host buffer is recycled by reference: the pool lends a fresh array object over the memory, every view (memoryview,
torch tensor, bytes still queued in a socket's transport) keeps that object alive, and its death returns the memory.
There is no release call to forget or to make too early.

Knows bytes, page locks and how much memory there is. Does not know arenas, layouts or what a buffer is for.
"""

from __future__ import annotations

import logging
import mmap
import queue
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import numpy as np

from ema_service.machine_memory import memory_room
from ema_service.memory.budget import Budget
from ema_service.values import Array

__all__ = ["HostPool", "lent_over"]

_log = logging.getLogger(__name__)

#: Bytes of new memory from which on the machine is asked first: a look takes 0.1 ms.
_ASKED_FROM = 16 << 20
#: Left to the rest of the machine, or of the control group.
_SPARE_BYTES = 64 << 20

_Raw = Array  # uint8; owns, or keeps alive, pooled memory


def lent_over(raw: Array) -> Array:
    """A fresh array over the memory of ``raw``, uint8, which every view of the memory refers to.

    numpy lets a view of a view refer to the first array; a memoryview in between has it refer to the fresh one.
    """
    return np.asarray(raw.data)


class HostPool:
    """Host memory, reused: page faults cost more than copies (2.3 GB/s into fresh pages, 14 into warm ones).

    Thread-safe.

    pinned_for: a GPU for which memory is page-locked, so that it copies from and to the memory at full speed.
    keep_bytes: most idle memory that stays for reuse; memory that comes back beyond goes to the system.
    budget: of all memory of the host, this pool's and others'; idle memory is given up before the budget says no.
    """

    def __init__(self, *, pinned_for: str | None = None, keep_bytes: int = 0, budget: Budget | None = None) -> None:
        self.budget = budget or Budget(sys.maxsize)
        self._keep_bytes = keep_bytes
        self._idle: dict[int, deque[_Raw]] = {}
        #: By size: when memory of the size was last lent or came back, by time.monotonic().
        self._used: dict[int, float] = {}
        self._lock = threading.Lock()
        self._locks = None if pinned_for is None else _PageLocks(pinned_for)

    def lend(self, nbytes: int) -> Array:
        """A uint8 array of ``nbytes`` with arbitrary content, the caller's until its last view is gone.

        Raises MemoryError where the budget, or the machine, has no room.
        """
        with self._lock:
            idle = self._idle.setdefault(nbytes, deque())
            self._used[nbytes] = time.monotonic()
        try:
            raw = idle.pop()
        except IndexError:
            # Memory of a size that is in use is worth more than of a size that was.
            while nbytes <= self._keep_bytes < self.idle_bytes + nbytes and self._drop_oldest():
                pass
            self.claim(nbytes)
            raw = self._allocate(nbytes)
        lent = lent_over(raw)
        weakref.finalize(lent, self._take_back, raw).atexit = False
        return lent

    def claim(self, nbytes: int) -> None:
        """Take ``nbytes`` of the budget for new memory, for which idle memory is given up. Raises MemoryError."""
        while True:
            room = memory_room() - _SPARE_BYTES if nbytes >= _ASKED_FROM else nbytes
            if nbytes <= room and self.budget.take(nbytes):
                return
            if not self._drop_oldest():
                break
            if self._locks:
                self._locks.settle()
        if nbytes > room:
            raise MemoryError(f"the machine, or this server's control group, has {max(room, 0)} bytes left")
        raise MemoryError(f"{self.budget.used} of {self.budget.limit} bytes are in use (--memory-limit)")

    def trim(self, seconds: float) -> None:
        """Let the system have idle memory of sizes that nobody lent or gave back for so long."""
        before = time.monotonic() - seconds
        for nbytes, used in list(self._used.items()):
            if used < before:
                self._drop(nbytes)

    def _drop_oldest(self) -> bool:
        """Let the system have the idle memory of the size that was used least recently; False where none is idle."""
        oldest_first = sorted(self._used.items(), key=lambda item: item[1])
        return any(self._drop(nbytes) for nbytes, _ in oldest_first)

    def _drop(self, nbytes: int) -> bool:
        """Let the system have all idle memory of a size; False where none is idle."""
        idle = self._idle[nbytes]
        had_some = bool(idle)
        idle.clear()
        return had_some

    @property
    def idle_bytes(self) -> int:
        """Bytes that stay for reuse and are lent to nobody."""
        return sum(nbytes * len(idle) for nbytes, idle in list(self._idle.items()))

    def _take_back(self, raw: _Raw) -> None:
        """Make the memory of a dead array idle again, or let the system have it."""
        # Runs wherever the last reference to the array dies, perhaps inside a locked region: it must not lock
        # (deque.append is atomic).
        if self.idle_bytes + raw.nbytes <= self._keep_bytes:
            self._used[raw.nbytes] = time.monotonic()
            self._idle[raw.nbytes].append(raw)

    def _allocate(self, nbytes: int) -> _Raw:
        """Fresh memory that was claimed, in huge pages where the system has them."""
        with ExitStack() as undo:
            undo.callback(self.budget.give_back, nbytes)
            # MAP_PRIVATE: shared memory, mmap's default, gets no huge pages.
            region = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            raw = np.frombuffer(region, dtype=np.uint8, count=nbytes)
            weakref.finalize(raw, self.budget.give_back, nbytes).atexit = False
            undo.pop_all()
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel that was built without huge pages
                region.madvise(mmap.MADV_HUGEPAGE)
        if self._locks and nbytes:
            self._locks.lock(raw, region)
        return raw


class _PageLocks:
    """Page-locks memory for as long as an array over the memory lives, and unlocks it on a thread.

    Unlocking waits for the device, and an array may die anywhere: on the event loop, in a garbage collection.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        # Takes no lock that a garbage collection within put() would wait for.
        self._dead: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def lock(self, raw: _Raw, region: mmap.mmap) -> None:
        """Page-lock an array's memory, the whole of ``region``. A failure is logged: copies are slower then.

        Not by torch, whose pinned memory takes the next power of two, and 0.42 s for 1 GiB where cudaHostRegister takes
        0.23 (16 cores, H200).
        """
        import torch

        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = raw.ctypes.data
        code = int(runtime.cudaHostRegister(address, raw.nbytes, 0))
        if code:
            _log.warning("%d bytes could not be page-locked (CUDA error %d): copies of them are slower", len(raw), code)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._unlock, name="ema-unlock", daemon=True)
            self._thread.start()
        # The region lives until the memory is unlocked.
        weakref.finalize(
            raw, self._dead.put, partial(_unlock_pages, runtime, self._device, address, region)
        ).atexit = False

    def settle(self) -> None:
        """Return once the memory of every array that is dead is unlocked."""
        if self._thread is not None:
            done = threading.Event()
            self._dead.put(done.set)
            done.wait()

    def _unlock(self) -> None:
        while True:
            self._dead.get()()


def _unlock_pages(runtime: Any, device: str, address: int, region: mmap.mmap) -> None:  # noqa: ARG001 - mapped until then
    """Unlock a dead array's memory."""
    import torch

    try:
        # The device may still be copying a push that was dropped.
        torch.cuda.synchronize(device)
    except RuntimeError as fault:
        _log.error("the device failed before memory was unlocked: %s", fault)
    runtime.cudaHostUnregister(address)
