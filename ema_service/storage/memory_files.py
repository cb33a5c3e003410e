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

Knows folders, names and room. Does not know pages (pages), arenas, runs, or which file counts (rows of the catalog say
so).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import stat
import threading
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ema_service.machine_memory import memory_room
from ema_service.storage.mounts import file_system
from ema_service.storage.pages import mapped, taken, use_pages

__all__ = ["DEFAULT_RAM_DIR", "MappedFile", "MemoryFiles", "MemoryFilesUnusable"]

_log = logging.getLogger(__name__)

#: On Linux a file system in memory that every user may make folders in.
_SHARED_MEMORY = Path("/dev/shm")
DEFAULT_RAM_DIR = _SHARED_MEMORY / f"ema-service-{os.geteuid()}"
#: Other names for a folder that somebody else has taken.
_MOST_SUFFIXES = 8
_OWNER = "owner"
#: Left to the rest of the process and to the kernel when memory is taken for files.
_SPARE_BYTES = 64 << 20
#: For as long a folder is tried for: another server may be looking after it, or removing it, as one of a data dir that
#: is gone.
_PATIENCE_SECONDS = 3.0


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
        name = hashlib.sha256(os.fsencode(self._data_dir)).hexdigest()[:16]
        try:
            parent = _own_folder(ram_dir or DEFAULT_RAM_DIR)
            try:
                _sweep(parent, ram_dir or DEFAULT_RAM_DIR)
                self._take(name, parent)
                self.folder = Path(f"/proc/self/fd/{self._descriptor}").readlink()
            finally:
                os.close(parent)
        except OSError as fault:
            raise MemoryFilesUnusable(f"no folder for memory files: {fault}") from fault
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
            # The kernel clears the pages of a file on one core: small ones take 0.3 s a GiB.
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
            threading.Thread(target=use_pages, args=(pages,), name="ema-pages", daemon=True).start()
        return made

    def _create(self, nbytes: int, prefix: str) -> MappedFile:
        name = prefix + secrets.token_hex(8)
        descriptor = os.open(
            name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self._descriptor
        )
        with contextlib.ExitStack() as undo:
            undo.callback(self.remove, name)
            try:
                raw = taken(descriptor, nbytes, in_memory=self._tmpfs)
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
            return MappedFile(name, mapped(descriptor, nbytes))
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

    def _take(self, name: str, parent: int) -> None:
        """Open and claim the folder of this name, made if it is not there. Raises OSError where another server has it,
        and not for a moment only."""
        until = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                self._descriptor = _own_folder(name, at=parent)
                with contextlib.ExitStack() as undo:
                    undo.callback(os.close, self._descriptor)
                    self._owner, self.nonce = self._claim()
                    undo.pop_all()
            except (BlockingIOError, FileNotFoundError) as fault:
                if time.monotonic() >= until:
                    raise OSError(fault.errno, "another server has the folder of this data dir", name) from fault
                time.sleep(0.01)
            else:
                return

    def _claim(self) -> tuple[int, str]:
        """Lock the folder's owner file, made if it is not there; the answer is its descriptor, and the nonce in it.

        Raises BlockingIOError where another process has it, FileNotFoundError where one has removed the folder.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        owner = os.open(_OWNER, flags, 0o600, dir_fd=self._descriptor)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, owner)
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(owner).st_nlink:
                raise FileNotFoundError(errno.ENOENT, "the folder was removed meanwhile")
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
        if not _gone_data_dir(owner):
            return  # not locked: the lock would be in the way of a server that starts just now
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if data_dir := _gone_data_dir(owner):
            for each in os.listdir(folder):
                os.unlink(each, dir_fd=folder)
            os.rmdir(name, dir_fd=parent)
            _log.info("removed %s: its data dir %s is gone", shown / name, data_dir)
    except BlockingIOError:
        return  # its server runs
    finally:
        os.close(owner)


def _gone_data_dir(owner: int) -> str | None:
    """The data dir that an owner file names, where it is gone."""
    data_dir = _read_owner(owner).get("data_dir")
    return data_dir if isinstance(data_dir, str) and not (Path(data_dir) / "catalog.db").exists() else None


def _read_owner(descriptor: int) -> dict[str, object]:
    try:
        said = json.loads(os.pread(descriptor, 1 << 16, 0))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
