"""The catalog: rows that are there when the call returns, and formats.

Knows SQL rows. Does not know files or JSON.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ema_client.protocol import SWEEPS_KEPT
from ema_service.storage import CatalogUnusable, CheckpointRow, ShardRow, SnapshotRow, SweepRow, TimelineRow
from ema_service.storage.catalog import FORMAT, Catalog

LINE = TimelineRow(4.5, "created", None, None, "created with 2 tensors")


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
    row = catalog.put_checkpoint(run.id, "slots/0", "{1}", 2.5, synced=False, durable=False)
    catalog.add_snapshot(SnapshotRow(run.id, "s", "{2}", 3.5))
    catalog.add_line(run.id, LINE)
    catalog.add_sweep(run.id, SweepRow("key", "{4}"))
    other = Catalog(path)

    assert other.runs() == [run]
    assert other.checkpoints(run.id) == [row] == [CheckpointRow(row.id, run.id, "slots/0", "{1}", False, 2.5)]
    assert other.snapshots(run.id) == [SnapshotRow(run.id, "s", "{2}", 3.5)]
    assert other.timeline(run.id, 0.0, 10) == [LINE]
    assert other.sweeps(run.id) == [SweepRow("key", "{4}")]
    other.close()


def test_one_row_for_each_slot(catalog: Catalog) -> None:
    """A slot's row takes the place of the one before and is the newest; runs do not share them."""
    first, second = catalog.add_run("a", "{}", 1.0), catalog.add_run("b", "{}", 2.0)
    for folder, state in (("slots/0", "{0}"), ("slots/1", "{1}"), ("slots/0", "{2}")):
        catalog.put_checkpoint(first.id, folder, state, 3.0, synced=True, durable=True)

    assert [(row.folder, row.state) for row in catalog.checkpoints(first.id)] == [
        ("slots/0", "{2}"),
        ("slots/1", "{1}"),
    ]
    assert catalog.checkpoints(second.id) == []


def test_row_is_amended(catalog: Catalog) -> None:
    """What is said of a state, and whether it is synced, change apart from one another; the order of rows stays."""
    run = catalog.add_run("r", "{}", 1.0)
    rows = [catalog.put_checkpoint(run.id, f"slots/{k}", "{}", 3.0, synced=False, durable=False) for k in range(2)]
    catalog.mark_synced(rows[0].id)
    catalog.amend_checkpoint(rows[0].id, "{new}", durable=True)

    assert catalog.checkpoints(run.id) == [rows[1], replace(rows[0], synced=True, state="{new}")]


def test_durable_is_synced(catalog: Catalog) -> None:
    """Only a transaction asked to be durable, as all are by default, has the database sync its log."""
    run = catalog.add_run("r", "{}", 1.0)
    row = catalog.put_checkpoint(run.id, "slots/0", "{}", 3.0, synced=False, durable=False)
    assert _synchronous(catalog) == _NORMAL
    catalog.mark_synced(row.id)
    assert _synchronous(catalog) == _FULL
    catalog.amend_checkpoint(row.id, "{}", durable=False)
    assert _synchronous(catalog) == _NORMAL
    catalog.mark_synced(row.id)
    assert _synchronous(catalog) == _FULL
    catalog.add_line(run.id, LINE)
    assert _synchronous(catalog) == _NORMAL


_NORMAL, _FULL = 1, 2


def _synchronous(catalog: Catalog) -> int:
    return int(catalog._db.execute("PRAGMA synchronous").fetchone()[0])


def test_removed_run_takes_everything_along(catalog: Catalog) -> None:
    """Removing a run removes its checkpoint, snapshots, timeline and sweeps; its id is never given again."""
    run, other = catalog.add_run("r", "{}", 1.0), catalog.add_run("other", "{}", 1.0)
    for each in (run, other):
        catalog.put_checkpoint(each.id, "slots/0", "{}", 2.0, synced=True, durable=True)
        catalog.add_snapshot(SnapshotRow(each.id, "s", "{}", 3.0))
        catalog.add_line(each.id, LINE)
        catalog.add_sweep(each.id, SweepRow(None, "{}"))
    catalog.remove_run(other.id)

    assert catalog.runs() == [run]
    assert (catalog.checkpoints(other.id), catalog.snapshots(other.id), catalog.timeline(other.id, 0, 9)) == (
        [],
        [],
        [],
    )
    assert catalog.sweeps(other.id) == []
    assert len(catalog.snapshots(run.id)) == len(catalog.sweeps(run.id)) == 1
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
    """Snapshots are listed in the order they were made, whatever the clock said; a removed one is gone."""
    run = catalog.add_run("r", "{}", 1.0)
    for name, at in (("b", 2.0), ("c", 1.0), ("a", 2.0)):
        catalog.add_snapshot(SnapshotRow(run.id, name, "{}", at))
    assert [row.name for row in catalog.snapshots(run.id)] == ["b", "c", "a"]
    catalog.remove_snapshot(run.id, "a")

    assert [row.name for row in catalog.snapshots(run.id)] == ["b", "c"]


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

    assert sorted(row.name for row in catalog.snapshots(run.id)) == [f"s{number:02}" for number in range(80)]


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


