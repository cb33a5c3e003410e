"""Memory files: what outlives the process, whose folders are never touched, and that a full tmpfs is a refusal.

Knows folders in /dev/shm and processes that are killed. Does not know runs, rows or arenas.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ema_service.storage import memory_files as module
from ema_service.storage.memory_files import MemoryFiles, MemoryFilesUnusable
from ema_service.storage.pages import _POPULATE_WRITE, _libc
from tests.descriptors import open_below
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no /dev/shm")

SIZE = 3 << 20


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "catalog.db").touch()
    return folder


@pytest.fixture
def files(data_dir: Path, ram_dir: Path) -> Iterator[MemoryFiles]:
    made = MemoryFiles(data_dir, ram_dir)
    yield made
    made.sweep(())
    made.close()


def mapped(name: str) -> bool:
    return name in Path("/proc/self/maps").read_text()


def test_content_comes_back(files: MemoryFiles, data_dir: Path, ram_dir: Path) -> None:
    """What was written to a file is there when the folder is opened again, under the same nonce."""
    [made] = files.create(SIZE)
    made.raw[:] = 7
    files.close()
    again = MemoryFiles(data_dir, ram_dir)
    try:
        assert again.nonce == files.nonce
        assert again.names() == {made.name}
        assert np.array_equal(again.attach(made.name, SIZE).raw, np.full(SIZE, 7, np.uint8))
    finally:
        again.sweep(())
        again.close()
        files.__init__(data_dir, ram_dir)  # type: ignore[misc]  # for the fixture to end


def test_pages_stay_mapped_as_long_as_a_view_lives(files: MemoryFiles, ram_dir: Path) -> None:
    """The memory goes with the last view of it and no descriptor is held meanwhile; the file stays."""
    before = open_below(ram_dir)
    [made] = files.create(SIZE)
    view = made.raw[100:200]
    name = made.name
    del made
    gc.collect()
    assert open_below(ram_dir) == before
    assert mapped(name)
    view[:] = 1
    del view
    gc.collect()

    assert not mapped(name)
    assert name in files.names()


def test_removed_file_lives_on_in_its_views(files: MemoryFiles) -> None:
    """A file that is removed is gone by name, and its bytes are there for whoever reads them."""
    [made] = files.create(SIZE)
    made.raw[:] = 9
    files.remove(made.name)
    files.remove(made.name)

    assert files.names() == set()
    assert made.raw.sum() == 9 * SIZE


def test_memory_is_taken_at_once(files: MemoryFiles) -> None:
    """A new file has all its pages: later writes to it cannot fail."""
    [made] = files.create(SIZE)

    assert (files.folder / made.name).stat().st_blocks * 512 >= SIZE


def test_pages_are_mapped_ahead_of_their_use(files: MemoryFiles) -> None:
    """A thread maps the pages of new files: the push that writes to them first waits for none."""
    made = files.create(48 << 20, count=2)
    wait_until(lambda: not any(thread.name == "ema-pages" for thread in threading.enumerate()))
    if _libc.madvise(made[0].raw.ctypes.data, 1 << 20, _POPULATE_WRITE):
        pytest.skip("this kernel does not map pages ahead")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for each in made:
        each.raw[:] = 1

    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 2000, "of 24,576 pages"


def test_more_than_there_is_room_for(files: MemoryFiles) -> None:
    """A file that cannot be had is refused with what is there, and leaves nothing behind."""
    with pytest.raises(MemoryFilesUnusable, match=r"has room for \d+"):
        files.create(files.room() + (1 << 30))
    assert files.names() == set()


def test_failed_file_leaves_nothing(files: MemoryFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that is full after all: refused in its words, and the file is gone."""

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MemoryFilesUnusable, match="No space left"):
        files.create(SIZE)
    assert files.names() == set()


