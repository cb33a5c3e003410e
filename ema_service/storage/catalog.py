"""The catalog: a SQLite database that says which runs, checkpoints and snapshots there are.

A file counts only once its row is in the catalog; a row is written after its file's bytes. Configurations and states
are JSON texts, which the catalog does not parse.

Knows rows and SQL. Does not know files, JSON, torch, or what a run does.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ema_client.protocol import SWEEPS_KEPT
from ema_service.storage.files import reserve_beyond

__all__ = [
    "FORMAT",
    "MEMORY",
    "TIMELINE_LINES",
    "Catalog",
    "CatalogUnusable",
    "CheckpointRow",
    "RowChange",
    "RunRow",
    "ShardRow",
    "Shelf",
    "SnapshotRow",
    "SweepRow",
    "TimelineRow",
]

_log = logging.getLogger(__name__)

#: Version of the tables below, and of the files that the rows speak of.
FORMAT = 11

#: Most lines of a timeline: a trainer that takes a snapshot every minute shall not fill the disk with lines.
TIMELINE_LINES = 1000

#: In place of a slot's folder: the version lies in memory files, which its state names.
MEMORY = "memory"

#: As formats 2 to 9 had it.
_CHECKPOINTS_2 = """
CREATE TABLE checkpoints (
    id INTEGER PRIMARY KEY AUTOINCREMENT, run_id INTEGER NOT NULL REFERENCES runs(id) ON DELETE CASCADE,
    folder TEXT NOT NULL, state TEXT NOT NULL, synced INTEGER NOT NULL, created_at REAL NOT NULL,
    UNIQUE (run_id, folder));
"""
# One row for each slot. A shard may have one more, with the slot's bytes under another decay, that it has voted for.
_CHECKPOINTS = """
CREATE TABLE checkpoints (
    id INTEGER PRIMARY KEY AUTOINCREMENT, run_id INTEGER NOT NULL REFERENCES runs(id) ON DELETE CASCADE,
    folder TEXT NOT NULL, state TEXT NOT NULL, synced INTEGER NOT NULL, created_at REAL NOT NULL, revision INTEGER);
CREATE UNIQUE INDEX checkpoint_of_slot ON checkpoints (run_id, folder, ifnull(revision, 0));
"""
#: As format 10 had it.
_SHARDS_10 = """
CREATE TABLE shards (
    run_id INTEGER PRIMARY KEY REFERENCES runs(id) ON DELETE CASCADE,
    place INTEGER NOT NULL, of INTEGER NOT NULL, record TEXT NOT NULL);
"""
_BIRTHS = """
ALTER TABLE shards ADD COLUMN birth INTEGER NOT NULL DEFAULT 0;
ALTER TABLE shards ADD COLUMN whole TEXT NOT NULL DEFAULT '';
"""
_SHARDS = _SHARDS_10 + _BIRTHS
_DIRECTORY = """
CREATE TABLE directory (
    one INTEGER PRIMARY KEY CHECK (one = 1), place INTEGER NOT NULL, of INTEGER NOT NULL, record TEXT NOT NULL);
"""
_RING = """
CREATE TABLE IF NOT EXISTS ring (
    run_id INTEGER NOT NULL REFERENCES runs(id) ON DELETE CASCADE,
    name TEXT NOT NULL, info TEXT NOT NULL, created_at REAL NOT NULL, PRIMARY KEY (run_id, name));
"""
_TIMELINE = """
CREATE TABLE timeline (
    run_id INTEGER NOT NULL REFERENCES runs(id) ON DELETE CASCADE, at REAL NOT NULL, kind TEXT NOT NULL,
    step INTEGER, num_updates INTEGER, text TEXT NOT NULL);
CREATE INDEX timeline_of_run ON timeline (run_id);
"""
# By a trigger: a ninth sweep and the loss of the oldest are one transaction.
_SWEEPS = f"""
CREATE TABLE sweeps (
    id INTEGER PRIMARY KEY AUTOINCREMENT, run_id INTEGER NOT NULL REFERENCES runs(id) ON DELETE CASCADE,
    key TEXT, info TEXT NOT NULL, UNIQUE (run_id, key));
CREATE TRIGGER sweeps_kept AFTER INSERT ON sweeps BEGIN
    DELETE FROM sweeps WHERE run_id = NEW.run_id AND id NOT IN (
        SELECT id FROM sweeps WHERE run_id = NEW.run_id ORDER BY id DESC LIMIT {SWEEPS_KEPT});
