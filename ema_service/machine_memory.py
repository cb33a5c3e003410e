"""How much memory this process may have: the machine's, or what control groups (containers, batch jobs) leave of it.

A write beyond a control group's limit is no error that a program could catch: the kernel kills the process. So whoever
takes memory that is not given back by itself asks here first.

Knows /proc and the two versions of control groups. Does not know what the memory is for.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["memory_limit", "memory_room", "resident_bytes"]

_CGROUPS = Path("/sys/fs/cgroup")
#: cgroup v1 writes "no limit" as the largest multiple of a page below 2**63.
_NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True)
class _Group:
    """One control group of this process: bytes it may have, bytes it has, and those the kernel takes back by itself."""

    limit: int
    used: int
    reclaimable: int


def memory_limit() -> int:
    """Bytes that this process, with its control group, may have at most."""
    return min([_physical("SC_PHYS_PAGES"), *(group.limit for group in _groups())])


def memory_room() -> int:
    """Bytes that can still be taken, page cache that the kernel gives back counted as free; never below 0."""
    rooms = (group.limit - group.used + group.reclaimable for group in _groups())
    return max(0, min([_available(), *rooms]))


def resident_bytes() -> int:
    """Memory that this process has now; where the system does not tell, the most that it ever had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10


def _physical(name: str) -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf(name)


def _available() -> int:
    """MemAvailable where the system has it: free memory and what can be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return _physical("SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES")


def _groups() -> Iterator[_Group]:
    """The control groups that bound this process' memory: its own and those above it."""
    for root, path, version in _memberships():
        folder = root / path.lstrip("/")
        # In a container the path may be the host's, which is not mounted there: then the root is the container's group.
        for each in (folder, *folder.parents):
            if each.is_relative_to(root) and (group := _read(each, version)):
                yield group


def _memberships() -> Iterator[tuple[Path, str, int]]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield _CGROUPS / "memory", path, 1
        elif not controllers:
            yield _CGROUPS, path, 2


def _read(folder: Path, version: int) -> _Group | None:
    """None where the group has no limit, or is none."""
    limit_file, used_file = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    )
    try:
        limit_text = (folder / limit_file).read_text().strip()
        if limit_text == "max" or int(limit_text) >= _NO_LIMIT:
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cache, shmem = ("total_cache", "total_shmem") if version == 1 else ("file", "shmem")
        # Memory files are counted as cache, and are the one kind of it that cannot be dropped.
        reclaimable = int(stat.get(cache, "0")) - int(stat.get(shmem, "0"))
        return _Group(int(limit_text), int((folder / used_file).read_text()), max(0, reclaimable))
    except (OSError, ValueError):
        return None
