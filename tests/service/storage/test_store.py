"""The store: which files count, in which order things happen, what a crash in between leaves.

Knows data dirs. Does not know runs' states.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from ema_service.storage import TIMELINE_LINES, CatalogUnusable, Extent, RunRow, Slot, Store, TimelineRow, store
from ema_service.storage.catalog import Catalog
from ema_service.storage.files import FolderLocked
from ema_service.storage.space import DiskSpace

EXTENTS = {"ema": Extent(4096, 12)}


class Crash(BaseException):
    """The process ends here."""


def body(value: float) -> bytes:
    return save({"w": torch.full((3,), value, dtype=torch.float32)})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def opened(folder: Path) -> Iterator[Callable[[], Store]]:
    """Open the store, closing the one before as a crash would: nothing is written."""
    stores: list[Store] = []

    def open_store() -> Store:
        for each in stores:
            each.close()
        stores[:] = [Store(folder)]
        return stores[0]

    yield open_store
    for each in stores:
        each.close()


def keep(store: Store, row: RunRow, state: str, value: float) -> Slot:
    """Write a version to a slot and make it the run's newest checkpoint."""
    slot = store.slots(row, EXTENTS, behind=True, patient=True).take()
    write(slot, value)
    store.put_checkpoint(row, slot.name, state, synced=True, durable=True)
    return slot


def write(slot: Slot, value: float) -> None:
    for average in EXTENTS:
        slot.write(average, memoryview(data(value)), len(data(value)))
    slot.finish(dict.fromkeys(EXTENTS, body(value)[:-12]))


def newest(store: Store, row: RunRow) -> tuple[str, bytes] | None:
    """State and data of the run's newest checkpoint."""
    found = next(iter(store.checkpoints(row)), None)
    if found is None:
        return None
    file = store.open_checkpoint(row, found, "ema")
    try:
        return found.state, bytes(file.read(0, file.header.data_bytes))
    finally:
        file.close()


def data(value: float) -> bytes:
    return body(value)[-12:]


def test_second_store_is_refused(folder: Path, opened: Callable[[], Store]) -> None:
    """One store at a time has the folder, also in one process; the refused one leaves the lock where it is."""
    opened()
    for _ in range(2):
        with pytest.raises(FolderLocked, match="another server"):
            Store(folder)


def test_second_store_is_refused_without_the_file(folder: Path, opened: Callable[[], Store]) -> None:
    """A lock file that somebody removed, or put another in the place of, lets no second server in."""
    opened()
    (folder / "lock").unlink()
    with pytest.raises(FolderLocked, match="another server"):
        Store(folder)
    assert (folder / "lock").exists()
    with pytest.raises(FolderLocked, match="another server"):
        Store(folder)


@pytest.mark.parametrize("name", ["catalog.db", "catalog.db-wal"])
@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_catalog_that_is_gone_takes_no_row(name: str, what: str, folder: Path, opened: Callable[[], Store]) -> None:
    """Where the database, or its log, is not what the next start would find, a write is refused and says so."""
    store = opened()
    row = store.add_run("r", "{}", 1.0)
    aside = folder / "aside"
    (folder / name).rename(aside)
    if what == "replaced":
        shutil.copy(aside, folder / name)
    for write in (lambda: store.set_writer(row, 1), lambda: store.add_run("s", "{}", 1.0)):
        with pytest.raises(sqlite3.OperationalError, match=rf"{name} was removed or replaced"):
            write()
    assert [each.name for each in store.runs()] == ["r"]
    aside.replace(folder / name)
    store.set_writer(row, 2)


def test_folder_is_private(folder: Path, opened: Callable[[], Store]) -> None:
    """The data dir is made with its parents, for this user only."""
    opened()

    assert folder.stat().st_mode & 0o777 == 0o700


def test_run_that_comes_again_has_another_folder(folder: Path, opened: Callable[[], Store]) -> None:
    """A run deleted and created again under its name shares no file with the old one."""
    first_store = opened()
    row = first_store.add_run("r", "{}", 1.0)
    keep(first_store, row, "old", 1)
    first_store.remove_run(row)
    again = first_store.add_run("r", "{}", 2.0)

    assert again.id != row.id
    assert newest(first_store, again) is None
    assert names(folder / "runs") == [f"r.{again.id}"]


def test_newest_checkpoint_counts(opened: Callable[[], Store]) -> None:
    """Of several slots the one whose row came last counts, for the next process too; amending it keeps the files."""
    kept = opened()
    row = kept.add_run("r", "{}", 1.0)
    slots = kept.slots(row, EXTENTS, behind=True, patient=True)
    held = []
    for number in range(3):
        held.append(slots.take())
        write(held[-1], number)
        kept.put_checkpoint(row, held[-1].name, f"state {number}", synced=False, durable=False)
        assert newest(kept, row) == (f"state {number}", data(number))
    kept.amend_checkpoint(kept.checkpoints(row)[0], "amended", durable=False)

    assert newest(opened(), row) == ("amended", data(2))


