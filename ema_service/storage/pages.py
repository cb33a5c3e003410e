"""Pages of files in memory: taken, mapped, and huge ones where the kernel has them.

A page of 2 MiB in place of 512 small ones is taken and mapped ten times as fast (1 GiB in 0.06 s and not in 0.5), and
averaging in such pages takes a third less time. To files on tmpfs the kernel gives none by itself (shmem_enabled is
"never" nearly everywhere), but it makes one of small pages when it is asked to: madvise(2), MADV_COLLAPSE.

Knows descriptors of files, libc's mmap and madvise, and the kernel's setting. Does not know folders, names, or what
lies in a file.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["mapped", "taken", "use_pages"]

#: madvise(2), since Linux 5.14 and 6.1: Python has no names for them.
_POPULATE_WRITE = 23
_COLLAPSE = 25
#: Bytes of pages mapped at a time: meanwhile no other thread can map memory.
_AT_ONCE = 64 << 20
#: The kernel may have to move other memory first, to have huge pages. Where that takes longer, the rest is small.
_SLOW_SECONDS = 0.25
_SLOW_BYTES_A_SECOND = 1 << 30

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_longlong,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value
_PROT_NONE = 0
_MAP_FIXED = 0x10

_Pages = npt.NDArray[np.uint8]


def taken(descriptor: int, nbytes: int, *, in_memory: bool) -> _Pages:
    """All pages of a new file of this size, taken and mapped: a full file system is an error now and no signal later.

    in_memory: whether the file lies on tmpfs, where huge pages are asked for. Raises OSError.
    """
    os.ftruncate(descriptor, max(nbytes, 1))
    raw = mapped(descriptor, nbytes)
    if in_memory:
        _take_huge_pages(descriptor, raw)
    os.posix_fallocate(descriptor, 0, max(nbytes, 1))
    return raw


def mapped(descriptor: int, nbytes: int) -> _Pages:
    """A file's pages as an array, unmapped with the last view of it. Raises OSError.

    By libc and not by Python's mmap, which would keep a descriptor for each file: runs are many, descriptors are few.
    """
    size, huge = max(nbytes, 1), _huge_page_bytes()
    if not huge or size < huge:
        address = room = _map(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor)
        return np.asarray(_Mapping((room, size), address, nbytes))
    # A huge page is mapped as one only at a multiple of its size.
    room = _map(None, size + huge, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    reserved = _Mapping((room, size + huge), -(-room // huge) * huge, nbytes)
    _map(reserved.address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, descriptor)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Where the file system was mounted with huge=advise; elsewhere nothing.
        _libc.madvise(reserved.address, size, mmap.MADV_HUGEPAGE)
    # The array refers to the mapping, and so does every view of the array.
    return np.asarray(reserved)


def use_pages(files: list[_Pages]) -> None:
    """Have all pages of new files mapped: one by one, as they are first written, takes twice as long, and a push waits.

    An older kernel does nothing.
    """
    while files:
        raw = files.pop(0)
        for start in range(0, raw.nbytes, _AT_ONCE):
            size = min(_AT_ONCE, raw.nbytes - start)
            if _libc.madvise(raw.ctypes.data + start, size, _POPULATE_WRITE):
                return


# --------------------------------------------------------------------------------------------------------------------


def _take_huge_pages(descriptor: int, raw: _Pages) -> None:
    """Take a new file's memory in huge pages, as far as the kernel soon has them.

    Raises OSError where the file system is full.
    """
    huge = _huge_page_bytes()
    whole = raw.nbytes // huge * huge if huge else 0
    begin = time.monotonic()
    for start in range(0, whole, _AT_ONCE):
        stop = min(start + _AT_ONCE, whole)
        for page in range(start, stop, huge):
            # Of nothing the kernel makes no huge page. Taken, not written to: where there is no room that is a signal.
            os.posix_fallocate(descriptor, page, mmap.PAGESIZE)
        if _libc.madvise(raw.ctypes.data + start, stop - start, _COLLAPSE):
            return
        if time.monotonic() - begin > _SLOW_SECONDS + stop / _SLOW_BYTES_A_SECOND:
            return


@functools.cache
def _huge_page_bytes() -> int:
    """0 where the system has no huge pages, or whoever keeps it has turned them off for all memory."""
    try:
        if "[never]" in (_HUGE_PAGES / "enabled").read_text():
            return 0
        return int((_HUGE_PAGES / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0


def _map(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    """mmap(2). Raises OSError."""
    found: int | None = _libc.mmap(address, size, protection, flags, descriptor, 0)
    if found == _FAILED or found is None:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return found


class _Mapping:
    """Mapped pages from ``address`` on, for numpy; ``room``, address and size, is unmapped when nothing refers here."""

    def __init__(self, room: tuple[int, int], address: int, nbytes: int) -> None:
        self._room = room
        self.address = address
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}

    def __del__(self) -> None:
        _libc.munmap(*self._room)
