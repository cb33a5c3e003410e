"""The catalog: rows that are there when the call returns, and formats.

Knows SQL rows. Does not know files or JSON.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ema_service.storage import CatalogUnusable, CheckpointRow, SnapshotRow
from ema_service.storage.catalog import FORMAT, Catalog


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.db"


@pytest.fixture
def catalog(path: Path) -> Iterator[Catalog]:
    catalog = Catalog(path)
    yield catalog
    catalog.close()


def test_rows_are_there_for_the_next(catalog: Catalog, path: Path) -> None:
    """What a call has written another connection reads at once, without a close in between."""
    run = catalog.add_run("r", "{}", 1.5)
    catalog.put_checkpoint(CheckpointRow(run.id, "checkpoint-a", "{1}", 2.5))
    catalog.add_snapshot(SnapshotRow(run.id, "s", "{2}", 3.5))
    catalog.add_history(run.id, 4.5, "created")
    other = Catalog(path)

    assert other.runs() == [run]
    assert other.checkpoint(run.id) == CheckpointRow(run.id, "checkpoint-a", "{1}", 2.5)
    assert other.snapshots(run.id) == [SnapshotRow(run.id, "s", "{2}", 3.5)]
    assert other.history(run.id) == [(4.5, "created")]
    other.close()


def test_one_checkpoint_for_each_run(catalog: Catalog) -> None:
    """A checkpoint takes the place of the one before; runs do not share them."""
    first, second = catalog.add_run("a", "{}", 1.0), catalog.add_run("b", "{}", 2.0)
    for folder in ("checkpoint-a", "checkpoint-b"):
        catalog.put_checkpoint(CheckpointRow(first.id, folder, "{}", 3.0))

    assert catalog.checkpoint(first.id) == CheckpointRow(first.id, "checkpoint-b", "{}", 3.0)
    assert catalog.checkpoint(second.id) is None


def test_removed_run_takes_everything_along(catalog: Catalog) -> None:
    """Removing a run removes its checkpoint, snapshots and history; its id is never given again."""
    run, other = catalog.add_run("r", "{}", 1.0), catalog.add_run("other", "{}", 1.0)
    for each in (run, other):
        catalog.put_checkpoint(CheckpointRow(each.id, "checkpoint-a", "{}", 2.0))
        catalog.add_snapshot(SnapshotRow(each.id, "s", "{}", 3.0))
        catalog.add_history(each.id, 4.0, "created")
    catalog.remove_run(other.id)

    assert catalog.runs() == [run]
    assert (catalog.checkpoint(other.id), catalog.snapshots(other.id), catalog.history(other.id)) == (None, [], [])
    assert len(catalog.snapshots(run.id)) == 1
    assert catalog.add_run("other", "{}", 5.0).id > other.id


def test_names_are_unique(catalog: Catalog) -> None:
    """Two runs of one name, or two snapshots of one name in a run, are impossible."""
    run = catalog.add_run("r", "{}", 1.0)
    catalog.add_snapshot(SnapshotRow(run.id, "s", "{}", 1.0))

    with pytest.raises(sqlite3.IntegrityError):
        catalog.add_run("r", "{}", 2.0)
    with pytest.raises(sqlite3.IntegrityError):
        catalog.add_snapshot(SnapshotRow(run.id, "s", "{}", 2.0))


def test_snapshots_oldest_first(catalog: Catalog) -> None:
    """Snapshots are listed by their time, then by name; a removed one is gone."""
    run = catalog.add_run("r", "{}", 1.0)
    for name, at in (("b", 2.0), ("c", 1.0), ("a", 2.0)):
        catalog.add_snapshot(SnapshotRow(run.id, name, "{}", at))
    assert [row.name for row in catalog.snapshots(run.id)] == ["c", "a", "b"]
    catalog.remove_snapshot(run.id, "a")

    assert [row.name for row in catalog.snapshots(run.id)] == ["c", "b"]


def test_many_threads(catalog: Catalog) -> None:
    """Threads share a catalog: nothing is lost."""
    run = catalog.add_run("r", "{}", 1.0)

    def add(first: int) -> None:
        for number in range(first, 80, 8):
            catalog.add_snapshot(SnapshotRow(run.id, f"s{number:02}", "{}", float(number)))

    threads = [threading.Thread(target=add, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert [row.name for row in catalog.snapshots(run.id)] == [f"s{number:02}" for number in range(80)]


def test_text_is_kept_as_it_is(catalog: Catalog) -> None:
    """Quotes, NULs and emoji in a text come back unchanged: values never become SQL."""
    text = "'); DROP TABLE runs; -- \0 \U0001f600"
    run = catalog.add_run("r", text, 1.0)

    assert catalog.runs() == [run]
    assert run.config == text


def test_newer_format_is_refused(path: Path) -> None:
    """A catalog of a newer format is refused, naming the file and both formats, and not written to."""
    Catalog(path).close()
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA user_version = {FORMAT + 1}")
    database.close()
    before = path.read_bytes()

    with pytest.raises(CatalogUnusable) as refusal:
        Catalog(path)

    assert str(path) in str(refusal.value)
    assert f"format {FORMAT + 1}" in str(refusal.value)
    assert path.read_bytes() == before


def test_file_that_is_no_database(path: Path) -> None:
    """A file that is no database is refused and left alone."""
    path.write_bytes(b"this is no database" * 1000)

    with pytest.raises(CatalogUnusable, match="not a database"):
        Catalog(path)
    assert path.read_bytes() == b"this is no database" * 1000


def test_opening_again_keeps_the_format(path: Path) -> None:
    """The tables are made once."""
    for _ in range(3):
        Catalog(path).close()
    database = sqlite3.connect(path)

    assert database.execute("PRAGMA user_version").fetchone() == (FORMAT,)
    database.close()
