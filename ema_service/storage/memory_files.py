"""Memory files: memory that outlives the process, because it is a file on a file system in memory (tmpfs).

A file's pages are mapped once and read and written as memory; nothing is copied and nothing is written to a disk. What
lies in the file survives the process by any death, and the machine's by none.

    ram-dir/                       0700, this user's own
        <hash of the data dir>/    0700
            owner                  names the data dir, and a nonce of this folder; locked while a server runs
            <random name>          0600; one arena each

Nobody else's folder, link or file is ever opened: each is looked at through the descriptor that is used. Memory is
taken when a file is made: a page that cannot be had later would end the process by SIGBUS, so a file system or a
control group without room is a refusal then.

Knows folders, descriptors and mapped memory. Does not know arenas, runs, or which file counts (rows of the catalog say
so).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import mmap
import os
import secrets
import stat
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ema_service.machine_memory import memory_room
from ema_service.storage.mounts import file_system

__all__ = ["DEFAULT_RAM_DIR", "MappedFile", "MemoryFiles", "MemoryFilesUnusable"]

_log = logging.getLogger(__name__)

#: On Linux a file system in memory that every user may make folders in.
_SHARED_MEMORY = Path("/dev/shm")
DEFAULT_RAM_DIR = _SHARED_MEMORY / f"ema-service-{os.geteuid()}"
#: Other names for a folder that somebody else has taken.
_MOST_SUFFIXES = 8
_OWNER = "owner"
#: madvise(2), since Linux 5.14: Python has no name for it.
_POPULATE_WRITE = 23
#: Bytes of pages mapped at a time: meanwhile no other thread can map memory.
_POPULATED_AT_ONCE = 64 << 20
#: Left to the rest of the process and to the kernel when memory is taken for files.
_SPARE_BYTES = 64 << 20

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


class MemoryFilesUnusable(OSError):
    """There is no folder for memory files, or no room in it: says why."""


@dataclass(frozen=True, slots=True)
class MappedFile:
    """A file's pages as memory. ``raw``: a uint8 array that keeps them mapped while it, or a view of it, lives."""

    name: str
    raw: npt.NDArray[np.uint8]


class MemoryFiles:
    """The memory files of one data dir. Thread-safe.

    nonce: tells this folder from one that was made later in the same place. folder: where the files lie.
    """

    def __init__(self, data_dir: Path, ram_dir: Path | None = None) -> None:
        """Open or make the folder of this data dir. ram_dir: None for a folder of this user's own in shared memory.

        Raises MemoryFilesUnusable where there is none to be had, or another server uses it.
        """
        self._data_dir = data_dir.resolve()
        #: Held while room is looked for and taken.
        self._creating = threading.Lock()
        try:
            parent = _own_folder(ram_dir or DEFAULT_RAM_DIR)
            try:
                _sweep(parent, ram_dir or DEFAULT_RAM_DIR)
                name = hashlib.sha256(os.fsencode(self._data_dir)).hexdigest()[:16]
                self._descriptor = _own_folder(name, at=parent)
            finally:
                os.close(parent)
        except OSError as fault:
            raise MemoryFilesUnusable(f"no folder for memory files: {fault.strerror}: {fault.filename}") from fault
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, self._descriptor)
            try:
                self._owner, self.nonce = self._claim()
                self.folder = Path(f"/proc/self/fd/{self._descriptor}").readlink()
            except OSError as fault:
                raise MemoryFilesUnusable(f"no folder for memory files: {fault}") from fault
            undo.pop_all()
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            found = file_system(self.folder)
            self._tmpfs = found.in_memory
            if found.shared:
                raise MemoryFilesUnusable(
                    f"{self.folder} is on a network's file system ({found.kind}), which is no memory of this machine"
                )
            undo.pop_all()

    @property
    def writes_to_disk(self) -> bool:
        """Whether the folder lies on a disk after all: then the kernel writes to it, when it sees fit."""
        return not self._tmpfs

    def room(self) -> int:
        """Bytes that can be taken for files now."""
        found = os.fstatvfs(self._descriptor)
        free = found.f_bavail * found.f_frsize
        return max(0, min(free, memory_room() - _SPARE_BYTES) if self._tmpfs else free)

    def create(self, nbytes: int, prefix: str = "", count: int = 1) -> list[MappedFile]:
        """New files of this size, all of their memory taken: ``count`` of them, or none.

        Raises MemoryFilesUnusable where there is no room.
        """
        with self._creating:
            if nbytes * count > (room := self.room()):
                raise MemoryFilesUnusable(
                    errno.ENOSPC,
                    f"{nbytes * count} bytes of memory files are needed, {self.folder} has room for {room}",
                )
            # The kernel clears the pages of a file on one core: 0.3 s a GiB.
            with ThreadPoolExecutor(min(count, os.cpu_count() or 1), "ema-create") as threads:
                creating = [threads.submit(self._create, nbytes, prefix) for _ in range(count)]
            with contextlib.ExitStack() as undo:
                for each in creating:
                    if each.exception() is None:
                        undo.callback(self.remove, each.result().name)
                made = [each.result() for each in creating]
                undo.pop_all()
        if self._tmpfs:
            # The last one is lent first.
            pages = [each.raw for each in reversed(made)]
            threading.Thread(target=_use_pages, args=(pages,), name="ema-pages", daemon=True).start()
        return made

    def _create(self, nbytes: int, prefix: str) -> MappedFile:
        name = prefix + secrets.token_hex(8)
        descriptor = os.open(
            name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self._descriptor
        )
        with contextlib.ExitStack() as undo:
            undo.callback(self.remove, name)
            try:
                # The file's pages are taken here; a full file system is an error now and no signal later.
                os.posix_fallocate(descriptor, 0, max(nbytes, 1))
                raw = _map(descriptor, nbytes)
            except OSError as fault:
                raise MemoryFilesUnusable(
                    fault.errno, f"{nbytes} bytes of memory files could not be taken in {self.folder}: {fault.strerror}"
                ) from fault
            finally:
                os.close(descriptor)
            undo.pop_all()
        return MappedFile(name, raw)

    def attach(self, name: str, nbytes: int) -> MappedFile:
        """The file of this name, with what it holds. Raises OSError where it is not there, or not ours, or cut."""
        descriptor = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._descriptor)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                raise OSError(errno.EPERM, f"{self.folder / name} is no file of this user")
            if found.st_size != max(nbytes, 1) or found.st_blocks * 512 < nbytes:
                raise OSError(errno.EIO, f"{self.folder / name} has {found.st_size} bytes, not {nbytes}")
            return MappedFile(name, _map(descriptor, nbytes))
        finally:
            os.close(descriptor)

    def remove(self, name: str) -> None:
        """Remove a file; its memory goes back once nothing maps it. One that is gone is no error."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def names(self) -> set[str]:
        """The files that are there."""
        return set(os.listdir(self._descriptor)) - {_OWNER}  # noqa: PTH208 - of a descriptor

    def sweep(self, keep: Collection[str]) -> int:
        """Remove every file that is not to be kept. Returns how many were removed."""
        stray = self.names().difference(keep)
        for name in stray:
            self.remove(name)
        return len(stray)

    def close(self) -> None:
        """Let go of the folder; remove it where it holds no file."""
        if not self.names():
            with contextlib.suppress(OSError):
                os.unlink(_OWNER, dir_fd=self._descriptor)
                self.folder.rmdir()
        os.close(self._owner)
        os.close(self._descriptor)

    def _claim(self) -> tuple[int, str]:
        """Lock the folder's owner file, made if it is not there; the answer is its descriptor, and the nonce in it.

        Raises OSError where another process has it.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        owner = os.open(_OWNER, flags, 0o600, dir_fd=self._descriptor)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, owner)
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            said = _read_owner(owner)
            if said.get("data_dir") != str(self._data_dir) or not isinstance(said.get("nonce"), str):
                said = {"data_dir": str(self._data_dir), "nonce": secrets.token_hex(16)}
                os.ftruncate(owner, 0)
                os.pwrite(owner, json.dumps(said).encode(), 0)
                self.sweep(())
            undo.pop_all()
        return owner, str(said["nonce"])


