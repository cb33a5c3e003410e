"""Files that appear whole or not at all (written to a temporary name, synced, renamed, the folder synced), and reading.

Knows paths and bytes. Does not know what the bytes mean, beyond the safetensors header in front of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

from ema_client.errors import MalformedBody
from ema_client.wire import LENGTH_BYTES, Header, parse_header, parse_length
from ema_service.storage.mounts import FileSystem, file_system

__all__ = [
    "CannotLock",
    "FolderLock",
    "FolderLocked",
    "TakenOver",
    "TensorFile",
    "file_name",
    "refuse_link",
    "remove_tree",
    "reserve_beyond",
    "sync_folder",
    "write_whole",
]

_log = logging.getLogger(__name__)

_TEMPORARY = ".tmp"
#: What fsync(2) of a folder says on file systems that have none: some of networks, and some of FUSE.
_SYNCS_NO_FOLDER = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
#: From fallocate(2).
_KEEP_SIZE = 1
#: Bytes of one write: enough to keep the page cache busy, without a whole model in one system call.
_WRITTEN_AT_ONCE = 8 << 20
#: Bytes of one read: still in the processor's cache when the caller hashes them.
_READ_AT_ONCE = 1 << 20


def file_name(average: str) -> str:
    """The name of the file of an average."""
    return f"{average}.safetensors"


def _anybody() -> None:
    pass


def write_whole(path: Path, chunks: Iterable[bytes | memoryview], hold: Callable[[], None] = _anybody) -> int:
    """Write a file that appears under its name only when every byte is on disk. Returns the file's size.

    hold: called before each chunk, as FolderLock.hold(). Raises OSError (no space, no permission), and whatever
    ``chunks`` and ``hold`` raise; then the temporary file is gone and ``path`` is as it was.
    """
    temporary = path.with_name(path.name + _TEMPORARY)
    with contextlib.ExitStack() as undo:
        undo.callback(temporary.unlink, missing_ok=True)
        temporary.unlink(missing_ok=True)
        with temporary.open("xb", buffering=0) as file:  # x: a new file; a link planted there is not followed
            written = sum(_write_all(file.fileno(), chunk, hold) for chunk in chunks)
            os.fsync(file.fileno())
        hold()
        temporary.replace(path)
        undo.pop_all()
    sync_folder(path.parent)
    return written


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder durable; file systems that sync no folders have them durable at once."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as fault:
        if fault.errno not in _SYNCS_NO_FOLDER:
            raise
    finally:
        os.close(descriptor)


def reserve_beyond(path: Path, nbytes: int) -> bool:
    """Have the file system keep ``nbytes`` beyond the end of a file for the file to grow into; its length stays.

    False where the file system has no room, or cannot do so.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:  # not Linux
        return False
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    with path.open("r+b") as file:
        return bool(fallocate(file.fileno(), _KEEP_SIZE, os.fstat(file.fileno()).st_size, nbytes) == 0)


def refuse_link(folder: Path, within: str = "") -> None:
    """Raises OSError where a symbolic link stands in the place of a run's folder: its target is not the server's.

    within: a path in the folder, no part of which may be a link either.
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
    """Remove a folder that no row speaks of; of a symbolic link, the link alone.

    A failure is logged: it costs disk space, never correctness.
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


def _write_all(descriptor: int, chunk: bytes | memoryview, hold: Callable[[], None]) -> int:
    rest = memoryview(chunk)
    while rest:
        hold()
        rest = rest[os.write(descriptor, rest[:_WRITTEN_AT_ONCE]) :]
    return len(chunk)