def test_folders_of_deleted_runs_are_removed(
    folder: Path, opened: Callable[[], Store], caplog: pytest.LogCaptureFixture
) -> None:
    """What a crash kept of a deleted run goes at the next start; what no row ever spoke of is left alone, and said."""
    kept = opened()
    gone, row = kept.add_run("gone", "{}", 1.0), kept.add_run("r", "{}", 1.0)
    keep(kept, row, "state", 1)
    kept._catalog.remove_run(gone.id)
    for stranger in ("another.99", "notes"):
        (folder / "runs" / stranger).mkdir()
    caplog.set_level("INFO")
    kept = opened()

    assert names(folder / "runs") == ["another.99", "notes", f"r.{row.id}"]
    assert newest(kept, row) == ("state", data(1))
    assert "gone.1" in caplog.text
    assert "another.99" in caplog.text


def test_missing_catalog_is_no_empty_one(folder: Path, opened: Callable[[], Store]) -> None:
    """Where runs lie without a catalog the store does not begin anew over them."""
    kept = opened()
    kept.add_run("r", "{}", 1.0)
    for path in folder.glob("catalog.db*"):
        path.unlink()

    with pytest.raises(CatalogUnusable, match="restore it from a backup"):
        opened()
    assert names(folder / "runs") == ["r.1"]


def test_run_whose_folder_was_never_made(folder: Path, opened: Callable[[], Store]) -> None:
    """A power loss may leave the row of a run without its folder: the run can be written to all the same."""
    row = opened().add_run("r", "{}", 1.0)
    shutil.rmtree(folder / "runs" / "r.1")
    kept = opened()
    keep(kept, row, "state", 1)

    assert newest(kept, row) == ("state", data(1))


@pytest.mark.parametrize("where", ["file", "row"])
def test_crash_in_the_middle_of_a_snapshot(
    where: str, folder: Path, opened: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot that was not finished is not there; taken again under its name, nothing of the first is left."""
    kept = opened()
    row = kept.add_run("r", "{}", 1.0)

    def crash(*_: object) -> None:
        raise Crash

    def chunks() -> Iterator[bytes]:
        yield body(1)
        if where == "file":
            crash()

    with monkeypatch.context() as patch:
        if where == "row":
            patch.setattr(Catalog, "add_snapshot", crash)
        with pytest.raises(Crash):
            kept.save_snapshot(row, "s", lambda: "{}", {"gone": [body(1)], "ema": chunks()})
    kept = opened()
    assert kept.snapshots(row) == []
    kept.save_snapshot(row, "s", lambda: "{}", {"ema": [body(2)]})

    assert [each.name for each in kept.snapshots(row)] == ["s"]
    assert names(folder / "runs" / f"r.{row.id}" / "snapshots" / "s") == ["ema.safetensors"]


def test_crash_in_the_middle_of_a_removal(
    opened: Callable[[], Store], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose files could not all be removed is gone all the same: its row went first. A restart removes them."""
    kept = opened()
    row = kept.add_run("r", "{}", 1.0)
    keep(kept, row, "old", 1)

    def crash(_: Path) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(store, "remove_tree", crash)
        with pytest.raises(Crash):
            kept.remove_run(row)

    assert names(folder / "runs") != []
    assert opened().runs() == []
    assert names(folder / "runs") == []


def test_files_that_cannot_be_removed_are_logged(
    opened: Callable[[], Store], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be removed costs disk space and a line in the log, nothing else."""
    kept = opened()
    row = kept.add_run("r", "{}", 1.0)
    kept.save_snapshot(row, "s", lambda: "{}", {"ema": [body(1)]})

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        kept.remove_snapshot(row, "s")

    assert kept.snapshots(row) == []
    assert "Permission denied" in caplog.text


def test_room_is_promised_once(opened: Callable[[], Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """Room of the disk that somebody is taking is given to nobody else, until it is taken or is not needed."""
    kept = opened()
    monkeypatch.setattr(kept, "space", lambda: DiskSpace(free=100, total=200, floor=10))
    for _ in range(2):
        with contextlib.suppress(ZeroDivisionError), kept.taking(60):
            with pytest.raises(OSError, match="100 bytes free"), kept.taking(31):
                pass
            with kept.taking(30):
                raise ZeroDivisionError
    with kept.taking(90):
        pass


def test_timeline_is_kept(opened: Callable[[], Store]) -> None:
    """record() adds a line to the run's timeline; the oldest of too many lines goes."""
    kept = opened()
    row = kept.add_run("r", "{}", 1.0)
    lines = [TimelineRow(float(n), "decay_changed", n, n, "decay set to 0.5") for n in range(TIMELINE_LINES + 3)]
    for line in lines:
        kept.record(row, line)

    again = opened()
    assert again.timeline(row, 0.0, 2 * TIMELINE_LINES) == lines[3:]
    assert again.timeline(row, 0.0, 2) == lines[-2:]
    assert again.timeline(row, TIMELINE_LINES, 9) == lines[-2:]