WITHOUT_SHARDS = """
DROP TABLE directory;
DROP TABLE shards;
DROP TABLE checkpoints;
CREATE TABLE checkpoints (
    id INTEGER PRIMARY KEY AUTOINCREMENT, run_id INTEGER NOT NULL REFERENCES runs(id) ON DELETE CASCADE,
    folder TEXT NOT NULL, state TEXT NOT NULL, synced INTEGER NOT NULL, created_at REAL NOT NULL,
    UNIQUE (run_id, folder));
"""

HISTORY = """
DROP TABLE sweeps;
DROP TABLE timeline;
CREATE TABLE history (
    run_id INTEGER NOT NULL REFERENCES runs(id) ON DELETE CASCADE, at REAL NOT NULL, event TEXT NOT NULL);
INSERT INTO history VALUES (1, 1.5, 'decay of ema set to 0.5');
INSERT INTO history VALUES (1, 2.5, 'rewound to snapshot s (version 1.3, step 3)');
"""

FORMAT_1 = """
CREATE TABLE runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, config TEXT NOT NULL, created_at REAL NOT NULL);
CREATE TABLE checkpoints (
    run_id INTEGER PRIMARY KEY REFERENCES runs(id) ON DELETE CASCADE,
    folder TEXT NOT NULL, state TEXT NOT NULL, created_at REAL NOT NULL);
CREATE TABLE snapshots (
    run_id INTEGER NOT NULL REFERENCES runs(id) ON DELETE CASCADE,
    name TEXT NOT NULL, info TEXT NOT NULL, created_at REAL NOT NULL, PRIMARY KEY (run_id, name));
CREATE TABLE history (
    run_id INTEGER NOT NULL REFERENCES runs(id) ON DELETE CASCADE, at REAL NOT NULL, event TEXT NOT NULL);
PRAGMA user_version = 1;
INSERT INTO runs VALUES (7, 'r', '{}', 1.5);
INSERT INTO checkpoints VALUES (7, 'checkpoint-b', '{1}', 2.5);
"""


def test_format_1_is_migrated(path: Path) -> None:
    """A catalog of format 1 keeps its runs and checkpoints, which were synced; its format is the present one then."""
    database = sqlite3.connect(path)
    database.executescript(FORMAT_1)
    database.close()
    catalog = Catalog(path)
    run = catalog.runs()[0]

    assert (run.id, run.name) == (7, "r")
    assert catalog.checkpoints(7) == [CheckpointRow(1, 7, "checkpoint-b", "{1}", True, 2.5)]
    assert catalog._read("PRAGMA user_version") == [(FORMAT,)]
    catalog.remove_run(7)
    assert catalog.checkpoints(7) == []
    catalog.close()


@pytest.mark.parametrize("old", [2, 3, 4, 5, 6])
def test_later_formats_are_migrated(old: int, path: Path) -> None:
    """Their catalogs keep what they have and say so no longer: the servers of format 2 know no copied tensors, those of
    3 other checksums, of 4 no memory files, of 5 no averages but those of a run's creation, of 6 no kinds of lines."""
    catalog = Catalog(path)
    catalog.add_run("r", "{}", 1.5)
    before = catalog.runs()
    catalog.close()
    database = sqlite3.connect(path)
    if old < 6:
        database.execute("ALTER TABLE runs DROP COLUMN averages")
    database.executescript(WITHOUT_SHARDS + HISTORY)
    database.execute(f"PRAGMA user_version = {old}")
    database.close()

    catalog = Catalog(path)
    assert catalog.runs() == before
    catalog.set_averages(before[0].id, "{2}")
    assert [run.averages for run in catalog.runs()] == ["{2}"]
    assert catalog.timeline(before[0].id, 0.0, 9) == [
        TimelineRow(1.5, "decay_changed", None, None, "decay of ema set to 0.5"),
        TimelineRow(2.5, "rewound", None, None, "rewound to snapshot s (version 1.3, step 3)"),
    ]
    assert catalog._read("PRAGMA user_version") == [(FORMAT,)]
    catalog.add_sweep(before[0].id, SweepRow(None, "{}"))
    catalog.close()


