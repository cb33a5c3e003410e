"""File systems by the table of mounts, and what a store does on one that several machines may have.

A network's file system cannot be had in a test: the table says that there is one. What SQLite does then is real.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from ema_service.storage import CatalogUnusable, MemoryFiles, MemoryFilesUnusable, Store, mounts
from ema_service.storage.catalog import Catalog
from ema_service.storage.files import CannotLock, FolderLock, FolderLocked, write_whole
from ema_service.storage.mounts import FileSystem, file_system

LINE = "{} 1 0:7 / {} {} shared:1 - {} server:/export {}\n"
Mount = Callable[..., Path]


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mount:
    """A folder on which the table of mounts has a file system of this kind, with these options."""
    table, folder = tmp_path / "mountinfo", tmp_path / "my data"
    table.write_text(LINE.format(1, "/", "rw", "ext4", "rw"))
    monkeypatch.setattr(mounts, "_TABLE", table)

    def mount(kind: str, options: str = "rw", at: Path = folder) -> Path:
        at.mkdir(exist_ok=True, mode=0o700)
        with table.open("a") as file:
            file.write(LINE.format(2, str(at).replace(" ", r"\040"), "rw,noatime", kind, options))
        return at

    return mount


def test_nearest_mount_is_found(mounted: Mount, tmp_path: Path) -> None:
    """The mount that is nearest to a path is its file system, of several in one place the last; links are followed."""
    folder = mounted("ext4")
    mounted("nfs4", "rw,vers=4.2,local_lock=none")
    mounted("tmpfs", at=tmp_path / "my")
    (folder / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder / "deep")

    for path in (folder, folder / "deep" / "deeper", folder / "not there", tmp_path / "link"):
        assert (file_system(path).kind, file_system(path).shared) == ("nfs4", True)
    assert file_system(tmp_path / "my").in_memory
    assert file_system(tmp_path) == FileSystem("ext4", frozenset({"rw"}))
    assert not file_system(folder).locks_are_local


@pytest.mark.parametrize(
    ("kind", "options", "shared", "local_locks"),
    [
        ("ext4", "rw", False, False),
        ("overlay", "rw,lowerdir=/a", False, False),
        ("btrfs", "rw", False, False),
        ("fuseblk", "rw", False, False),
        ("nfs", "rw,vers=3,nolock", True, True),
        ("nfs4", "rw,local_lock=flock", True, True),
        ("lustre", "rw,flock,lazystatfs", True, False),
        ("lustre", "rw,localflock", True, True),
        ("fuse.sshfs", "rw", True, False),
        ("fuse", "rw", True, False),
        ("9p", "rw", True, False),
    ],
)
def test_kinds(mounted: Mount, kind: str, options: str, shared: bool, local_locks: bool) -> None:
    """Which file systems other machines may have, and where a lock is seen by this machine alone."""
    found = file_system(mounted(kind, options))
    assert (found.shared, found.locks_are_local, found.in_memory) == (shared, local_locks, False)


def test_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the table nothing is said of a file system."""
    monkeypatch.setattr(mounts, "_TABLE", tmp_path / "none")
    assert file_system(tmp_path) == FileSystem()


def test_real_memory() -> None:
    """The table of this system is read too."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm on this system")
    assert file_system(Path("/dev/shm")).in_memory


def test_catalog_without_shared_memory(mounted: Mount) -> None:
    """On a network's file system the catalog has its log, no memory that processes share, and nobody else in it; of a
    server that was killed, the log is read by the next one, and by one on a disk of its own."""
    folder = mounted("nfs4")
    store = Store(folder)
    row = store.add_run("r", "{}", 1.0)
    assert not (folder / "catalog.db-shm").exists()
    assert store._catalog._read("PRAGMA journal_mode") == [("wal",)]
    with (
        closing(sqlite3.connect(folder / "catalog.db", timeout=0)) as other,
        pytest.raises(sqlite3.OperationalError, match="locked"),
    ):
        other.execute("SELECT * FROM runs")
    left = {name: (folder / name).read_bytes() for name in ("catalog.db", "catalog.db-wal")}
    store.close()

    for alone in (True, False):
        for name, data in left.items():
            (folder / name).write_bytes(data)
        catalog = Catalog(folder / "catalog.db", alone=alone)
        assert catalog.runs() == [row]
        catalog.close()


def test_catalog_without_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SQLite cannot have its log, the catalog is refused instead of being kept less safely."""
    without_log = sqlite3.connect(":memory:")
    monkeypatch.setattr(sqlite3, "connect", lambda *_, **__: without_log)
    with pytest.raises(CatalogUnusable, match=r"cannot have a log on this file system .*journal mode memory"):
        Catalog(tmp_path / "catalog.db")


def test_memory_files_are_refused(mounted: Mount, tmp_path: Path) -> None:
    """A folder for memory files on a network's file system is no memory: versions go to the data dir then."""
    with pytest.raises(MemoryFilesUnusable, match="a network's file system"):
        MemoryFiles(tmp_path, mounted("lustre"))


def test_lock_of_a_lost_machine(mounted: Mount) -> None:
    """Who finds the data dir in use is told what becomes of the lock of a machine that is gone."""
    folder = mounted("nfs4")
    lock = FolderLock(folder)
    with pytest.raises(FolderLocked, match="with NFS 4 after about 90 seconds"):
        FolderLock(folder)
    lock.release()


def test_locks_of_one_machine(mounted: Mount, caplog: pytest.LogCaptureFixture) -> None:
    """Where locks are this machine's alone, the log warns of a second server on another."""
    with caplog.at_level(logging.WARNING):
        FolderLock(mounted("lustre", "rw,localflock")).release()
    assert "never start another server" in caplog.text


def test_who_no_lock_keeps_out_is_waited_for(mounted: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a lease and a half, which locks that work make needless; who has no lease waits for nobody."""
    waits: list[float] = []
    clock = SimpleNamespace(sleep=waits.append, monotonic=lambda: sum(waits))
    monkeypatch.setattr("ema_service.storage.files.time", clock)
    for options, lease, least in (("rw,localflock", 3.0, 4.5), ("rw,localflock", 0.0, 0.0), ("rw,flock", 3.0, 0.0)):
        waits.clear()
        FolderLock(mounted("lustre", options), lease=lease).release()
        assert least <= sum(waits) <= least + 0.2


def test_no_locks(mounted: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks is refused, with what to do: two servers could write to one data dir."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(CannotLock, match=r"on lustre.*the option flock"):
        FolderLock(mounted("lustre"))


def test_folders_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that syncs no folders takes files all the same; that of a file must succeed."""
    sync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    assert write_whole(tmp_path / "file", [b"abc"]) == 3


def test_a_new_folders_first_number(tmp_path: Path) -> None:
    """As it is asked for; and larger than every earlier holder's, also where a clock went back."""
    numbers = []
    for first in (700, 600, 900):
        lock = FolderLock(tmp_path, first=first)
        numbers.append(lock.number)
        lock.release()
    assert numbers == [700, 701, 900]