END;
"""
# By triggers: however a snapshot goes, alone or with its run, what it has in the object store is remembered as to be
# removed; and what a snapshot has is not to be removed.
_OBJECTS = """
CREATE TABLE IF NOT EXISTS objects (
    run_id INTEGER NOT NULL, name TEXT NOT NULL, folder TEXT NOT NULL UNIQUE, files TEXT NOT NULL,
    PRIMARY KEY (run_id, name), FOREIGN KEY (run_id, name) REFERENCES snapshots (run_id, name) ON DELETE CASCADE);
CREATE TABLE IF NOT EXISTS removals (folder TEXT PRIMARY KEY);
CREATE TRIGGER IF NOT EXISTS objects_taken AFTER INSERT ON objects BEGIN
    DELETE FROM removals WHERE folder = NEW.folder;
END;
CREATE TRIGGER IF NOT EXISTS objects_left AFTER DELETE ON objects BEGIN
    INSERT OR IGNORE INTO removals VALUES (OLD.folder);
END;
"""
_SCHEMA = f"""
CREATE TABLE runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, config TEXT NOT NULL, created_at REAL NOT NULL,
    writer INTEGER NOT NULL DEFAULT 0, averages TEXT);
{_CHECKPOINTS}
CREATE TABLE snapshots (
    run_id INTEGER NOT NULL REFERENCES runs(id) ON DELETE CASCADE,
    name TEXT NOT NULL, info TEXT NOT NULL, created_at REAL NOT NULL, PRIMARY KEY (run_id, name));
{_RING}
{_TIMELINE}
{_SWEEPS}
{_OBJECTS}
{_SHARDS}
{_DIRECTORY}
"""
#: By format, the SQL that makes the next format. Format 1 had one checkpoint for each run, written and synced as a
#: whole. Format 2 had no copied tensors: its servers would average them, so they must refuse a newer catalog. Format 3
#: had other checksums: its servers would take newer files for damaged. Format 4 had no memory files: its servers would
#: take their rows for slots that are gone. Format 5 had no ring, and the averages of a run's creation for good: its
#: servers would find others in the run's versions. Format 6 had lines without kinds, in a table that is gone. Format 7
#: had no sweeps. Format 8 had no object store: its servers would take snapshots that lie there for damaged. Format 9
#: had no shards: its servers would take a version that a shard has only voted for as the run's. Format 10 had no
#: directory: its servers would take a run that the hosts of a cluster have only voted for as there.
_MIGRATIONS = {
    1: f"""
ALTER TABLE checkpoints RENAME TO checkpoints_1;
{_CHECKPOINTS_2}
INSERT INTO checkpoints (run_id, folder, state, synced, created_at)
    SELECT run_id, folder, state, 1, created_at FROM checkpoints_1;
DROP TABLE checkpoints_1;
ALTER TABLE runs ADD COLUMN writer INTEGER NOT NULL DEFAULT 0;
""",
    2: "",
    3: "",
    4: "",
    5: f"ALTER TABLE runs ADD COLUMN averages TEXT; {_RING}",
    6: f"""
{_TIMELINE}
INSERT INTO timeline SELECT run_id, at, CASE
        WHEN event LIKE 'decay of %' THEN 'decay_changed'
        WHEN event LIKE 'average % added%' THEN 'average_added'
        WHEN event LIKE 'average % removed' THEN 'average_removed'
        WHEN event LIKE 'rewound to %' THEN 'rewound'
        WHEN event LIKE 'back at step %' THEN 'damaged'
        ELSE 'accepted' END,
    NULL, NULL, event FROM history ORDER BY rowid;
DROP TABLE history;
""",
    7: _SWEEPS,
    8: _OBJECTS,
    9: f"""
