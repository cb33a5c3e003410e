"""Files that are there whole or not at all, and the lock of a folder.

Knows paths and bytes. Does not know runs or rows.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from ema_client.errors import MalformedBody
from ema_service.storage import TensorFile
from ema_service.storage.catalog import Catalog
from ema_service.storage.files import FolderLock, FolderLocked, TakenOver, write_whole
from ema_service.storage.mounts import FileSystem
from ema_service.storage.slot_files import Extent
from ema_service.storage.slots import Slots
from tests.waiting import wait_until

BODY = save({"b": torch.arange(6.0), "a": torch.arange(3, dtype=torch.float64)})
DATA = BODY[8 + int.from_bytes(BODY[:8], "little") :]


# --- writing --------------------------------------------------------------------------------------------------------


def test_file_has_all_chunks(tmp_path: Path) -> None:
    """The chunks, of any kind and size, stand in the file one after the other; the size is told."""
    chunks: list[bytes | memoryview] = [b"ab", memoryview(b"cdef")[1:3], b"", memoryview(b"g" * 100_000)]

    assert write_whole(tmp_path / "f", chunks) == 100_004
    assert (tmp_path / "f").read_bytes() == b"abde" + b"g" * 100_000
    assert list(tmp_path.iterdir()) == [tmp_path / "f"]


def test_name_appears_when_all_is_written(tmp_path: Path) -> None:
    """While chunks are still coming the old file stands under the name, whole."""
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def chunks() -> Iterator[bytes]:
        yield b"new"
        assert path.read_bytes() == b"old"
        yield b"er"

    write_whole(path, chunks())
    assert path.read_bytes() == b"newer"


def test_bytes_are_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is synced before it is renamed, and its folder after."""
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        calls.append(f"sync {kind}")
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    write_whole(tmp_path / "f", [b"x"])

    assert calls == ["sync file", "rename", "sync folder"]


