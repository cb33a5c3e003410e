"""Slots: files written in place, who has which, what a full disk does to them.

Knows folders and bytes. Does not know rows or runs.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from ema_service.storage import Extent, Slot, Slots, TensorFile, padded_bytes
from ema_service.threads import Threads
from tests.descriptors import open_below

TENSORS = {"w": torch.arange(5000.0), "v": torch.full((3,), 2.5)}
BODY = save(TENSORS)
HEADER, DATA = BODY[: -5003 * 4], BODY[-5003 * 4 :]
THREADS = Threads(1)
EXTENTS = {"slow": Extent(padded_bytes(HEADER), len(DATA)), "fast": Extent(8192, len(DATA))}


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    return Slots(tmp_path, EXTENTS, [], THREADS)


def fill(slot: Slot, data: bytes = DATA) -> None:
    for average in EXTENTS:
        for start in range(0, len(data), 7000):
            slot.write(average, memoryview(data), min(start + 7000, len(data)))
    slot.finish(dict.fromkeys(EXTENTS, HEADER))


def test_slot_is_plain_safetensors(slots: Slots, tmp_path: Path) -> None:
    """A slot's files open in the safetensors library; data begin at a page; they are read back piece by piece."""
    slot = slots.take()
    fill(slot)

    for average, extent in EXTENTS.items():
        path = tmp_path / slot.name / f"{average}.safetensors"
        assert all(torch.equal(value, TENSORS[name]) for name, value in load_file(path).items())
        assert path.read_bytes()[extent.header :] == DATA
        assert extent.header % 4096 == 0
        file = TensorFile(path)
        buffer = memoryview(bytearray(len(DATA)))
        assert b"".join(file.read_whole(buffer)) == DATA
        assert buffer == DATA
        file.close()


def test_slot_is_ones_own_while_it_is_held(slots: Slots) -> None:
    """Nobody gets a slot that is held; a dropped one is given out again, the latest first, before a new one is made."""
    first, second, third = slots.take(), slots.take(), slots.take()
    assert [first.name, second.name, third.name] == ["slots/0", "slots/1", "slots/2"]
    del first, third
    again = [slots.take(), slots.take(), slots.take()]

    assert [slot.name for slot in again] == ["slots/2", "slots/0", "slots/3"]
    assert second.name == "slots/1"


def test_slots_that_lie_there_are_used(slots: Slots, tmp_path: Path) -> None:
    """After a start, slots without a row are taken first, then those with the oldest rows; held ones never."""
    for slot in [slots.take() for _ in range(4)]:
        fill(slot)
    opened = Slots(tmp_path, EXTENTS, ["slots/3", "slots/0", "checkpoint-a"], THREADS)
    newest = opened.hold("slots/3")
    taken = [opened.take() for _ in range(5)]

    assert newest.name == "slots/3"
    assert [slot.name for slot in taken] == ["slots/2", "slots/1", "checkpoint-a", "slots/0", "slots/4"]


def test_reuse_writes_in_place(slots: Slots, tmp_path: Path) -> None:
    """The files of a slot are the same files, of the same size and blocks, whatever they held before."""
    slot = slots.take()
    fill(slot)
    path = tmp_path / slot.name / "slow.safetensors"
    before = path.stat()
    del slot
    slot = slots.take()
    fill(slot, DATA[::-1])

    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_blocks) == (before.st_ino, before.st_size, before.st_blocks)
    assert path.read_bytes()[-len(DATA) :] == DATA[::-1]


def test_file_of_another_size_is_made_anew(slots: Slots, tmp_path: Path) -> None:
    """A file that was cut short, or is longer, gets its size back before it is written."""
    slot = slots.take()
    fill(slot)
    path = tmp_path / slot.name / "slow.safetensors"
    del slot
    for content in (b"", path.read_bytes()[:-1], path.read_bytes() + b"x"):
        path.write_bytes(content)
        slot = slots.take()
        fill(slot)
        assert load_file(path).keys() == TENSORS.keys()
        del slot


def test_space_is_taken_before_it_is_written(slots: Slots, tmp_path: Path) -> None:
    """allocate() makes slots with all their blocks; taken later they are these."""
    slots.allocate(2)
    paths = sorted(tmp_path.glob("slots/*/*"))

    assert len(paths) == 4
    assert all(path.stat().st_blocks * 512 >= len(DATA) for path in paths)
    assert {slots.take().name for _ in range(2)} <= {"slots/0", "slots/1"}