class TensorFile:
    """A safetensors file, open for reading. Reads are positional, so many threads may share the object.

    The file stays readable after its name was removed, until close(). name: the path, for messages. slow: whether
    reads wait for more than a disk.
    """

    slow = False

    def __init__(self, path: Path, data_bytes: int | None = None) -> None:
        """Opens the file and parses its header, or, where its data section is known to have ``data_bytes``, leaves
        that until the header is asked for: of many tensors it takes milliseconds.

        Raises FileNotFoundError, or MalformedBody where the file is not whole.
        """
        self._file = path.open("rb", buffering=0)
        with contextlib.ExitStack() as undo:
            undo.callback(self._file.close)
            self._measure(os.fstat(self._file.fileno()).st_size, data_bytes)
            undo.pop_all()

    def _measure(self, size: int, data_bytes: int | None = None) -> None:
        """Find where the data section begins. Raises OSError; MalformedBody unless the file has ``size`` bytes."""
        self.size = size
        self._data_begin = LENGTH_BYTES + parse_length(self._bytes(0, LENGTH_BYTES))
        expected = self._data_begin + (self.header.data_bytes if data_bytes is None else data_bytes)
        if size != expected:
            raise MalformedBody(f"{self.name} has {size} bytes, its header says {expected}")

    def _pread(self, buffer: memoryview, at: int) -> int:
        """Fill the beginning of ``buffer`` from byte ``at`` of the file on; how many bytes, 0 at the file's end."""
        return os.preadv(self._file.fileno(), [buffer], at)

    @cached_property
    def header(self) -> Header:
        """The file's header. Raises MalformedBody."""
        return parse_header(self._bytes(LENGTH_BYTES, self._data_begin))

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of the data section, in new memory. Raises OSError where the file ends before."""
        buffer = memoryview(bytearray(stop - start))
        self.read_into(buffer, start)
        return buffer

    def read_into(self, buffer: memoryview, start: int = 0) -> None:
        """Fill ``buffer`` from byte ``start`` of the data section on. Raises OSError where the file ends before."""
        self._fill(buffer, self._data_begin + start)

    def read_whole(self, buffer: memoryview) -> Iterator[memoryview]:
        """Fill ``buffer``, as long as the data section, and yield each piece while it is in the processor's cache.

        Raises OSError where the file ends before.
        """
        for start in range(0, len(buffer), _READ_AT_ONCE):
            piece = buffer[start : start + _READ_AT_ONCE]
            self.read_into(piece, start)
            yield piece

    def pieces(self) -> Iterator[memoryview]:
        """The bytes of the file from the first on, header and all; each piece is overwritten by the next.

        Raises OSError where the file ends before its size.
        """
        buffer = memoryview(bytearray(min(self.size, _READ_AT_ONCE)))
        for start in range(0, self.size, _READ_AT_ONCE):
            piece = buffer[: self.size - start]
            self._fill(piece, start)
            yield piece

    def _bytes(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the file; fewer where the file ends before."""
        buffer = memoryview(bytearray(stop - start))
        return bytes(buffer[: self._pread(buffer, start)])

    def _fill(self, buffer: memoryview, at: int) -> None:
        done = 0
        while done < len(buffer):
            count = self._pread(buffer[done:], at + done)
            if not count:
                raise OSError(f"{self.name} ends at byte {at + done}: it was cut short")
            done += count

    @property
    def name(self) -> str:
        """The path of the file, for messages."""
        return str(self._file.name)

    @property
    def identity(self) -> str:
        """A text that differs for each file ever written here, and is the same after a restart."""
        status = os.fstat(self._file.fileno())
        return f"{status.st_ino}-{status.st_mtime_ns}"

    def close(self) -> None:
        self._file.close()


class FolderLocked(OSError):
    """Another process has locked the data folder."""


class TakenOver(OSError):
    """A later process has the data folder: this one must not write there."""


class CannotLock(OSError):
    """The file system of the data folder has no locks."""


#: Bytes that a number takes at most; how far the numbers of two may be apart that begin at once; and leases for which
#: somebody is waited for who goes on: one that is cut off ends within one.
_NUMBER_BYTES, _APART, _PATIENCE = 64, 1 << 16, 2.0
#: How often in a lease the file is touched.
_TOUCHES = 10

#: A server that ends, however, lets go of its lock; a machine that is lost cannot.
_LOCK_OF_THE_DEAD = (
    ". If its machine is gone, the file server lets go of the lock by itself: with NFS 4 after about 90 seconds"
)