def _own_folder(path: Path | str, at: int | None = None) -> int:
    """A descriptor of a folder that is this user's alone, made if it is not there.

    Where somebody else has the name, another is taken. Raises OSError.
    """
    for attempt in range(_MOST_SUFFIXES):
        name = f"{path}-{attempt}" if attempt else str(path)
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=at)
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
        except OSError as fault:
            if fault.errno in (errno.ELOOP, errno.ENOTDIR, errno.EACCES):
                continue  # a link, a file, or a folder of somebody else's
            raise
        found = os.fstat(descriptor)
        if found.st_uid == os.geteuid() and not found.st_mode & 0o077:
            return descriptor
        os.close(descriptor)
    raise OSError(errno.EPERM, "the place is taken by somebody else, or others may write to it", str(path))


def _sweep(parent: int, shown: Path) -> None:
    """Remove the folders of data dirs that are gone: nobody may find gigabytes held by a server that is no more."""
    for name in os.listdir(parent):
        try:
            folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except OSError:
            continue
        try:
            _remove_if_left_behind(folder, name, parent, shown)
        except OSError as fault:
            _log.warning("cannot look after %s: %s", shown / name, fault)
        finally:
            os.close(folder)


def _remove_if_left_behind(folder: int, name: str, parent: int, shown: Path) -> None:
    if os.fstat(folder).st_uid != os.geteuid():
        return
    try:
        owner = os.open(_OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return  # being made just now
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        data_dir = _read_owner(owner).get("data_dir")
        if isinstance(data_dir, str) and not (Path(data_dir) / "catalog.db").exists():
            for each in os.listdir(folder):
                os.unlink(each, dir_fd=folder)
            os.rmdir(name, dir_fd=parent)
            _log.info("removed %s: its data dir %s is gone", shown / name, data_dir)
    except BlockingIOError:
        return  # its server runs
    finally:
        os.close(owner)


def _read_owner(descriptor: int) -> dict[str, object]:
    try:
        said = json.loads(os.pread(descriptor, 1 << 16, 0))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _map(descriptor: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """A file's pages as an array, unmapped with the last view of it. Raises OSError.

    By libc and not by Python's mmap, which would keep a descriptor for each file: runs are many, descriptors are few.
    """
    size = max(nbytes, 1)
    address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Where the file system was mounted with huge=advise; elsewhere nothing.
        _libc.madvise(address, size, mmap.MADV_HUGEPAGE)
    # The array refers to the mapping, and so does every view of the array.
    return np.asarray(_Mapping(address, size, nbytes))


def _use_pages(files: list[npt.NDArray[np.uint8]]) -> None:
    """Have all pages of new files mapped: one by one, as they are first written, takes twice as long, and a push waits.

    An older kernel does nothing.
    """
    while files:
        raw = files.pop(0)
        for start in range(0, raw.nbytes, _POPULATED_AT_ONCE):
            size = min(_POPULATED_AT_ONCE, raw.nbytes - start)
            if _libc.madvise(raw.ctypes.data + start, size, _POPULATE_WRITE):
                return


class _Mapping:
    """Mapped pages, for numpy; unmapped when nothing refers to them."""

    def __init__(self, address: int, size: int, nbytes: int) -> None:
        self._pages = address, size
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}

    def __del__(self) -> None:
        _libc.munmap(*self._pages)