@pytest.mark.parametrize("when", ["write", "sync", "source"])
def test_failure_leaves_what_was_there(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk is full, fails, or the source cannot be read, the old file stands and no rubbish is left."""
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def chunks() -> Iterator[bytes]:
        yield b"new"
        if when == "source":
            fail()

    if when != "source":
        monkeypatch.setattr(os, when.replace("sync", "fsync"), fail)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, chunks())

    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "f"]


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that takes only part of a write is asked again for the rest."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:3]))

    assert write_whole(tmp_path / "f", [b"0123456789"]) == 10
    assert (tmp_path / "f").read_bytes() == b"0123456789"


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "f.safetensors"
    path.write_bytes(BODY)
    return path


def test_any_part_is_read(path: Path) -> None:
    """read() and read_into() give any range of the data section, from many threads at once."""
    file = TensorFile(path)
    faults: list[tuple[int, int]] = []

    def compare(first: int) -> None:
        for start in range(first, len(DATA), 3):
            stops = range(start, len(DATA) + 1)
            faults.extend((start, stop) for stop in stops if bytes(file.read(start, stop)) != DATA[start:stop])

    threads = [threading.Thread(target=compare, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    buffer = bytearray(8)
    file.read_into(memoryview(buffer), 24)
    file.close()

    assert not faults
    assert bytes(buffer) == DATA[24:32]
    assert [entry.name for entry in file.header.entries] == ["a", "b"]


def test_open_file_outlives_its_name(path: Path) -> None:
    """A file that was removed is read on to its end."""
    file = TensorFile(path)
    path.unlink()

    assert bytes(file.read(0, len(DATA))) == DATA
    file.close()


def test_file_cut_while_it_is_read(path: Path) -> None:
    """A file cut after it was opened is an error that names it, never short data."""
    file = TensorFile(path)
    os.truncate(path, len(BODY) - 4)

    with pytest.raises(OSError, match=r"f\.safetensors ends at byte"):
        file.read(0, len(DATA))
    file.close()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (BODY[:7], "7 bytes"),
        (BODY[:40], "not JSON"),
        (BODY[:-1], "its header says"),
        (BODY + b"\0", "its header says"),
        (b"\xff" * 100, "claims"),
    ],
)
def test_file_that_is_not_whole_is_refused(content: bytes, words: str, path: Path) -> None:
    """A file that is cut, longer, or none of ours is refused when it is opened, and closed again."""
    path.write_bytes(content)

    with pytest.raises(MalformedBody, match=words):
        TensorFile(path)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    """A missing file is FileNotFoundError, as open() has it."""
    with pytest.raises(FileNotFoundError):
        TensorFile(tmp_path / "none")


# --- the lock -------------------------------------------------------------------------------------------------------


def test_folder_is_locked_once(tmp_path: Path) -> None:
    """A second lock on the folder is refused, naming it and what to do; after release it is free."""
    lock = FolderLock(tmp_path)
    with pytest.raises(FolderLocked) as refusal:
        FolderLock(tmp_path)
    assert str(tmp_path) in str(refusal.value)
    assert "--data-dir" in str(refusal.value)

    lock.release()
    FolderLock(tmp_path).release()


def test_each_holder_has_a_larger_number(tmp_path: Path) -> None:
    """However the one before ended; whoever is not the latest finds out."""
    first = FolderLock(tmp_path)
    first.release()
    second = FolderLock(tmp_path)
    assert first.number < second.number
    assert (first.taken_over(), second.taken_over()) == (True, False)
    second.release()
    (tmp_path / "lock").write_bytes(b"")  # as servers before numbers left it
    third = FolderLock(tmp_path)
    assert third.number == 1
    (tmp_path / "lock").unlink()
    assert not third.taken_over()
    third.release()


def test_a_full_disk_locks_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server starts on a full disk, to be read; what its number is good for the log says is missing."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    FolderLock(tmp_path).release()
    monkeypatch.setattr(os, "pwrite", full)
    lock = FolderLock(tmp_path)
    assert (lock.number, lock.taken_over()) == (2, False)
    assert "No space left on device" in caplog.text
    with pytest.raises(FolderLocked):
        FolderLock(tmp_path)
    lock.release()


def test_lock_dies_with_its_process(tmp_path: Path) -> None:
    """A killed process leaves no lock behind."""
    code = (
        "import sys, pathlib; from ema_service.storage.files import FolderLock; "
        "lock = FolderLock(pathlib.Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(FolderLocked):
            FolderLock(tmp_path)
        other.kill()
        other.wait(30)

    FolderLock(tmp_path).release()


# --- where locks keep nobody out -------------------------------------------------------------------------------------

LOCAL = FileSystem("nfs", frozenset({"nolock"}))
LEASE = 1.0


@pytest.fixture
def unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lock is had, as by processes of two machines."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)


def shared_lock(folder: Path) -> FolderLock:
    return FolderLock(folder, LOCAL, lease=LEASE)


@pytest.mark.usefixtures("unlocked")
def test_who_goes_on_is_left_alone(tmp_path: Path) -> None:
    """Another one is told that the folder is used, and the holder does not notice."""
    first = shared_lock(tmp_path)
    with pytest.raises(FolderLocked, match="another server uses the data dir"):
        shared_lock(tmp_path)
    assert not first.taken_over()
    first.hold()
    first.release()
    shared_lock(tmp_path).release()


@pytest.mark.usefixtures("unlocked")
def test_of_two_that_begin_at_once_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither sees the other one before both have chosen a number."""
    chosen, pwrite = threading.Barrier(2), os.pwrite

    def write(*what: Any) -> int:
        chosen.wait(30)
        return pwrite(*what)

    monkeypatch.setattr(os, "pwrite", write)
    with ThreadPoolExecutor(2) as threads:
        begun = [threads.submit(shared_lock, tmp_path) for _ in range(2)]
        faults = [each.exception() for each in begun]
    assert [type(fault) for fault in faults if fault] == [FolderLocked]
    (lock,) = [each.result() for each, fault in zip(begun, faults, strict=True) if not fault]
    lock.hold()
    assert not lock.taken_over()
    lock.release()


@pytest.mark.usefixtures("unlocked")
def test_who_stood_still_may_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where it comes back just as a later one has begun, and was seen to be the holder before."""
    monkeypatch.setattr(FolderLock, "_touch", lambda _: None)  # as of a process that is stopped
    first = shared_lock(tmp_path)
    first.hold()
    began = time.monotonic()
    second = shared_lock(tmp_path)
    assert time.monotonic() - began >= 1.5 * LEASE
    with pytest.raises(TakenOver):
        first.hold()
    second.hold()
    second.release()
    first.release()


@pytest.mark.usefixtures("unlocked")
def test_who_cannot_tell_may_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does not reach the file that says who has the folder; until it does."""
    lock = shared_lock(tmp_path)

    def away(_: Path) -> bytes:
        raise OSError(errno.EIO, "no answer of the file server")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", away)
        wait_until(lambda: lock._seen < time.monotonic() - LEASE)
        with pytest.raises(OSError, match="is not read"):
            lock.hold()
    lock.hold()
    lock.release()


def test_without_a_lease_nobody_looks(tmp_path: Path) -> None:
    """Who is started after the one before has ended needs to ask nobody."""
    lock = FolderLock(tmp_path)
    lock.path.write_bytes(b"99\n")
    assert lock.taken_over()
    lock.hold()
    lock.release()


@pytest.mark.parametrize("what", ["a slot", "a row", "a file", "the log"])
def test_nothing_is_written_by_who_was_taken_over(tmp_path: Path, what: str) -> None:
    """Whichever way bytes take to the data dir."""

    def hold() -> None:
        if taken:
            raise TakenOver(errno.EBUSY, "a later server has the data dir")

    taken = list[bool]()
    catalog = Catalog(tmp_path / "catalog.db", hold=hold)
    slot = Slots(tmp_path, {"ema": Extent(4096, 8)}, [], None, hold=hold).take()
    slot.files.open()
    catalog.add_run("before", "{}", 0.0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    taken.append(True)
    if what == "a slot":
        slot.write("ema", memoryview(b"87654321"), 8)
        with pytest.raises(OSError, match="a later server"):
            slot.finish({"ema": b"8 bytes.{}"})
    elif what == "a row":
        with pytest.raises(sqlite3.OperationalError, match="a later server"):
            catalog.add_run("r", "{}", 0.0)
    elif what == "the log":
        catalog.close()
        del catalog
        gc.collect()
    else:
        with pytest.raises(TakenOver):
            write_whole(tmp_path / "file", [b"x"], hold)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    taken.clear()
    with contextlib.closing(Catalog(tmp_path / "catalog.db")) as later:
        assert [row.name for row in later.runs()] == ["before"]