@pytest.mark.parametrize("nth", [1, 2])
def test_full_disk_leaves_nothing(nth: int, slots: Slots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot that there is no room for is not there, and no descriptor stays open; with room it can be made."""
    calls = iter(range(1, 100))
    allocate = os.posix_fallocate

    def full(descriptor: int, offset: int, length: int) -> None:
        if next(calls) >= nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(descriptor, offset, length)

    before = open_below(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            slots.allocate(1)
    assert list(tmp_path.glob("slots/*")) == []
    assert open_below(tmp_path) == before
    slots.allocate(1)
    assert len(list(tmp_path.glob("slots/*/*"))) == 2


def test_without_preallocation(slots: Slots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot preallocate has slots all the same."""

    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    slot = slots.take()
    fill(slot)

    assert load_file(tmp_path / slot.name / "fast.safetensors").keys() == TENSORS.keys()


def _fails(*_: object) -> int:
    raise OSError(errno.EIO, "Input/output error")


def test_failed_write_is_told_at_the_end(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    """write() never raises, for it runs behind the receiving; finish() tells of it, the next holder starts afresh."""
    slot = slots.take()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _fails)
        slot.write("slow", memoryview(DATA), len(DATA))
    with pytest.raises(OSError, match="Input/output error"):
        slot.finish(dict.fromkeys(EXTENTS, HEADER))
    name = slot.name
    del slot
    slot = slots.take()

    assert slot.name == name
    fill(slot)


def test_unfinished_slot_is_refused(slots: Slots) -> None:
    """finish() does not pass off a slot that lacks bytes."""
    slot = slots.take()
    slot.write("slow", memoryview(DATA), len(DATA))

    with pytest.raises(OSError, match="fast has 0 bytes"):
        slot.finish(dict.fromkeys(EXTENTS, HEADER))


def test_short_writes_are_continued(slots: Slots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system call that writes less than it was given is called again for the rest."""
    pwrite: Callable[[int, memoryview, int], int] = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:1000], at))
    slot = slots.take()
    fill(slot)

    assert (tmp_path / slot.name / "slow.safetensors").read_bytes()[-len(DATA) :] == DATA


#: Enough to be written behind the caller, and not a whole number of pages.
LARGE = 40 * 1024 * 1024 + 300


@pytest.fixture(scope="module")
def large() -> memoryview:
    """Bytes that begin at a page, as arenas do."""
    data = mmap.mmap(-1, LARGE)
    data.write(np.random.default_rng(0).bytes(LARGE))
    return memoryview(data)


class Writes:
    """Looks on as os.pwrite() is called: how many bytes go past the page cache, and how many into it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.direct = self.cached = 0
        self._pwrite: Callable[[int, memoryview, int], int] = os.pwrite
        patch.setattr(os, "pwrite", self)

    def __call__(self, descriptor: int, data: memoryview, position: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            self.direct += len(data)
        else:
            self.cached += len(data)
        return self._pwrite(descriptor, data, position)


@pytest.mark.parametrize("step", [1 << 18, 1 << 20, 3_333_333, LARGE])
@pytest.mark.parametrize("patient", [True, False])
def test_large_versions_are_written_as_they_are_made(
    tmp_path: Path, large: memoryview, step: int, patient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a version comes to be, its file holds it; past the page cache, but for odd ends and what has to hurry."""
    slots = Slots(tmp_path, {"ema": Extent(8192, LARGE)}, [], THREADS, patient=patient)
    slot = slots.take()
    slot.files.open()
    if not slot.files.past_cache:
        pytest.skip("the file system of the tests' folder has no direct writes")
    writes = Writes(monkeypatch)
    for stop in [*range(step, LARGE, step), LARGE]:
        slot.write("ema", large, stop)
    THREADS.submit(int).result()  # what was begun is done
    begun = writes.direct
    slot.finish({"ema": HEADER})

    path = tmp_path / slot.name / "ema.safetensors"
    assert path.read_bytes()[8192:] == large
    assert writes.direct + writes.cached == LARGE + 8192
    assert begun >= 16 << 20
    if patient:
        assert writes.cached <= 8192 + 4 * 4096
    else:
        assert writes.direct == begun


@pytest.mark.parametrize("patient", [True, False])
def test_stretches_are_written_each_by_itself(tmp_path: Path, large: memoryview, patient: bool) -> None:
    """Told of from many threads, in any order, with odd bounds; and one of them once more, whose first bytes were
    others."""
    slots = Slots(tmp_path, {"ema": Extent(8192, LARGE)}, [], Threads(2), patient=patient)
    slot, data = slots.take(), memoryview(bytearray(large))
    bounds = [0, 9_000_001, 10_000_000, 30_000_003, LARGE]

    def make(start: int, stop: int) -> None:
        for upto in [*range(start + (1 << 20), stop, 1 << 20), stop]:
            slot.write("ema", data, upto, start)

    data[bounds[2] : bounds[3]] = bytes(bounds[3] - bounds[2])
    make(bounds[2], bounds[3] - 5)
    data[bounds[2] : bounds[3]] = large[bounds[2] : bounds[3]]
    with ThreadPoolExecutor(4) as lanes:
        list(lanes.map(make, bounds[-2::-1], bounds[:0:-1]))
    assert slot.written("ema") == LARGE
    slot.finish({"ema": HEADER})

    assert (tmp_path / slot.name / "ema.safetensors").read_bytes()[8192:] == large


def test_stretch_that_is_missing(slots: Slots) -> None:
    """A version is not whole without it."""
    slot = slots.take()
    slot.write("slow", memoryview(DATA), 4000)
    slot.write("slow", memoryview(DATA), len(DATA), 8000)
    with pytest.raises(OSError, match=f"slow has {len(DATA) - 4000} bytes"):
        slot.finish({"slow": HEADER})


def test_two_write_at_once(tmp_path: Path, large: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk always has something to do: while one thread's piece is written another's begins. Never a third."""
    both, lock = threading.Barrier(2, timeout=20), threading.Lock()
    writing = most = 0
    pwrite = os.pwrite

    def meeting(descriptor: int, data: memoryview, position: int) -> int:
        nonlocal writing, most
        with lock:
            writing += 1
            most = max(most, writing)
        if 0 < position < 16 << 20:  # the first two pieces
            both.wait()
        written = pwrite(descriptor, data, position)
        with lock:
            writing -= 1
        return written

    slot = Slots(tmp_path, {"ema": Extent(8192, LARGE)}, [], Threads(4), patient=True).take()
    monkeypatch.setattr(os, "pwrite", meeting)
    for stop in [*range(1 << 20, LARGE, 1 << 20), LARGE]:
        slot.write("ema", large, stop)
    slot.finish({"ema": HEADER})

    assert (tmp_path / slot.name / "ema.safetensors").read_bytes()[8192:] == large
    assert most == 2


def test_memory_that_begins_within_a_page(tmp_path: Path, large: memoryview) -> None:
    """What cannot be written past the page cache is written through it."""
    data = large[100:]
    slot = Slots(tmp_path, {"ema": Extent(4096, len(data))}, [], THREADS, patient=True).take()
    slot.write("ema", data, len(data))
    slot.finish({"ema": HEADER})

    assert (tmp_path / slot.name / "ema.safetensors").read_bytes()[4096:] == data


def test_file_system_without_direct_writes(tmp_path: Path, large: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are kept there all the same."""
    real: Callable[..., int] = os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    slot = Slots(tmp_path, {"ema": Extent(4096, LARGE)}, [], THREADS, patient=True).take()
    slot.write("ema", large, LARGE)
    slot.finish({"ema": HEADER})

    assert (tmp_path / slot.name / "ema.safetensors").read_bytes()[4096:] == large


def test_file_system_that_wants_more_than_pages(
    tmp_path: Path, large: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where direct writes turn out to be refused, versions go through the page cache."""
    pwrite: Callable[[int, memoryview, int], int] = os.pwrite

    def refuse(descriptor: int, data: memoryview, position: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", refuse)
    slot = Slots(tmp_path, {"ema": Extent(4096, LARGE)}, [], THREADS, patient=True).take()
    for stop in (1 << 24, LARGE):
        slot.write("ema", large, stop)
    slot.finish({"ema": HEADER})

    assert (tmp_path / slot.name / "ema.safetensors").read_bytes()[4096:] == large


def test_failed_write_behind_is_told_at_the_end(
    tmp_path: Path, large: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the thread met is raised where the writer can hear it, and the slot is given back."""
    slots = Slots(tmp_path, {"ema": Extent(4096, LARGE)}, [], THREADS, patient=True)
    slot = slots.take()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _fails)
        for stop in range(1 << 20, LARGE, 1 << 20):
            slot.write("ema", large, stop)
        with pytest.raises(OSError, match="Input/output error"):
            slot.finish({"ema": HEADER})
    name = slot.name
    del slot

    assert slots.take().name == name


def test_slot_dropped_while_it_is_written(tmp_path: Path, large: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
    """A push that breaks off leaves its slot to the thread that writes, and nobody else gets it before that is done."""
    going_on = threading.Event()
    pwrite: Callable[[int, memoryview, int], int] = os.pwrite

    def slow(descriptor: int, data: memoryview, position: int) -> int:
        assert going_on.wait(30)
        return pwrite(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", slow)
    slots = Slots(tmp_path, {"ema": Extent(4096, LARGE)}, [], THREADS, patient=True)
    slot = slots.take()
    slot.write("ema", large, LARGE)
    del slot
    meanwhile = slots.take()
    going_on.set()
    THREADS.submit(int).result()

    assert meanwhile.name == "slots/1"
    assert slots.take().name == "slots/0"


def test_deleted_run_does_not_come_back(tmp_path: Path) -> None:
    """A slot of a run whose folder was removed meanwhile is not made."""
    slot = Slots(tmp_path / "gone", EXTENTS, [], THREADS).take()
    slot.write("slow", memoryview(DATA), len(DATA))

    with pytest.raises(FileNotFoundError):
        slot.finish(dict.fromkeys(EXTENTS, HEADER))
    assert not (tmp_path / "gone").exists()


def test_synced_slot_holds_no_descriptor(slots: Slots, tmp_path: Path) -> None:
    """A slot that is on the medium keeps no file open, however long it is held; it can be synced again."""
    before = open_below(tmp_path)
    slot = slots.take()
    fill(slot)
    assert len(open_below(tmp_path)) == len(before) + 2
    slot.files.sync()

    assert open_below(tmp_path) == before
    slot.files.sync()
    assert open_below(tmp_path) == before