def test_all_or_none(files: MemoryFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are made together: room is looked for as much as all take, and where one fails none stays."""
    assert len({made.name for made in files.create(SIZE, count=3)}) == 3 == len(files.names())
    files.sweep(())
    with pytest.raises(MemoryFilesUnusable, match="has room for"):
        files.create(files.room() // 2 + SIZE, count=2)
    assert files.names() == set()

    calls: list[int] = []
    fallocate = os.posix_fallocate

    def full_at_last(descriptor: int, start: int, length: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        fallocate(descriptor, start, length)

    monkeypatch.setattr(os, "posix_fallocate", full_at_last)
    with pytest.raises(MemoryFilesUnusable, match="No space left"):
        files.create(SIZE, count=3)
    assert files.names() == set()


def test_one_server_at_a_time(
    files: MemoryFiles, data_dir: Path, ram_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process finds the folder taken; a folder of another data dir is another one."""
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.1)
    with pytest.raises(MemoryFilesUnusable, match="another server has"):
        MemoryFiles(data_dir, ram_dir)
    other = data_dir.parent / "other"
    other.mkdir()
    (other / "catalog.db").touch()
    second = MemoryFiles(other, ram_dir)
    assert second.folder != files.folder
    second.close()


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, SIZE - 1), lambda path: os.truncate(path, SIZE * 2)])
def test_file_of_another_size_is_not_attached(change: object, files: MemoryFiles) -> None:
    """A file that was cut or grew is refused: reading beyond its end would end the process."""
    [made] = files.create(SIZE)
    change(files.folder / made.name)  # type: ignore[operator]

    with pytest.raises(OSError, match="bytes, not"):
        files.attach(made.name, SIZE)


def test_hole_in_a_file_is_refused(files: MemoryFiles) -> None:
    """A file of the right size without all its pages was cut in between and grown again: it is not what was written."""
    [made] = files.create(SIZE)
    path = files.folder / made.name
    os.truncate(path, 0)
    os.truncate(path, SIZE)

    with pytest.raises(OSError, match="bytes, not"):
        files.attach(made.name, SIZE)


def test_link_in_the_place_of_a_file(files: MemoryFiles, tmp_path: Path) -> None:
    """A link is never followed, in a file's place as in a folder's."""
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(SIZE))
    [made] = files.create(SIZE)
    path = files.folder / made.name
    path.unlink()
    path.symlink_to(victim)

    with pytest.raises(OSError, match="symbolic"):
        files.attach(made.name, SIZE)
    files.sweep(())
    assert victim.read_bytes() == bytes(SIZE)


@pytest.mark.parametrize("squatter", ["link", "file", "writable by others"])
def test_squatted_folder_is_left_alone(squatter: str, data_dir: Path, ram_dir: Path, tmp_path: Path) -> None:
    """Where somebody else has the name, another folder is taken, and what was there stays as it was."""
    target = tmp_path / "target"
    target.mkdir()
    if squatter == "link":
        ram_dir.symlink_to(target)
    elif squatter == "file":
        ram_dir.write_text("mine")
    else:
        ram_dir.mkdir()
        ram_dir.chmod(0o777)
    files = MemoryFiles(data_dir, ram_dir)
    try:
        assert files.folder.parent == ram_dir.with_name(f"{ram_dir.name}-1")
        assert list(target.iterdir()) == []
    finally:
        files.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes folders of other users")
def test_folder_of_another_user_is_left_alone(data_dir: Path, ram_dir: Path) -> None:
    """A folder that belongs to somebody else, however inviting its mode, is not used."""
    ram_dir.mkdir(mode=0o700)
    os.chown(ram_dir, 12345, 12345)
    files = MemoryFiles(data_dir, ram_dir)
    try:
        assert files.folder.parent != ram_dir
    finally:
        files.close()


def test_every_name_is_taken(data_dir: Path, ram_dir: Path) -> None:
    """Where no folder can be had at all, that is said."""
    for suffix in ("", *(f"-{k}" for k in range(1, 8))):
        Path(f"{ram_dir}{suffix}").write_text("mine")
    with pytest.raises(MemoryFilesUnusable, match="taken by somebody else"):
        MemoryFiles(data_dir, ram_dir)


def test_nothing_is_readable_by_others(files: MemoryFiles) -> None:
    """Folders are 0700 and files 0600, whatever the umask."""
    [made] = files.create(SIZE)

    assert files.folder.stat().st_mode & 0o777 == 0o700
    assert files.folder.parent.stat().st_mode & 0o777 == 0o700
    assert (files.folder / made.name).stat().st_mode & 0o777 == 0o600


def test_files_of_a_data_dir_that_is_gone_are_removed(data_dir: Path, ram_dir: Path) -> None:
    """The next start of any server of this user frees memory that nobody can come back for; a live one's stays."""
    gone, alive = data_dir.parent / "gone", data_dir.parent / "alive"
    for folder in (gone, alive):
        folder.mkdir()
        (folder / "catalog.db").touch()
    left, used = MemoryFiles(gone, ram_dir), MemoryFiles(alive, ram_dir)
    left.create(SIZE)
    used.create(SIZE)
    left.close()
    for folder in (gone, alive):
        (folder / "catalog.db").unlink()
    files = MemoryFiles(data_dir, ram_dir)
    try:
        assert not left.folder.exists()
        assert len(used.names()) == 1, "its server runs"
    finally:
        files.close()
        used.sweep(())
        used.close()