def test_sweeps_come_with_format_8(path: Path) -> None:
    """A catalog of format 7 keeps its lines as they are; the oldest of nine sweeps of a run goes, no other run's."""
    catalog = Catalog(path)
    runs = [catalog.add_run(name, "{}", 1.5) for name in ("a", "b")]
    catalog.add_line(runs[0].id, LINE)
    catalog.close()
    database = sqlite3.connect(path)
    database.executescript(WITHOUT_SHARDS + "DROP TABLE sweeps; PRAGMA user_version = 7")
    database.close()

    catalog = Catalog(path)
    assert catalog.timeline(runs[0].id, 0.0, 9) == [LINE]
    for k in range(SWEEPS_KEPT + 1):
        for run in runs:
            catalog.add_sweep(run.id, SweepRow(str(k), f"{{{k}}}"))
    for run in runs:
        assert [row.key for row in catalog.sweeps(run.id)] == [str(k) for k in range(1, SWEEPS_KEPT + 1)]
    with pytest.raises(sqlite3.IntegrityError):
        catalog.add_sweep(99, SweepRow(None, "{}"))
    catalog.close()


def test_objects_come_with_format_9(path: Path) -> None:
    """A catalog of format 8 keeps its snapshots, all in the data dir. A folder of the object store belongs to one
    snapshot, or is to be removed, whichever way the snapshot goes."""
    catalog = Catalog(path)
    run = catalog.add_run("r", "{}", 1.5)
    rows = [SnapshotRow(run.id, name, "{}", 2.5) for name in ("a", "b", "c")]
    for row in rows:
        catalog.add_snapshot(row)
    catalog.close()
    database = sqlite3.connect(path)
    database.executescript(WITHOUT_SHARDS + "DROP TABLE objects; DROP TABLE removals; PRAGMA user_version = 8")
    database.close()

    catalog = Catalog(path)
    assert catalog.snapshots(run.id) == catalog.snapshots_here() == rows
    for row in rows:
        catalog.add_removal(f"r/{row.name}")
        catalog.add_removal(f"r/{row.name}")
    assert catalog.place_snapshot(rows[0], "r/a", "{1}")
    assert not catalog.place_snapshot(replace(rows[1], created_at=9.0), "r/b", "{1}"), "another one of its name"
    assert catalog.snapshots(run.id) == [replace(rows[0], folder="r/a", files="{1}"), *rows[1:]]
    assert (catalog.snapshots_here(), catalog.removals()) == (rows[1:], ["r/b", "r/c"])
    catalog.adopt_snapshot(SnapshotRow(run.id, "d", "{}", 3.5, "r/d", "{2}"))
    with pytest.raises(sqlite3.IntegrityError):
        catalog.adopt_snapshot(SnapshotRow(run.id, "e", "{}", 3.5, "r/d", "{2}"))
    assert [row.name for row in catalog.snapshots(run.id)] == ["a", "b", "c", "d"], "all or nothing"
    catalog.drop_removal("r/b")
    catalog.remove_snapshot(run.id, "a")
    assert catalog.removals() == ["r/c", "r/a"]
    catalog.remove_run(run.id)
    assert catalog.removals() == ["r/c", "r/a", "r/d"]
    catalog.close()


def test_shards_come_with_format_10(path: Path) -> None:
    """A catalog of format 9 keeps its runs, which are no shards, and their checkpoints in order; each slot has one row
    as before."""
    catalog = Catalog(path)
    run = catalog.add_run("r", "{}", 1.5)
    catalog.close()
    database = sqlite3.connect(path)
    database.executescript(
        WITHOUT_SHARDS
        + """
        INSERT INTO checkpoints VALUES (7, 1, 'slots/1', '{7}', 1, 2.5);
        INSERT INTO checkpoints VALUES (8, 1, 'slots/0', '{8}', 0, 3.5);
        PRAGMA user_version = 9"""
    )
    database.close()

    catalog = Catalog(path)
    kept = [
        CheckpointRow(8, run.id, "slots/0", "{8}", False, 3.5),
        CheckpointRow(7, run.id, "slots/1", "{7}", True, 2.5),
    ]
    assert catalog.checkpoints(run.id) == kept
    assert catalog.shard(run.id) is None
    again = catalog.put_checkpoint(run.id, "slots/1", "{9}", 4.5, synced=False, durable=False)
    assert catalog.checkpoints(run.id) == [again, kept[0]]
    assert again.id > kept[0].id
    assert catalog._read("PRAGMA user_version") == [(FORMAT,)]
    catalog.close()


def test_directory_comes_with_format_11(path: Path) -> None:
    """A catalog of format 10 keeps its shards, and belongs to no host."""
    catalog = Catalog(path)
    run = catalog.add_run("r", "{}", 1.5, shard=ShardRow(1, 3, "{1}"))
    catalog.close()
    database = sqlite3.connect(path)
    database.executescript(
        """
        DROP TABLE directory;
        ALTER TABLE shards DROP COLUMN birth;
        ALTER TABLE shards DROP COLUMN whole;
        PRAGMA user_version = 10"""
    )
    database.close()

    catalog = Catalog(path)
    assert catalog.shard(run.id) == ShardRow(1, 3, "{1}")
    assert (catalog.whole(run.id), catalog.directory()) == ("", None)
    assert catalog._read("PRAGMA user_version") == [(FORMAT,)]
    catalog.close()


