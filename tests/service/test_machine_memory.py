"""How much memory there is: of the machine, and of the control group that a process is in.

Knows control groups of both versions. Does not know what the memory is for.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ema_service import machine_memory
from ema_service.machine_memory import memory_limit, memory_room
from tests.control_groups import memory_group

MEBIBYTE = 1 << 20
LIMIT = 400 * MEBIBYTE


def test_machine() -> None:
    """Never more than the machine has, and what is free is less than all."""
    assert 0 < memory_room() < memory_limit() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- a real group -----------------------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group with LIMIT bytes of memory."""
    with memory_group(LIMIT) as folder:
        yield folder


IN_GROUP = """
import os, sys
from pathlib import Path
from ema_service.machine_memory import memory_limit, memory_room
(Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))
said = [memory_limit(), memory_room()]
if sys.argv[2] == "own":
    held = bytearray(100 << 20)
    held[::4096] = bytes([1]) * (len(held) // 4096)
else:
    with open(sys.argv[3], "wb") as file:
        file.write(bytes(100 << 20))
        os.fsync(file.fileno())
print(*said, memory_room())
"""


@pytest.mark.parametrize(("kind", "counts"), [("own", True), ("shared", True), ("page cache", False)])
def test_group(kind: str, counts: bool, group: Path, tmp_path: Path) -> None:
    """The group's limit; less is left for memory, and for files in memory, but not for what is cached of a disk."""
    shared = Path("/dev/shm") / f"ema-test-{secrets.token_hex(4)}"
    file = shared if kind == "shared" else tmp_path / "file"
    argv = [sys.executable, "-c", IN_GROUP, str(group), kind, str(file)]
    try:
        told = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    finally:
        file.unlink(missing_ok=True)
    limit, before, after = map(int, told.stdout.split())

    assert limit == LIMIT
    assert before <= LIMIT
    assert (before - after > 90 * MEBIBYTE) == counts


# --- files as the kernel writes them ---------------------------------------------------------------------------------


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of groups of version 2 in which this process is in /job/task."""
    monkeypatch.setattr(machine_memory, "_memberships", lambda: [(tmp_path, "/job/task", 2)])
    monkeypatch.setattr(machine_memory, "_available", lambda: 1 << 60)
    return tmp_path


def test_the_narrowest_group_counts(tree: Path) -> None:
    """Of the own group and those above, whichever leaves least; page cache is free, files in memory are not."""
    stat = f"anon {50 * MEBIBYTE}\nfile {70 * MEBIBYTE}\nshmem {30 * MEBIBYTE}\n"
    write(tree / "job" / "task", memory_max="max\n", memory_current="0\n", memory_stat=stat)
    write(tree / "job", memory_max=f"{200 * MEBIBYTE}\n", memory_current=f"{120 * MEBIBYTE}\n", memory_stat=stat)
    write(tree, memory_max=f"{900 * MEBIBYTE}\n", memory_current=f"{120 * MEBIBYTE}\n", memory_stat=stat)

    assert memory_limit() == 200 * MEBIBYTE
    assert memory_room() == (200 - 120 + 40) * MEBIBYTE


def test_a_group_that_is_full(tree: Path) -> None:
    """Nothing is left, and never less than nothing."""
    write(tree / "job" / "task", memory_max="4096\n", memory_current="8192\n", memory_stat="file 0\nshmem 0\n")

    assert (memory_limit(), memory_room()) == (4096, 0)


@pytest.mark.parametrize("text", ["max\n", "nonsense\n", ""])
def test_no_limit(tree: Path, text: str) -> None:
    """A group without a limit, or one that cannot be read, bounds nothing."""
    write(tree / "job" / "task", memory_max=text, memory_current="0\n", memory_stat="file 0\n")

    assert memory_limit() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_path_of_another_tree(tree: Path) -> None:
    """In a container the path may be the host's: then the root of what is mounted is the container's group."""
    write(tree, memory_max="123\n", memory_current="0\n", memory_stat="file 0\nshmem 0\n")

    assert memory_limit() == 123
