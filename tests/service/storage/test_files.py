"""Files that are there whole or not at all, and the lock of a folder.

Knows paths and bytes. Does not know runs or rows.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from ema_client.errors import MalformedBody
from ema_service.storage import TensorFile
from ema_service.storage.files import FolderLock, FolderLocked, write_whole

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