ALTER TABLE checkpoints RENAME TO checkpoints_9;
{_CHECKPOINTS}
INSERT INTO checkpoints SELECT id, run_id, folder, state, synced, created_at, NULL FROM checkpoints_9;
DROP TABLE checkpoints_9;
{_SHARDS_10}
""",
    10: _BIRTHS + _DIRECTORY,
}


#: SQLite begins its log anew after 1000 pages of 4 KiB and their heads; as much again for a transaction that is larger.
_LOG_BYTES = 8 << 20
#: Of the database itself.
_GROWTH_BYTES = 4 << 20
#: Seconds that a write waits for another process that has the database locked, and all others behind it.
_LOCK_SECONDS = 1.0


class CatalogUnusable(Exception):
    """The catalog was written by a newer version of this software, or is no catalog."""


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run. config: JSON. writer: the number of the writer that attached last, 0 before any did. averages: JSON, which
    the run has by now; None where they are those of ``config``."""

    id: int
    name: str
    config: str
    created_at: float
    writer: int = 0
    averages: str | None = None


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """The version that one slot of a run holds. Of a run's rows, the row with the largest ``id`` is the newest.

    folder: the slot, relative to the run's folder. state: JSON. synced: whether the slot's bytes are on the medium.
    revision: of a shard, that the version leads to; the version counts once the shard's record has come to that
    revision. None of a run that is no shard.
    """

    id: int
    run_id: int
    folder: str
    state: str
    synced: bool
    created_at: float
    revision: int | None = None


@dataclass(frozen=True, slots=True)
class ShardRow:
    """Which shard of a run on several hosts a run here is, or of the hosts' directory. place: from 0, of so many.
    record: JSON, what the shard has promised, voted for and committed; empty before the first. birth: the revision of
    the directory that the run came with; the run counts once the directory's record has come to that revision. whole:
    JSON, the configuration of the whole run, which only Catalog.whole() reads."""

    place: int
    of: int
    record: str = ""
    birth: int = 0
    whole: str = ""


@dataclass(frozen=True, slots=True)
class RowChange:
    """What a revision of a run on several hosts changes of the run's rows, in the transaction of its record.

    shown: a snapshot's name, and the text of its row from now on. gone: names of snapshots that are there no more.
    averages: the text of the run's row, of which averages it has from now on. line: of the run's timeline. ring_shown,
    ring_gone: of snapshots of the ring, by name, the texts of their rows from now on, and those that are there no more.
    """

    shown: tuple[str, str] | None = None
    gone: tuple[str, ...] = ()
    averages: str | None = None
    line: TimelineRow | None = None
    ring_shown: tuple[tuple[str, str], ...] = ()
    ring_gone: tuple[str, ...] = ()

    @property
    def lasts(self) -> bool:
        """Whether the change outlives the machine at once, whatever the run's durability: snapshots do, the ring, and
        which averages there are."""
        return bool(self.shown or self.gone or self.ring_shown or self.ring_gone) or self.averages is not None


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """A snapshot of a run. info: JSON. folder: where its files lie in the object store, None: in the data dir. files:
    JSON, of the files in the object store."""

    run_id: int
    name: str
    info: str
    created_at: float
    folder: str | None = None
    files: str | None = None


@dataclass(frozen=True, slots=True)
class TimelineRow:
    """A line of a run's timeline. step, num_updates: the run's at the time ``at``, None where unknown."""

    at: float
    kind: str
    step: int | None
    num_updates: int | None
    text: str


@dataclass(frozen=True, slots=True)
class SweepRow:
    """The results of a sweep over averages of a run. info: JSON. key: of the write, None where it had none."""

    key: str | None
    info: str


#: The tables of snapshots: those that somebody named, and those of the ring, whose names are versions.
Shelf = Literal["snapshots", "ring"]