def test_who_looks_after_folders_is_in_nobodys_way(
    data_dir: Path, ram_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers of one machine that start at once, as after they were killed at once, have each its memory files: a
    server without them would go on without the versions that lie there."""
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.0)
    files = MemoryFiles(data_dir, ram_dir)
    [kept] = files.create(SIZE)
    files.close()
    other = data_dir.parent / "other"
    other.mkdir()
    (other / "catalog.db").touch()
    ended = threading.Event()

    def start_others() -> None:
        while not ended.is_set():
            MemoryFiles(other, ram_dir).close()

    with ThreadPoolExecutor(2) as threads:
        # Of one process: the lock is that of an open file, and keeps out whoever opened the file once more.
        others = threads.submit(start_others)
        try:
            for _ in range(300):
                again = MemoryFiles(data_dir, ram_dir)
                assert again.names() == {kept.name}
                again.close()
        finally:
            ended.set()
        others.result(30)
    MemoryFiles(data_dir, ram_dir).sweep(())


@pytest.mark.parametrize("removed", [False, True])
def test_a_folder_that_is_looked_after_is_waited_for(
    data_dir: Path, ram_dir: Path, removed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the last of a data dir that was deleted and is made again; a folder that was removed under the hands of the
    new server is made anew."""
    files = MemoryFiles(data_dir, ram_dir)
    files.create(SIZE)
    files.close()
    owner = os.open(files.folder / "owner", os.O_RDWR)
    fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    tried, claim = threading.Semaphore(0), MemoryFiles._claim

    def watched(of: MemoryFiles) -> tuple[int, str]:
        try:
            return claim(of)
        finally:
            tried.release()

    monkeypatch.setattr(MemoryFiles, "_claim", watched)
    with ThreadPoolExecutor(1) as threads:
        starting = threads.submit(MemoryFiles, data_dir, ram_dir)
        assert tried.acquire(timeout=30)
        if removed:
            shutil.rmtree(files.folder)
        os.close(owner)
        again = starting.result(30)
    assert len(again.names()) == (0 if removed else 1)
    again.create(SIZE)
    again.sweep(())
    again.close()


def test_folder_made_for_another_data_dir_begins_anew(files: MemoryFiles, data_dir: Path, ram_dir: Path) -> None:
    """An owner file that names another data dir, or is damaged, means that the files are nobody's: a new nonce."""
    files.create(SIZE)
    owner = files.folder / "owner"
    nonce = files.nonce
    files.close()
    for content in (b"{", json.dumps({"data_dir": "/elsewhere", "nonce": nonce}).encode()):
        owner.write_bytes(content)
        again = MemoryFiles(data_dir, ram_dir)
        assert again.nonce != nonce
        assert again.names() == set()
        again.create(SIZE)
        again.close()
    files.__init__(data_dir, ram_dir)  # type: ignore[misc]  # for the fixture to end


def test_empty_folder_is_removed(data_dir: Path, ram_dir: Path) -> None:
    """Who keeps nothing leaves nothing."""
    files = MemoryFiles(data_dir, ram_dir)
    [made] = files.create(SIZE)
    files.remove(made.name)
    folder = files.folder
    files.close()

    assert not folder.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from ema_service.storage.memory_files import MemoryFiles
files = MemoryFiles(Path(sys.argv[1]), Path(sys.argv[2]))
[made] = files.create(int(sys.argv[3]))
made.raw[:] = 5
print(made.name, flush=True)
made.raw[: made.raw.size // 2] = 6
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_outlives_sigkill(data_dir: Path, ram_dir: Path) -> None:
    """What was in the memory of a process when it was killed is there, to the last byte it wrote."""
    argv = [sys.executable, "-c", KILLED, str(data_dir), str(ram_dir), str(SIZE)]
    process = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    files = MemoryFiles(data_dir, ram_dir)
    try:
        raw = files.attach(process.stdout.strip(), SIZE).raw
        assert raw.sum() == SIZE // 2 * 6 + SIZE // 2 * 5
    finally:
        files.sweep(())
        files.close()


def test_folder_on_a_disk_says_so(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any folder may be given; that the kernel then writes it to a disk is told."""
    on_disk = MemoryFiles(data_dir, tmp_path / "ram")
    try:
        expected = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True)
        assert on_disk.writes_to_disk == (expected.stdout.strip() not in ("tmpfs", "ramfs"))
        monkeypatch.setattr(module, "memory_room", lambda: 0)
        assert (on_disk.room() > 0) == on_disk.writes_to_disk
    finally:
        on_disk.close()
