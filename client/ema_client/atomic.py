"""Atomic writes: a file appears under its name when the file is whole, or not at all.

A file on its way has no name where the system has such files (O_TMPFILE, on Linux's own file systems), so that nothing
is left of a process that was killed. Elsewhere, on a network's file system or macOS, the file stands beside its place
under a stable hidden name, which the next attempt takes over.

A file that open_kept() writes has a name from the beginning: what a process that was ended has written of it is there
for the next process, which asks for a file of the same content.

Knows: names beside a file, links, what is no plain file. Does not know: what is written. No tensors, no network.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ema_client.errors import TransportError, UsageError

__all__ = ["Kept", "move_whole", "open_kept", "open_whole", "whole_file"]

#: What open() of a file without a name says where the file system, or the kernel, has no such files.
_HAS_NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR)
#: Where a process finds its open files by number, on Linux.
_OPEN_FILES = Path("/proc/self/fd")
#: Hexadecimal digits that name the content of a file which a later process may go on with.
_CONTENT = 16
_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


@contextlib.contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """A file for the block to write and read; at the block's end the file takes the place of ``path``.

    A block that raises leaves ``path`` as before. Of a link, the file that the link names is replaced; an older file's
    permissions stay. Raises UsageError where ``path`` is no plain file, OSError where no file can be made there.
    """
    target = _plain(path)
    part, file = _begun(target)
    with file, contextlib.ExitStack() as undo:
        # While the file is open, and thereby locked: a name that another process has taken over is not removed.
        undo.callback(part.unlink, missing_ok=True)
        _take_permissions(file, target)
        yield file
        file.flush()
        if os.fstat(file.fileno()).st_nlink == 0:
            _name(file, part)
        else:
            # A network's file system may tell of a full disk no sooner.
            os.fsync(file.fileno())
        part.replace(target)
        undo.pop_all()


class Kept:
    """A file on its way that a later process may go on with.

    file: stands at the end of what an earlier process wrote. content: what names the file's content, 16 hexadecimal
    digits; of a file that is new, no content's.
    """

    def __init__(self, target: Path, part: Path, file: BinaryIO) -> None:
        self._target = target
        self.part = part
        self.file = file

    @property
    def content(self) -> str:
        return self.part.name.removesuffix(".part")[-_CONTENT:]

    def rename(self, content: str) -> None:
        """Say of which content the file is, from its beginning."""
        self.part = self.part.rename(_hidden(self._target, content))


@contextlib.contextmanager
def open_kept(path: Path) -> Iterator[Kept]:
    """A file to write on from where an earlier process stopped; at the block's end it takes the place of ``path``.

    A TransportError in the block, and an end of the process that is no exception (kill -9), leave what was written for
    the next process, as one hidden file beside ``path``. Any other exception, Ctrl-C among them, leaves nothing.
    Raises UsageError where ``path`` is no plain file, OSError where no file can be made there.
    """
    target = _plain(path)
    new, kept = _new_part(target), None
    try:
        found = _kept_before(target)
        while not (found := found or _locked(new)):
            new = _new_part(target)
        part, file = found
        with file:
            file.seek(0, os.SEEK_END)
            kept = Kept(target, part, file)
            yield kept
            file.flush()
            os.fsync(file.fileno())
            _take_permissions(file, target)
            kept.part.replace(target)
    except TransportError:
        raise
    except BaseException:
        # Also where the exception came while the file was made, before anything knew of it.
        (kept.part if kept else new).unlink(missing_ok=True)
        raise


def _kept_before(target: Path) -> tuple[Path, BinaryIO] | None:
    """What an earlier process has left of a file for ``target``, the newest; older ones, of no use, are removed."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{{_CONTENT}}}\.part\Z")
    parts = [each for each in target.parent.iterdir() if name.match(each.name)]
    newest: tuple[Path, BinaryIO] | None = None
    for part in sorted(parts, key=_written, reverse=True):
        begun = _taken_over(part, anew=False)
        if begun and newest:
            part.unlink(missing_ok=True)
            begun[1].close()
        newest = newest or begun
    return newest


def _written(part: Path) -> float:
    try:
        return part.stat().st_mtime
    except FileNotFoundError:
        # Another process has put it in its place meanwhile.
        return 0.0


def _new_part(target: Path) -> Path:
    return _hidden(target, secrets.token_hex(_CONTENT // 2))


def _locked(part: Path) -> tuple[Path, BinaryIO] | None:
    """The new file ``part``; None where another process has found the file before it was locked: that one goes on with
    it, or has removed it."""
    _, file = _made(part)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        return part, file  # without locks, as on some network's file systems, two may each find the other's part
    if not _is_at(part, file):
        file.close()
        return None
    return part, file


def _is_at(part: Path, file: BinaryIO) -> bool:
    """Whether the open file is the one at this place."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), part.stat())
    return False


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A hidden path beside ``path`` for a few bytes that the block writes at once; that file then takes the place.

    For what writes by path. As open_whole(), but a process that is killed within the block leaves the hidden file.
    """
    target = _plain(path)
    part = _hidden(target, secrets.token_hex(4))
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def move_whole(whole: Path, path: Path) -> None:
    """Let the file ``whole`` take the place of ``path``, as at the end of open_whole()."""
    whole.replace(_plain(path))


def _plain(path: Path) -> Path:
    """The place of a plain file, or of none yet, that ``path`` names, directly or by links."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        kind = stat.S_IFREG
    if kind != stat.S_IFREG:
        raise UsageError(
            f"{path} is {_KINDS.get(kind, 'no plain file')}, which a file would replace; nothing was written",
            hint="give the name of a file",
        )
    return Path(os.path.realpath(path))


def _begun(target: Path) -> tuple[Path, BinaryIO]:
    """An empty file for what will be ``target``, and the hidden name, beside the target, that the file has or gets."""
    unnamed = getattr(os, "O_TMPFILE", None)
    if unnamed is not None and _OPEN_FILES.exists():
        try:
            descriptor = os.open(target.parent, unnamed | os.O_RDWR, 0o666)
        except OSError as fault:
            if fault.errno not in _HAS_NO_NAMELESS:
                raise
        else:
            return _hidden(target, secrets.token_hex(4)), os.fdopen(descriptor, "w+b")
    return _taken_over(_hidden(target)) or _made(_hidden(target, secrets.token_hex(4)))


def _take_permissions(file: BinaryIO, target: Path) -> None:
    """Give the file the permissions of the older file at ``target``, if there is an older file."""
    if target.exists():
        mode = stat.S_IMODE(target.stat().st_mode)
        # A file system without permissions refuses to be asked for them.
        if mode != stat.S_IMODE(os.fstat(file.fileno()).st_mode):
            os.fchmod(file.fileno(), mode)


def _hidden(target: Path, *tokens: str) -> Path:
    return target.with_name(".".join(("", target.name, *tokens, "part")))


def _taken_over(part: Path, *, anew: bool = True) -> tuple[Path, BinaryIO] | None:
    """The file ``part`` where no other process writes to it (each holds a lock); otherwise None. anew: emptied."""
    file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The writer before may have put the file in its place since it was opened here.
        ours = _is_at(part, file)
    except OSError:
        ours = False
    if not ours:
        file.close()
        return None
    if anew:
        file.truncate()
    return part, file


def _made(part: Path) -> tuple[Path, BinaryIO]:
    return part, part.open("x+b")


def _name(file: BinaryIO, part: Path) -> None:
    """Give a file without a name its name."""
    folder = os.open(part.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # With a folder os.link() is linkat(), which follows the link in /proc to the file itself.
        os.link(_OPEN_FILES / str(file.fileno()), part.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)
