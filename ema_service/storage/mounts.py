"""Which file system a folder lies on: a disk of this machine, its memory, or one that other machines may have too.

Knows the system's table of mounts. Does not know what anybody keeps there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FileSystem", "file_system"]

#: proc_pid_mountinfo(5): a line for each mount that this process sees, a later one above an earlier one.
_TABLE = Path("/proc/self/mountinfo")
_IN_MEMORY = frozenset({"tmpfs", "ramfs", "hugetlbfs"})
#: File systems that several machines may have, or a machine and its virtual machines. FUSE's, which go by names of
#: their own, are most often of this kind too (sshfs, GlusterFS, gcsfuse, DAOS).
_SHARED = re.compile(
    r"nfs4?|lustre|gpfs|beegfs|cifs|smb3|smbfs|ceph|afs|9p|panfs|wekafs|orangefs|pvfs2|ocfs2|gfs2|virtiofs|vboxsf|"
    r"fuse(\..+)?"
)
#: Options of NFS and Lustre by which locks are seen on this machine alone.
_LOCAL_LOCKS = frozenset({"nolock", "local_lock=all", "local_lock=flock", "localflock"})
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class FileSystem:
    """A mounted file system. kind: as the kernel names it, "" where the system does not tell. options: of the mount."""

    kind: str = ""
    options: frozenset[str] = frozenset()

    @property
    def in_memory(self) -> bool:
        """Whether there is no disk behind it."""
        return self.kind in _IN_MEMORY

    @property
    def shared(self) -> bool:
        """Whether other machines may have it: memory that two processes map is then not the same for sure."""
        return _SHARED.fullmatch(self.kind) is not None

    @property
    def locks_are_local(self) -> bool:
        """Whether a lock there keeps only processes of this machine out."""
        return bool(self.options & _LOCAL_LOCKS)


def file_system(path: Path) -> FileSystem:
    """The file system of a file or folder, by the mount that is nearest to it."""
    try:
        lines = _TABLE.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return FileSystem()
    real, best, found = path.resolve(), -1, FileSystem()
    for line in lines:
        fields, _, rest = line.partition(" - ")
        point = Path(_ESCAPED.sub(lambda code: chr(int(code[1], 8)), fields.split(" ")[4]))
        kind, _, options = [*rest.split(" "), "", "", ""][:3]
        if real.is_relative_to(point) and len(point.parts) >= best:
            best = len(point.parts)
            found = FileSystem(kind, frozenset((*fields.split(" ")[5].split(","), *options.split(","))))
    return found