class FolderLock:
    """An exclusive lock on a folder (flock), which ends with the process.

    Both the folder and a file in it are locked: somebody may remove the file, and some network file systems lock no
    folder. path: the file. number: of this holder, larger than that of every earlier one; the file holds the number.

    Where a lock keeps nobody out the file does so, for holders with a lease. One that goes on touches the file now and
    then, writes its number there at its start alone, and writes elsewhere only while a look of the last half of its
    lease found that number (hold()). Another one watches until nobody has touched the file for half a lease, puts its
    own number there, and waits for a lease before it reads anything: by then an earlier one that was stopped, or cut
    off, has found the number or may not write. Of two that begin at once the last to write its number goes on.
    """

    def __init__(self, folder: Path, mounted: FileSystem | None = None, *, lease: float = 0.0, first: int = 1) -> None:
        """first: the number of a folder's first holder, or more. mounted: what the folder lies on. lease: seconds
        within which an earlier holder that was cut off, or that sees that it was taken over from, has ended itself;
        they are waited for where a lock does not keep that holder out. 0: no lease.

        Raises FolderLocked where another process holds the lock, or goes on with the folder, CannotLock.
        """
        mounted = mounted or file_system(folder)
        self.path = folder / "lock"
        self._folder = -1
        self._lease = lease
        #: What the file is to say, and when it was seen to, by time.monotonic().
        self._claimed, self._seen = 0, float("-inf")
        self._touches = bool(mounted.locks_are_local and lease)
        self._released = threading.Event()
        # Not truncated, and not for appending alone: the number of the earlier holder stands in it.
        self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0)
        try:
            with contextlib.ExitStack() as undo:
                undo.callback(self.release)
                self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _lock_folder(self._folder)
                undo.pop_all()
        except BlockingIOError:
            raise FolderLocked(
                f"another server uses the data dir {folder}: stop it, or give this one another --data-dir"
                + (_LOCK_OF_THE_DEAD if mounted.shared else "")
            ) from None
        except OSError as fault:
            raise CannotLock(
                f"the data dir {folder} cannot be locked on {mounted.kind or 'its file system'} ({fault.strerror}), so "
                "two servers could write to it at once: have it mounted with locks (of Lustre the option flock, of NFS "
                "its lock service), or give a --data-dir on a disk of this machine",
            ) from None
        if mounted.locks_are_local:
            _log.warning(
                "locks on %s keep out servers of this machine alone, as it is mounted: never start another server with "
                "this data dir on another machine meanwhile",
                folder,
            )
        with contextlib.ExitStack() as undo:
            undo.callback(self.release)
            if self._touches:
                self._await_silence(folder)
            self.number = self._take_number(first)
            if self._touches:
                threading.Thread(target=self._touch, name="ema-lock", daemon=True).start()
                time.sleep(lease)
                if self.taken_over():
                    raise FolderLocked(f"another server was started with the data dir {folder} at the same time")
            undo.pop_all()

    def _take_number(self, first: int) -> int:
        before = _number_in(os.pread(self._file.fileno(), _NUMBER_BYTES, 0))
        # Of two that begin at once, unseen by each other, each has another number.
        number = max(before + 1, first) + (secrets.randbelow(_APART) if self._touches else 0)
        self._claimed = before
        try:
            os.pwrite(self._file.fileno(), b"%d\n" % number, 0)
            os.fsync(self._file.fileno())
            self._claimed = number
        except OSError as fault:  # a full disk keeps no server from being read
            _log.warning(
                "a later server may have this one's number: %s cannot be written: %s", self.path, fault.strerror
            )
        return number

    def _await_silence(self, folder: Path) -> None:
        """Return once nobody has touched the file for half a lease. Raises FolderLocked where somebody goes on."""
        began = silent = time.monotonic()
        touched = self._touched()
        while time.monotonic() - silent < self._lease / 2:
            if time.monotonic() - began > _PATIENCE * self._lease:
                raise FolderLocked(f"another server uses the data dir {folder}, by what is written to {self.path}")
            time.sleep(self._lease / 20)
            if (now := self._touched()) != touched:
                touched, silent = now, time.monotonic()

    def _touch(self) -> None:
        """Touch the file until the lock is released, or another holder is there."""
        while not (self._released.wait(self._lease / _TOUCHES) or self.taken_over()):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _touched(self) -> int:
        """When the file was touched last. Opened for it: network file systems look at the server then."""
        with self.path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns

    def taken_over(self) -> bool:
        """Whether a later holder has the folder: the file is read anew, as another machine may have written it."""
        began = time.monotonic()
        try:
            found = _number_in(self.path.read_bytes())
            later = found not in (0, self._claimed) if self._touches else found > self._claimed
        except FileNotFoundError:  # nobody came: whoever does makes the file
            later = False
        except OSError:
            return False
        self._seen = self._seen if later else began
        return later

    def hold(self) -> None:
        """Return while this process may write to the folder: whoever comes later waits until it may not. To be called
        before each write. Raises TakenOver, OSError; nothing of a holder without a lease."""
        if not self._lease or time.monotonic() - self._seen < self._lease / 2:
            return
        if self.taken_over():
            raise TakenOver(errno.EBUSY, "a later server has the data dir")
        if time.monotonic() - self._seen >= self._lease / 2:
            raise OSError(errno.EIO, f"{self.path}, which tells whether a later server has the data dir, is not read")

    def release(self) -> None:
        self._released.set()
        self._file.close()
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1


def _number_in(content: bytes) -> int:
    """The number in a lock's file: 0 where there is none, as before the first holder."""
    digits = content.strip()
    return int(digits) if digits.isdigit() else 0


def _lock_folder(descriptor: int) -> None:
    """Lock a folder itself. Raises BlockingIOError where another process has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as fault:
        _log.info("the data dir itself cannot be locked, only the file in it: %s", fault)