class Catalog:
    """The database. Thread-safe; each method is one transaction.

    A transaction outlives the process when its method returns. It outlives the machine as well, unless the caller asked
    for ``durable=False``: then a power loss may undo it until the next durable transaction, of any run, has returned
    (SQLite's log is synced from its beginning). Every method may raise sqlite3.Error, and then changed nothing.

    The log has its room on the disk: what is written here is written on a full disk, too.

    alone: keep other processes from the database, those that only read it too. That is for file systems of networks,
    where processes cannot share the memory that SQLite's log otherwise wants of them (https://sqlite.org/wal.html, "Use
    of WAL Without Shared-Memory"). A log is kept there all the same: a durable transaction then takes one sync, 4 ms on
    the disk where a rollback journal took 16, and any other 0.01 ms where a journal took 12.

    More than twenty methods: one for each question and each change.
    """

    def __init__(self, path: Path, *, alone: bool = False, hold: Callable[[], None] | None = None) -> None:
        """Opens or makes the database, and migrates an older format. hold: called before each write, as
        FolderLock.hold(). Raises CatalogUnusable."""
        self._hold = hold
        self._lock = threading.Lock()
        self._synchronous = "FULL"
        # Before SQLite opens the file: whoever closes a descriptor of it later drops the locks that SQLite has there.
        path.touch(mode=0o600)
        _reserve(path, _GROWTH_BYTES)
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=_LOCK_SECONDS)
        with contextlib.ExitStack() as undo:
            undo.callback(self._db.close)
            try:
                self._prepare(path, alone=alone)
            except sqlite3.DatabaseError as fault:
                raise CatalogUnusable(
                    f"{path} cannot be read: {fault}; restore it, or use another --data-dir"
                ) from None
            undo.pop_all()
        #: What is written to, whatever has its name by now.
        self._files = {each: each.stat().st_ino for each in (path, path.with_name(path.name + "-wal")) if each.exists()}

    def _prepare(self, path: Path, *, alone: bool) -> None:
        """Choose how the database is written, and bring it to this server's format. As __init__()."""
        if alone:
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        if (mode := self._db.execute("PRAGMA journal_mode = WAL").fetchone()[0]) != "wal":
            raise CatalogUnusable(
                f"{path} cannot have a log on this file system (SQLite keeps journal mode {mode}): use a "
                "--data-dir on a disk of this machine"
            )
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._migrate(path)
        _reserve(path.with_name(path.name + "-wal"), _LOG_BYTES)

    def close(self) -> None:
        """Close the database, whose log goes into it by that; of one that another process may have, nothing is done."""
        with self._lock:
            try:
                self._check_held()
            except sqlite3.OperationalError:
                # Its memory is given back by the end of the process: Python would close the database with the object.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._db))
            else:
                self._db.close()

    def add_run(
        self, name: str, config: str, created_at: float, writer: int = 0, shard: ShardRow | None = None
    ) -> RunRow:
        """Add a run. shard: of a run on several hosts. Raises sqlite3.IntegrityError where the name is taken."""
        values = name, config, created_at, writer
        with self._transaction() as db:
            cursor = db.execute("INSERT INTO runs (name, config, created_at, writer) VALUES (?, ?, ?, ?)", values)
            row = RunRow(cursor.lastrowid or 0, *values)
            if shard:
                db.execute("INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?)", (row.id, *astuple(shard)))
        return row

    def remove_run(self, run_id: int) -> None:
        """Remove the run with its checkpoints, snapshots, timeline and sweeps."""
        self._write("DELETE FROM runs WHERE id = ?", run_id)

    def remove_named(self, name: str) -> None:
        """As remove_run(), of the run of this name."""
        self._write("DELETE FROM runs WHERE name = ?", name)

    def runs(self) -> list[RunRow]:
        """All runs, oldest first."""
        query = "SELECT id, name, config, created_at, writer, averages FROM runs ORDER BY id"
        return [RunRow(*row) for row in self._read(query)]

    def set_writer(self, run_id: int, writer: int) -> None:
        """Remember the number of the writer that attached last to a run."""
        self._write("UPDATE runs SET writer = ? WHERE id = ?", writer, run_id)

    def set_averages(self, run_id: int, averages: str) -> None:
        """Say which averages a run has from now on."""
        self._write("UPDATE runs SET averages = ? WHERE id = ?", averages, run_id)

    def last_run_id(self) -> int:
        """The largest id that a run ever had in this catalog, 0 if there was none."""
        rows = self._read("SELECT seq FROM sqlite_sequence WHERE name = 'runs'")
        return int(rows[0][0]) if rows else 0

    def put_checkpoint(
        self,
        run_id: int,
        folder: str,
        state: str,
        created_at: float,
        *,
        synced: bool,
        durable: bool,
        revision: int | None = None,
    ) -> CheckpointRow:
        """Say which version a slot holds, in place of the version before: the run's newest checkpoint. revision: that
        the version is of, where the run is a shard."""
        values = run_id, folder, state, synced, created_at, revision
        cursor = self._write(
            "INSERT OR REPLACE INTO checkpoints (run_id, folder, state, synced, created_at, revision) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            *values,
            durable=durable,
        )
        return CheckpointRow(cursor.lastrowid or 0, *values)

    def amend_checkpoint(self, row_id: int, state: str, *, durable: bool) -> None:
        """Replace the text of a checkpoint's state; the slot's bytes are as they were."""
        self._write("UPDATE checkpoints SET state = ? WHERE id = ?", state, row_id, durable=durable)

    def remove_checkpoint(self, run_id: int, folder: str) -> None:
        """Forget what a slot holds."""
        self._write("DELETE FROM checkpoints WHERE run_id = ? AND folder = ?", run_id, folder)

    def mark_synced(self, row_id: int) -> None:
        """Say that a checkpoint's bytes are on the medium."""
        self._write("UPDATE checkpoints SET synced = 1 WHERE id = ?", row_id)

    def checkpoints(self, run_id: int) -> list[CheckpointRow]:
        """The checkpoints of a run, newest first."""
        query = (
            "SELECT id, run_id, folder, state, synced, created_at, revision FROM checkpoints WHERE run_id = ? "
            "ORDER BY id DESC"
        )
        return [
            CheckpointRow(i, run, folder, s, bool(on), at, revision)
            for i, run, folder, s, on, at, revision in self._read(query, run_id)
        ]

    def shard(self, run_id: int) -> ShardRow | None:
        """Which shard a run is; None where it is none."""
        rows = self._read("SELECT place, of, record, birth FROM shards WHERE run_id = ?", run_id)
        return ShardRow(*rows[0]) if rows else None

    def whole(self, run_id: int) -> str:
        """The configuration of the whole run that a shard is of; empty where the run is none, or was made alone."""
        rows = self._read("SELECT whole FROM shards WHERE run_id = ?", run_id)
        return str(rows[0][0]) if rows else ""

    def directory(self) -> ShardRow | None:
        """What this host has of the directory of a cluster's runs; None where the server is no host."""
        rows = self._read("SELECT place, of, record FROM directory")
        return ShardRow(*rows[0]) if rows else None

    def open_directory(self, place: int, of: int) -> None:
        """Be one host of a cluster, from now on."""
        self._write("INSERT INTO directory VALUES (1, ?, ?, '')", place, of)

    def keep_directory(self, record: str, gone: int | None) -> None:
        """Replace the directory's record. gone: the id of a run that there is no more, by the record."""
        with self._transaction() as db:
            db.execute("UPDATE directory SET record = ?", (record,))
            db.execute("DELETE FROM runs WHERE id = ?", (gone,))

    def keep_record(
        self,
        run_id: int,
        record: str,
        upto: int,
        *,
        durable: bool,
        since: int = 0,
        change: RowChange | None = None,
    ) -> None:
        """Replace a shard's record. since, upto: the revisions that the record speaks of; the rows of others go, in the
        same transaction. change: what else changes in it."""
        with self._transaction(durable=durable) as db:
            db.execute(
                "DELETE FROM checkpoints WHERE run_id = ? AND revision NOT BETWEEN ? AND ?", (run_id, since, upto)
            )
            db.execute("UPDATE shards SET record = ? WHERE run_id = ?", (record, run_id))
            if change:
                _change_rows(db, run_id, change)

    def put_vote(
        self, run_id: int, record: str, vote: CheckpointRow, current: int | None, *, durable: bool
    ) -> CheckpointRow:
        """Replace a shard's record by one that votes for a version, and say which slot holds the version.

        vote: its row, which is given an id. The row of an earlier vote goes in the same transaction, and those of
        versions that the slot held. current: the id of the run's newest row, which stays; None where there is none.
        """
        values = run_id, vote.folder, vote.state, vote.synced, vote.created_at, vote.revision
        with self._transaction(durable=durable) as db:
            db.execute("DELETE FROM checkpoints WHERE run_id = ? AND revision >= ?", (run_id, vote.revision))
            db.execute(
                "DELETE FROM checkpoints WHERE run_id = ? AND folder = ? AND id IS NOT ?",
                (run_id, vote.folder, current),
            )
            cursor = db.execute(
                "INSERT INTO checkpoints (run_id, folder, state, synced, created_at, revision) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                values,
            )
            db.execute("UPDATE shards SET record = ? WHERE run_id = ?", (record, run_id))
        return replace(vote, id=cursor.lastrowid or 0)

    def add_snapshot(self, row: SnapshotRow, shelf: Shelf = "snapshots") -> None:
        """Add a snapshot whose files lie in the data dir. Raises sqlite3.IntegrityError where the name is taken."""
        self._write(f"INSERT INTO {shelf} VALUES (?, ?, ?, ?)", *astuple(row)[:4])

    def remove_snapshot(self, run_id: int, name: str, shelf: Shelf = "snapshots") -> None:
        """Remove a snapshot, if it is there."""
        self._write(f"DELETE FROM {shelf} WHERE run_id = ? AND name = ?", run_id, name)

    def snapshots(self, run_id: int, shelf: Shelf = "snapshots") -> list[SnapshotRow]:
        """The snapshots of a run, in the order they were made."""
        # By rowid and not by time: the clock may have jumped.
        query = f"SELECT run_id, name, info, created_at FROM {shelf} WHERE run_id = ? ORDER BY rowid"
        if shelf == "snapshots":
            query = (
                "SELECT run_id, name, info, created_at, folder, files FROM snapshots LEFT JOIN objects "
                "USING (run_id, name) WHERE run_id = ? ORDER BY snapshots.rowid"
            )
        return [SnapshotRow(*row) for row in self._read(query, run_id)]

    def snapshots_here(self) -> list[SnapshotRow]:
        """The snapshots of all runs whose files lie in the data dir, oldest first."""
        query = (
            "SELECT run_id, name, info, created_at FROM snapshots LEFT JOIN objects USING (run_id, name) "
            "WHERE folder IS NULL ORDER BY snapshots.rowid"
        )
        return [SnapshotRow(*row) for row in self._read(query)]

    def place_snapshot(self, row: SnapshotRow, folder: str, files: str) -> bool:
        """Say that a snapshot's files lie in a folder of the object store, which is not to be removed from then on.

        False where the snapshot is gone, and then the folder stays to be removed.
        """
        query = (
            "INSERT INTO objects SELECT run_id, name, ?, ? FROM snapshots WHERE run_id = ? AND name = ? "
            "AND created_at = ?"
        )
        return self._write(query, folder, files, row.run_id, row.name, row.created_at).rowcount == 1

    def adopt_snapshot(self, row: SnapshotRow) -> bool:
        """Add a snapshot whose files lie in the object store. False where their folder is to be removed. Raises
        sqlite3.IntegrityError where the name is taken."""
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM removals WHERE folder = ?", (row.folder,)).fetchone():
                return False
            db.execute("INSERT INTO snapshots VALUES (?, ?, ?, ?)", astuple(row)[:4])
            placed = row.run_id, row.name, row.folder, row.files
            db.execute("INSERT INTO objects VALUES (?, ?, ?, ?)", placed)
            return True

    def add_removal(self, folder: str) -> bool:
        """Have a folder of the object store removed, unless a snapshot is placed there before. False where one lies
        there already: then the folder stays."""
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM objects WHERE folder = ?", (folder,)).fetchone():
                return False
            db.execute("INSERT OR IGNORE INTO removals VALUES (?)", (folder,))
            return True

    def drop_removal(self, folder: str) -> None:
        """Forget a folder of the object store that was removed."""
        self._write("DELETE FROM removals WHERE folder = ?", folder)

    def removals(self) -> list[str]:
        """The folders of the object store that are to be removed, the earliest first."""
        return [folder for (folder,) in self._read("SELECT folder FROM removals ORDER BY rowid")]

    def add_line(self, run_id: int, line: TimelineRow) -> None:
        """Add a line to a run's timeline, which a power loss may take again; the oldest of too many lines goes."""
        with self._transaction(durable=False) as db:
            _add_line(db, run_id, line)

    def timeline(self, run_id: int, since: float, most: int) -> list[TimelineRow]:
        """The newest lines of a run's timeline that are later than ``since``, at most so many, in order."""
        query = (
            "SELECT at, kind, step, num_updates, text FROM timeline WHERE run_id = ? AND at > ? "
            "ORDER BY rowid DESC LIMIT ?"
        )
        return [TimelineRow(*row) for row in reversed(self._read(query, run_id, since, most))]

    def add_sweep(self, run_id: int, row: SweepRow) -> None:
        """Add a sweep to a run, in place of a sweep of that key; of more than SWEEPS_KEPT the oldest goes. Raises
        sqlite3.IntegrityError where the run is gone."""
        self._write("INSERT OR REPLACE INTO sweeps (run_id, key, info) VALUES (?, ?, ?)", run_id, row.key, row.info)

    def sweeps(self, run_id: int) -> list[SweepRow]:
        """The sweeps of a run, the newest last."""
        rows = self._read("SELECT key, info FROM sweeps WHERE run_id = ? ORDER BY id", run_id)
        return [SweepRow(*row) for row in rows]

    def _write(self, sql: str, *values: object, durable: bool = True) -> sqlite3.Cursor:
        self._check_files()
        with self._lock:
            self._set_synchronous("FULL" if durable else "NORMAL")
            return self._db.execute(sql, values)

    @contextlib.contextmanager
    def _transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Within the block statements are gathered that take effect together; none does where the block raises."""
        self._check_files()
        with self._lock:
            self._set_synchronous("FULL" if durable else "NORMAL")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _set_synchronous(self, wanted: str) -> None:
        if wanted != self._synchronous:
            self._db.execute(f"PRAGMA synchronous = {wanted}")
            self._synchronous = wanted

    def _check_files(self) -> None:
        """Raises sqlite3.OperationalError where the database is not what the next start will find, or another process
        may have it by now."""
        self._check_held()
        for path, number in self._files.items():
            try:
                found = path.stat().st_ino
            except FileNotFoundError:
                found = 0
            if found != number:
                raise sqlite3.OperationalError(
                    f"{path} was removed or replaced while the server runs: what is written would be lost; put it back "
                    "and start the server again"
                )

    def _check_held(self) -> None:
        """Raises sqlite3.OperationalError where another process may have the database by now."""
        if self._hold:
            try:
                self._hold()
            except OSError as fault:
                raise sqlite3.OperationalError(str(fault)) from None

    def _read(self, sql: str, *values: object) -> list[Any]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def _migrate(self, path: Path) -> None:
        """Make the tables in a new database; bring those of an older format up to date.

        Raises CatalogUnusable for a newer one.
        """
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        if found > FORMAT:
            raise CatalogUnusable(
                f"{path} has format {found}, this version reads up to {FORMAT}: "
                "upgrade ema-service, or use another --data-dir"
            )
        if found == 0:
            self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;")
            return
        for each in range(found, FORMAT):
            self._db.executescript(f"BEGIN; {_MIGRATIONS[each]} PRAGMA user_version = {each + 1}; COMMIT;")


def _change_rows(db: sqlite3.Connection, run_id: int, change: RowChange) -> None:
    """Change the rows of a run, within a transaction."""
    shelves: tuple[tuple[Shelf, tuple[tuple[str, str], ...], tuple[str, ...]], ...] = (
        ("snapshots", (change.shown,) if change.shown else (), change.gone),
        ("ring", change.ring_shown, change.ring_gone),
    )
    for shelf, shown, gone in shelves:
        for name, text in shown:
            db.execute(f"UPDATE {shelf} SET info = ? WHERE run_id = ? AND name = ?", (text, run_id, name))
        for name in gone:
            db.execute(f"DELETE FROM {shelf} WHERE run_id = ? AND name = ?", (run_id, name))
    if change.averages is not None:
        db.execute("UPDATE runs SET averages = ? WHERE id = ?", (change.averages, run_id))
    if change.line:
        _add_line(db, run_id, change.line)


def _add_line(db: sqlite3.Connection, run_id: int, line: TimelineRow) -> None:
    """Add a line to a run's timeline; the oldest of too many goes."""
    values = run_id, line.at, line.kind, line.step, line.num_updates, line.text
    db.execute("INSERT INTO timeline VALUES (?, ?, ?, ?, ?, ?)", values)
    query = "SELECT rowid FROM timeline WHERE run_id = ? ORDER BY rowid DESC LIMIT 1 OFFSET ?"
    for (oldest,) in db.execute(query, (run_id, TIMELINE_LINES)).fetchall():
        db.execute("DELETE FROM timeline WHERE run_id = ? AND rowid <= ?", (run_id, oldest))


def _reserve(path: Path, nbytes: int) -> None:
    """Take room for a file to grow into; a failure is logged."""
    try:
        reserved, why = reserve_beyond(path, nbytes), "the file system has no room for it, or cannot"
    except OSError as fault:
        reserved, why = False, str(fault)
    if not reserved:
        _log.warning("%d bytes beyond the end of %s are not reserved: %s; a full disk may stop it", nbytes, path, why)
