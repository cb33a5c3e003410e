"""The store: which files count, in which order things happen, what a crash in between leaves.

Knows data dirs. Does not know runs' states.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from ema_service.storage import RunRow, Store, store
from ema_service.storage.catalog import Catalog
from ema_service.storage.files import FolderLocked


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


def checkpoint_of(opened: Store, row: RunRow) -> tuple[str, bytes] | None:
    """State and data of the run's checkpoint."""
    found = opened.checkpoint(row)
    if found is None:
        return None
    file = opened.open_checkpoint(row, found, "ema")
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


def test_folder_is_private(folder: Path, opened: Callable[[], Store]) -> None:
    """The data dir is made with its parents, for this user only."""
    opened()

    assert folder.stat().st_mode & 0o777 == 0o700


def test_run_that_comes_again_has_another_folder(folder: Path, opened: Callable[[], Store]) -> None:
    """A run deleted and created again under its name shares no file with the old one."""
    first_store = opened()
    row = first_store.add_run("r", "{}", 1.0)
    first_store.save_checkpoint(row, "old", {"ema": [body(1)]})
    first_store.remove_run(row)
    again = first_store.add_run("r", "{}", 2.0)

    assert again.id != row.id
    assert checkpoint_of(first_store, again) is None
    assert names(folder / "runs") == [f"r.{again.id}"]


def test_checkpoints_alternate(folder: Path, opened: Callable[[], Store]) -> None:
    """The checkpoint that counts is never written to: two folders alternate, and one is left at the end."""
    kept = opened()
    row = kept.add_run("r", "{}", 1.0)
    seen = []
    for number in range(4):
        kept.save_checkpoint(row, f"state {number}", {"ema": [body(number)]})
        assert checkpoint_of(kept, row) == (f"state {number}", data(number))
        seen.append(names(folder / "runs" / f"r.{row.id}"))

    assert seen == [["checkpoint-a"], ["checkpoint-b"]] * 2


def test_amended_state_keeps_the_files(opened: Callable[[], Store]) -> None:
    """amend_checkpoint changes what is said of the state, not the weights; without a checkpoint it does nothing."""
    kept = opened()
    row = kept.add_run("r", "{}", 1.0)
    kept.amend_checkpoint(row, "nothing")
    assert kept.checkpoint(row) is None
    kept.save_checkpoint(row, "first", {"ema": [body(1)]})
    kept.amend_checkpoint(row, "second")

    assert checkpoint_of(kept, row) == ("second", data(1))


@pytest.mark.parametrize("where", ["first file", "last file", "row", "removal"])
def test_crash_in_the_middle_of_a_checkpoint(
    where: str, opened: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a crash comes while a checkpoint is written, the old or the new one counts, whole."""
    kept = opened()
    row = kept.add_run("r", "{}", 1.0)
    kept.save_checkpoint(row, "old", {"ema": [body(1)], "fast": [body(1)]})

    def crash(*_: object) -> None:
        raise Crash

    def chunks(here: bool) -> Iterator[bytes]:
        yield body(2)[:30]
        if here:
            crash()
        yield body(2)[30:]

    with monkeypatch.context() as patch:
        if where == "row":
            patch.setattr(Catalog, "put_checkpoint", crash)
        if where == "removal":
            # The first removal clears the folder to be written, the second what counted before.
            removals: Iterator[Callable[[Path], None]] = iter([store._remove_tree, crash])
            patch.setattr(store, "_remove_tree", lambda path: next(removals)(path))
        with pytest.raises(Crash):
            kept.save_checkpoint(
                row, "new", {"ema": chunks(where == "first file"), "fast": chunks(where == "last file")}
            )
    kept = opened()

    assert checkpoint_of(kept, row) == (("new", data(2)) if where == "removal" else ("old", data(1)))
    kept.save_checkpoint(row, "newest", {"ema": [body(3)], "fast": [body(3)]})
    assert checkpoint_of(kept, row) == ("newest", data(3))


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
            kept.save_snapshot(row, "s", "{}", {"gone": [body(1)], "ema": chunks()})
    kept = opened()
    assert kept.snapshots(row) == []
    kept.save_snapshot(row, "s", "{}", {"ema": [body(2)]})

    assert [each.name for each in kept.snapshots(row)] == ["s"]
    assert names(folder / "runs" / f"r.{row.id}" / "snapshots" / "s") == ["ema.safetensors"]


def test_crash_in_the_middle_of_a_removal(opened: Callable[[], Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose files could not all be removed is gone all the same: its row went first."""
    kept = opened()
    row = kept.add_run("r", "{}", 1.0)
    kept.save_checkpoint(row, "old", {"ema": [body(1)]})

    def crash(_: Path) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(store, "_remove_tree", crash)
        with pytest.raises(Crash):
            kept.remove_run(row)

    assert opened().runs() == []


def test_files_that_cannot_be_removed_are_logged(
    opened: Callable[[], Store], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be removed costs disk space and a line in the log, nothing else."""
    kept = opened()
    row = kept.add_run("r", "{}", 1.0)
    kept.save_snapshot(row, "s", "{}", {"ema": [body(1)]})

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        kept.remove_snapshot(row, "s")

    assert kept.snapshots(row) == []
    assert "Permission denied" in caplog.text


def test_history_is_kept(opened: Callable[[], Store]) -> None:
    """record() adds a line with its time to the run's history."""
    kept = opened()
    row = kept.add_run("r", "{}", 1.0)
    kept.record(row, "decay set to 0.5")

    [(at, event)] = opened()._catalog.history(row.id)
    assert event == "decay set to 0.5"
    assert at > 1e9
