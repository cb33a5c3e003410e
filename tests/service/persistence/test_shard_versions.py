"""The versions of one shard on disk: what a restart finds after each of a shard's transactions, and where one fails.

Knows a data dir, versions and records' revisions. Does not know who votes for what (cluster), or a run.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from ema_client.errors import StorageFailed
from ema_client.protocol import RunConfig, to_json
from ema_service.memory import Layout
from ema_service.persistence import ShardVersions
from ema_service.runs.ledger import Ledger
from ema_service.shadows import State, Version
from ema_service.storage import RunRow, ShardRow, Store
from ema_service.storage.catalog import Catalog
from tests.service.conftest import specs_of
from tests.service.persistence.power import Power

if TYPE_CHECKING:
    from ema_service.memory import Memory
    from ema_service.persistence import Restored

CONFIG = RunConfig("r", specs_of({"w": torch.zeros(5, 3)}), durability="disk")
LAYOUT = Layout(CONFIG.layout)


def record(revision: int, more: str = "") -> str:
    """A record that has come to a revision, and votes for what follows if ``more`` says so."""
    vote = {"proposal": {"ticket": {"base": revision}}} if more.startswith("vote") else None
    return json.dumps({"record": {"revision": revision, "vote": vote, "more": more}})


class Disk:
    """A data dir with one shard in it. start(): as after a kill."""

    def __init__(self, folder: Path, memory: Memory, config: RunConfig = CONFIG) -> None:
        self.folder, self.memory, self.config = folder, memory, config
        self.store: Store | None = None
        self.start()

    def start(self) -> Restored:
        self.close()
        self.store = Store(self.folder)
        rows = self.store.runs()
        self.row: RunRow = (
            rows[0] if rows else self.store.add_run("r", json.dumps(to_json(self.config)), 1.0, shard=ShardRow(1, 3))
        )
        shard = self.store.shard(self.row)
        assert shard
        self.versions = ShardVersions(shard, self.config, self.row, self.store, LAYOUT, self.memory)
        return self.versions.restore()

    def close(self) -> None:
        if self.store:
            self.store.close()
        self.store = None

    def state(self, version: Version, seed: int) -> State:
        """A version with bytes of its own."""
        arena = self.memory.new_arena(LAYOUT)
        arena.tensor.copy_(torch.arange(15, dtype=torch.float32).view(torch.uint8) + seed)
        return State(version, (arena,))

    def vote(self, state: State, text: str) -> None:
        """What a shard does with a version: its bytes, then its vote."""
        place = self.versions.take(["ema"])
        assert place
        place.finish(state)
        self.versions.vote(place.slot, state, text)

    def make(self, state: State, revision: int) -> None:
        self.vote(state, record(revision - 1, "vote"))
        self.versions.confirm(record(revision))


@pytest.fixture
def versions() -> list[Version]:
    """The first versions of a run."""
    ledger = Ledger(CONFIG)
    ledger.commit(ledger.succession.first("life", b"0" * 16, 1.0, num_updates=None, step=None))
    made = [ledger.readable()]
    for step in range(1, 5):
        plan = ledger.succession.plan(step, ledger.readable())
        ledger.commit(ledger.succession.following(plan, b"%d" % step * 16, 1.0))
        made.append(ledger.readable())
    return made


@pytest.fixture
def disk(tmp_path: Path, memory: Memory) -> Iterator[Disk]:
    disk = Disk(tmp_path / "data", memory)
    yield disk
    disk.close()


def same(found: State | None, expected: State | None) -> bool:
    if found is None or expected is None:
        return found is expected
    pairs = zip(found.arenas, expected.arenas, strict=True)
    return found.version == expected.version and all(torch.equal(a.tensor, b.tensor) for a, b in pairs)


def test_a_vote_is_no_version(disk: Disk, versions: list[Version]) -> None:
    """A version that was voted for comes back beside the run's, not as the run's, until the record has come to it."""
    first, second = disk.state(versions[0], 1), disk.state(versions[1], 2)
    disk.vote(first, record(0, "vote"))
    found = disk.start()
    assert (found.state, found.fault) == (None, None)
    assert same(disk.versions.voted, first)

    disk.versions.confirm(record(1))
    found = disk.start()
    assert same(found.state, first)
    assert disk.versions.voted is None

    disk.vote(second, record(1, "vote"))
    found = disk.start()
    assert same(found.state, first)
    assert same(disk.versions.voted, second)
    assert (disk.versions.record, disk.versions.durable_step) == (record(1, "vote"), None)
    disk.versions.confirm(record(2))
    assert disk.versions.durable_step == 1
    assert same(disk.start().state, second)


def test_aborted_version_is_gone(disk: Disk, versions: list[Version]) -> None:
    """A version whose vote was aborted never comes back, alone or with another in its place."""
    disk.make(disk.state(versions[0], 1), 1)
    disk.vote(disk.state(versions[1], 2), record(1, "vote"))
    disk.versions.discard(record(1, "aborted"))
    found = disk.start()
    assert same(found.state, disk.state(versions[0], 1))
    assert disk.versions.voted is None

    other = disk.state(versions[1], 7)
    disk.vote(disk.state(versions[1], 2), record(1, "vote"))
    disk.vote(other, record(1, "another"))
    disk.start()
    assert same(disk.versions.voted, other)


def test_promise_keeps_the_vote(disk: Disk, versions: list[Version]) -> None:
    """A record that promises a term leaves the version that was voted for where it is."""
    voted = disk.state(versions[0], 1)
    disk.vote(voted, record(0, "vote"))
    disk.versions.promise(record(0, "vote, and a term"))
    disk.start()
    assert same(disk.versions.voted, voted)
    assert disk.versions.record == record(0, "vote, and a term")
    disk.versions.promise(record(0, "vote, and another term"))
    disk.start()
    assert same(disk.versions.voted, voted)


def test_promise_keeps_a_vote_for_a_later_revision(disk: Disk, versions: list[Version]) -> None:
    """A way back leads from the largest revision that any shard knows, which an older copy of a disk never came to."""
    disk.make(disk.state(versions[0], 1), 1)
    back = disk.state(versions[1], 2)
    text = json.dumps({"record": {"revision": 1, "vote": {"proposal": {"ticket": {"base": 8}}}}})
    place = disk.versions.take(["ema"])
    assert place
    place.finish(back)
    disk.versions.vote(place.slot, back, text, 9)
    disk.versions.promise(text)
    disk.start()
    assert same(disk.versions.voted, back)


@pytest.mark.parametrize("damaged", ["current", "voted"])
def test_a_vote_outlasts_damage(damaged: str, disk: Disk, versions: list[Version]) -> None:
    """Where the current version is damaged the one that was voted for is taken up all the same; and where that one is,
    its row stays, for the file may be put back."""
    disk.make(disk.state(versions[0], 1), 1)
    voted = disk.state(versions[1], 2)
    disk.vote(voted, record(1, "vote"))
    assert disk.store
    slots = {row.revision: row.folder for row in disk.store.checkpoints(disk.row)}
    disk.close()
    [path] = disk.folder.glob(f"runs/*/{slots[1 if damaged == 'current' else 2]}/ema.safetensors")
    content = path.read_bytes()
    path.write_bytes(b"")
    assert disk.start().fault
    assert same(disk.versions.voted, voted) is (damaged == "current")
    disk.versions.promise(record(1, "vote, and a term"))
    disk.close()
    path.write_bytes(content)
    assert not disk.start().fault
    assert same(disk.versions.voted, voted)


@pytest.mark.parametrize("confirmed", [True, False])
def test_same_weights_under_another_decay(confirmed: bool, disk: Disk, versions: list[Version]) -> None:
    """A vote for another decay has no bytes of its own; aborted or not, the weights stay readable."""
    first = disk.state(versions[0], 1)
    disk.make(first, 1)
    [average] = versions[0].averages
    amended = State(replace(versions[0], averages=(replace(average, decay=0.25),)), first.arenas)
    disk.versions.vote(None, amended, record(1, "vote"))
    found = disk.start()
    assert same(found.state, first)
    assert same(disk.versions.voted, amended)
    assert found.state
    assert disk.versions.voted
    assert disk.versions.voted.arenas is found.state.arenas
    (disk.versions.confirm if confirmed else disk.versions.discard)(record(1 + confirmed))
    assert same(disk.start().state, amended if confirmed else first)

    disk.make(disk.state(versions[1], 2), 2 + confirmed)
    disk.make(disk.state(versions[2], 3), 3 + confirmed)
    assert same(disk.start().state, disk.state(versions[2], 3))


def test_slots_of_what_counts_are_not_written_to(disk: Disk, versions: list[Version]) -> None:
    """The newest version's slot and the voted one's are held, also after a restart; the others go round."""
    disk.make(disk.state(versions[0], 1), 1)
    disk.vote(disk.state(versions[1], 2), record(1, "vote"))
    for _ in range(2):
        waiting = disk.versions.take(["ema"])
        assert waiting
        waiting.finish(disk.state(versions[2], 9))
        del waiting
        found = disk.start()
        assert same(found.state, disk.state(versions[0], 1))
        assert same(disk.versions.voted, disk.state(versions[1], 2))
    for k in range(1, 5):
        disk.make(disk.state(versions[k], k), k + 1)
    assert len(list((disk.folder / "runs").glob("*/slots/*"))) <= 3


@pytest.mark.parametrize("act", ["vote", "confirm", "discard", "promise"])
def test_record_that_cannot_be_written(
    act: str, disk: Disk, versions: list[Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a transaction fails, record and versions are as before; and it can be repeated."""
    disk.make(disk.state(versions[0], 1), 1)
    voted = disk.state(versions[1], 2)
    if act != "vote":
        disk.vote(voted, record(1, "vote"))
    before = disk.versions.record
    acts: dict[str, Callable[[], None]] = {
        "vote": lambda: disk.vote(voted, record(1, "vote")),
        "confirm": lambda: disk.versions.confirm(record(2)),
        "discard": lambda: disk.versions.discard(record(1, "aborted")),
        "promise": lambda: disk.versions.promise(record(1, "vote, and a term")),
    }

    def full(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "_transaction", full)
        with pytest.raises(StorageFailed, match="full"):
            acts[act]()
    assert disk.versions.record == before
    assert disk.versions.trouble
    acts[act]()
    assert disk.versions.trouble is None
    found = disk.start()
    assert same(found.state, voted if act == "confirm" else disk.state(versions[0], 1))
    assert same(disk.versions.voted, voted if act in ("vote", "promise") else None)