# --- the directory of a cluster's runs -----------------------------------------------------------------------------


def test_directory_and_a_deletion_are_one_transaction(path: Path) -> None:
    """The directory's record is replaced and a run goes, or neither; a shard comes with its birth and the whole run's
    configuration."""
    catalog = Catalog(path)
    catalog.open_directory(1, 3)
    assert catalog.directory() == ShardRow(1, 3)
    kept, gone = (catalog.add_run(name, "{}", 1.5, shard=ShardRow(1, 3, "", 4, "{w}")) for name in "ab")
    assert catalog.shard(kept.id) == ShardRow(1, 3, "", 4)
    assert catalog.whole(kept.id) == "{w}"
    catalog.keep_directory("{2}", gone.id)
    assert (catalog.runs(), catalog.directory()) == ([kept], ShardRow(1, 3, "{2}"))
    catalog._db.execute("CREATE TRIGGER t BEFORE DELETE ON runs BEGIN SELECT RAISE(ABORT, 'no'); END")
    with pytest.raises(sqlite3.IntegrityError):
        catalog.keep_directory("{3}", kept.id)
    assert (catalog.runs(), catalog.directory()) == ([kept], ShardRow(1, 3, "{2}"))
    catalog.close()


# --- shards ---------------------------------------------------------------------------------------------------------


def vote(folder: str, revision: int, state: str = "{}") -> CheckpointRow:
    return CheckpointRow(0, 1, folder, state, True, 1.0, revision)


def test_record_and_version_are_one_transaction(catalog: Catalog) -> None:
    """A vote is the record and the version's row; another record takes rows along that it does not speak of; and where
    a part of it cannot be written, nothing is."""
    run = catalog.add_run("r", "{}", 1.0, shard=ShardRow(1, 3))
    assert catalog.shard(run.id) == ShardRow(1, 3, "")
    first = catalog.put_vote(run.id, "{1}", vote("slots/0", 1), None, durable=True)
    assert (catalog.shard(run.id), catalog.checkpoints(run.id)) == (ShardRow(1, 3, "{1}"), [first])

    catalog.keep_record(run.id, "{2}", 1, durable=True)
    assert (catalog.shard(run.id), catalog.checkpoints(run.id)) == (ShardRow(1, 3, "{2}"), [first])
    second = catalog.put_vote(run.id, "{3}", vote("slots/1", 2), first.id, durable=True)
    assert catalog.checkpoints(run.id) == [second, first]
    for spoiled in (lambda: vote("slots/2", 2, None), lambda: vote("slots/0", 2, None)):  # type: ignore[arg-type]
        with pytest.raises(sqlite3.IntegrityError):
            catalog.put_vote(run.id, "{4}", spoiled(), first.id, durable=True)
        assert (catalog.shard(run.id), catalog.checkpoints(run.id)) == (ShardRow(1, 3, "{3}"), [second, first])
    catalog.keep_record(run.id, "{5}", 1, durable=True)
    assert (catalog.shard(run.id), catalog.checkpoints(run.id)) == (ShardRow(1, 3, "{5}"), [first])
    catalog.remove_run(run.id)
    assert (catalog.shard(run.id), catalog.checkpoints(run.id)) == (None, [])


def test_rows_of_a_slot_that_is_voted_for(catalog: Catalog) -> None:
    """A vote takes the place of an earlier vote, and of what its slot held; the newest version's row stays, also where
    its very bytes are voted for under another decay."""
    run = catalog.add_run("r", "{}", 1.0, shard=ShardRow(0, 2))
    first = catalog.put_vote(run.id, "{}", vote("slots/0", 1), None, durable=False)
    second = catalog.put_vote(run.id, "{}", vote("slots/1", 2), first.id, durable=False)
    assert catalog.checkpoints(run.id) == [second, first]
    third = catalog.put_vote(run.id, "{}", vote("slots/2", 2), first.id, durable=False)
    assert catalog.checkpoints(run.id) == [third, first], "another vote of the same revision"
    amended = catalog.put_vote(run.id, "{}", vote("slots/2", 3), third.id, durable=False)
    assert catalog.checkpoints(run.id) == [amended, third, first]
    fresh = catalog.put_vote(run.id, "{}", vote("slots/0", 4), amended.id, durable=False)
    assert catalog.checkpoints(run.id) == [fresh, amended, third]


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
