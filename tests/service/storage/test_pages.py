"""Pages of files in memory: huge where the kernel has them, all of them taken whatever it says.

Knows the kernel's own count of a mapping's huge pages. Does not know folders, or what lies in a file.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ema_service.storage import pages
from ema_service.storage.pages import mapped, taken
from ema_service.values import Array, address

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no /dev/shm")

MIB = 1 << 20
SIZE = 96 * MIB + 4321


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    """Of an empty file on tmpfs."""
    path = Path("/dev/shm") / f"ema-tests-{os.getpid()}-pages-{tmp_path.name}"
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    path.unlink()
    yield opened
    os.close(opened)


@pytest.fixture
def _huge() -> None:
    """Skips where the kernel makes no huge page of a file's pages, or has few of them."""
    if tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) < (6, 1):
        pytest.skip("this kernel makes no huge pages of files: Linux before 6.1")
    if pages._huge_page_bytes() != 2 * MIB:
        pytest.skip("huge pages are turned off here, or are of another size")
    free = [list(map(int, line.split()[4:])) for line in Path("/proc/buddyinfo").read_text().splitlines()]
    if sum(zone[9] + 2 * zone[10] for zone in free) < 256:
        pytest.skip("this machine's memory is in pieces: it has few huge pages")


def huge_bytes(raw: Array) -> int:
    """Bytes of an array's memory that are mapped in huge pages."""
    mappings = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    [mapping] = [each for each in mappings if each.startswith(f"{address(raw):x}-")]
    return int(re.search(r"ShmemPmdMapped:\s+(\d+) kB", mapping)[1]) * 1024  # type: ignore[index]


def all_taken(descriptor: int) -> bool:
    return os.fstat(descriptor).st_blocks * 512 >= SIZE and os.fstat(descriptor).st_size == SIZE


@pytest.mark.usefixtures("_huge")
def test_pages_are_huge(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All whole huge pages of a new file are, and are mapped as such; the next process has them too."""
    monkeypatch.setattr(pages, "_SLOW_SECONDS", 600.0)  # this machine may be busy, and its kernel with it
    raw = taken(descriptor, SIZE, in_memory=True)
    assert (huge_bytes(raw), all_taken(descriptor)) == (96 * MIB, True)
    assert address(raw) % (2 * MIB) == 0
    raw[:] = 7
    again = mapped(descriptor, SIZE)

    assert np.array_equal(again, np.full(SIZE, 7, np.uint8))
    assert huge_bytes(again) == 96 * MIB


@pytest.mark.usefixtures("_huge")
def test_a_kernel_that_is_slow(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where huge pages take long, as in memory that lies in pieces, no more are asked for."""
    monkeypatch.setattr(pages, "_SLOW_SECONDS", -1.0)
    raw = taken(descriptor, SIZE, in_memory=True)

    assert (huge_bytes(raw), all_taken(descriptor)) == (64 * MIB, True)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_kernel_that_has_none(descriptor: int, monkeypatch: pytest.MonkeyPatch, in_memory: bool) -> None:
    """All memory is taken in small pages where huge ones are refused, and where the file lies on a disk."""
    if in_memory:
        monkeypatch.setattr(pages, "_COLLAPSE", 9999)
    raw = taken(descriptor, SIZE, in_memory=in_memory)

    assert (huge_bytes(raw), all_taken(descriptor)) == (0, True)


@pytest.mark.parametrize(("setting", "nbytes"), [("always madvise [never]", 0), ("[always] madvise never", 2 * MIB)])
def test_what_whoever_keeps_the_system_has_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, nbytes: int
) -> None:
    """Huge pages that are turned off for all memory are turned off for files."""
    (tmp_path / "enabled").write_text(setting)
    (tmp_path / "hpage_pmd_size").write_text(f"{2 * MIB}\n")
    monkeypatch.setattr(pages, "_HUGE_PAGES", tmp_path)

    assert pages._huge_page_bytes.__wrapped__() == nbytes


FULL = """
import os, sys
from ema_service.storage.pages import taken
descriptor = os.open(sys.argv[1] + "/file", os.O_RDWR | os.O_CREAT)
try:
    taken(descriptor, 64 << 20, in_memory=True)
except OSError as fault:
    print(fault.errno)
"""


def test_a_full_file_system_is_an_error(tmp_path: Path) -> None:
    """And no SIGBUS, where it has room for some of the file's pages."""
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=21m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        found = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)

    assert (found.returncode, found.stdout.strip()) == (0, str(errno.ENOSPC)), found.stderr