def test_damaged_vote_is_told(disk: Disk, versions: list[Version]) -> None:
    """A shard that cannot read what it voted for says so, and does not come up as one that never voted."""
    disk.make(disk.state(versions[0], 1), 1)
    disk.vote(disk.state(versions[1], 2), record(1, "vote"))
    assert disk.versions._vote
    [path] = (disk.folder / "runs").glob(f"*/{disk.versions._vote.slot.name}/*.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)

    found = disk.start()
    assert found.fault
    assert "shard 1 has voted for" in found.fault
    assert same(found.state, disk.state(versions[0], 1))


def test_damaged_version_makes_no_epoch(disk: Disk, versions: list[Version]) -> None:
    """A shard goes back to no older version by itself, in no epoch of its own: it comes up with a fault."""
    disk.make(disk.state(versions[0], 1), 1)
    disk.make(disk.state(versions[1], 2), 2)
    assert disk.versions._newest
    [path] = (disk.folder / "runs").glob(f"*/{disk.versions._newest.slot.name}/*.safetensors")
    path.write_bytes(b"")

    found = disk.start()
    assert found.fault
    assert found.state
    assert str(found.state.version) == "1.0"


def test_reboot_makes_no_epoch(memory: Memory, tmp_path: Path, versions: list[Version]) -> None:
    """Where versions may be gone with the machine, a shard of durability ``process`` comes up with a fault, and with
    the version that is there under its own name."""
    other = Disk(tmp_path / "process", memory, replace(CONFIG, durability="process"))
    other.make(other.state(versions[0], 1), 1)
    assert other.store
    for row in other.store.checkpoints(other.row):
        text = json.loads(row.state)
        other.store.amend_checkpoint(row, json.dumps({**text, "boot": "another"}), durable=True)

    found = other.start()
    other.close()
    assert found.fault
    assert "all shards have to go back together" in found.fault
    assert found.state
    assert str(found.state.version) == "1.0"


@pytest.mark.parametrize("seed", range(16))
def test_power_loss(
    seed: int, disk: Disk, tmp_path: Path, memory: Memory, versions: list[Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With durability ``disk`` what was voted for, and what was committed, outlives the machine."""
    power = Power(disk.folder, monkeypatch)
    disk.make(disk.state(versions[0], 1), 1)
    disk.vote(disk.state(versions[1], 2), record(1, "vote"))
    committed = seed % 2 == 1
    if committed:
        disk.versions.confirm(record(2))
    power.lost(tmp_path / "after", seed=seed // 2)
    after = Disk(tmp_path / "after", memory)
    found = after.start()
    assert same(found.state, disk.state(versions[committed], 1 + committed))
    assert same(after.versions.voted, None if committed else disk.state(versions[1], 2))
    assert after.versions.record == (record(2) if committed else record(1, "vote"))
    after.close()
