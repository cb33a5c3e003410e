"""What hosts move to one object store, each to its own place, and which of it each has again after all data dirs were
lost: the same snapshots on all of them.

Knows data dirs whose rows are written by hand, and a folder as the store. Does not know servers or coordinators
(tests/service/cluster/test_stored_snapshots.py).
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ema_client.protocol import RunConfig, SnapshotInfo, TensorSpec, to_json
from ema_service.cluster import Record, Term
from ema_service.cluster.encoding import decode, encode
from ema_service.cluster.hosting.directory import shard_config, whole_config
from ema_service.cluster.hosting.recovering import NotRecovered, recover_host
from ema_service.persistence import Offload
from ema_service.persistence.recovering import recover
from ema_service.persistence.rows import dump_setup, read_setup
from ema_service.storage import (
    CatalogUnusable,
    ObjectStore,
    RowChange,
    RunRow,
    ShardRow,
    SnapshotRow,
    Store,
    open_objects,
)
from ema_service.storage.files import FolderLock, TakenOver
from tests.waiting import wait_until

LAYOUT = (TensorSpec("a", (4, 2), "F32"), TensorSpec("b", (4,), "F32"))
#: A safetensors file without tensors.
FILE = (2).to_bytes(8, "little") + b"{}"


class HostDir:
    """The data dir of one host, with the thread that moves its snapshots."""

    def __init__(self, folder: Path, objects: ObjectStore, place: int, of: int, shards: int) -> None:
        self.store = Store(folder)
        self.store.be_host((place, of))
        self._place, self._shards = place, shards
        self._runs = {row.name: row for row in self.store.runs()}
        self.offload = Offload(self.store, objects)
        self.offload.start(lambda run, row, at, files: self.store.place_snapshot(self._runs[run], row, at, files))

    def run(self, name: str = "r", *, birth: int = 1, created_at: float = 1.5) -> RunRow:
        """A run whose shard is here."""
        config, shard = whole_config(RunConfig(name, LAYOUT), self._shards), self._place % self._shards
        own, whole = shard_config(config, shard, self._shards), json.dumps(to_json(config))
        row = ShardRow(shard, self._shards, birth=birth, whole=whole)
        self._runs[name] = self.store.add_run(name, json.dumps(to_json(own)), created_at, shard=row)
        return self._runs[name]

    def take(self, name: str, at: float, run: str = "r", *, begun: bool = False) -> str:
        """A snapshot of the time ``at``, to be moved. Returns the text of its row."""
        info = SnapshotInfo(run, name, "1.1", 1, 1, ("ema",), len(FILE), at)
        text = json.dumps({**to_json(info), **({"begun": True} if begun else {})})
        self.store.save_snapshot(self._runs[run], name, lambda: text, {"ema": [FILE]})
        self.offload.wake()
        return text

    def remove(self, name: str, run: str = "r") -> None:
        """Delete a snapshot, and return once it is removed in the store."""
        self.store.remove_snapshot(self._runs[run], name)
        self.offload.wake()
        wait_until(lambda: not self.offload.removals, "the removal")

    def places(self, run: str = "r") -> dict[str, str | None]:
        """Where each snapshot lies in the store; None of one that does not."""
        return {row.name: row.folder for row in self.store.snapshots(self._runs[run])}

    def moved(self, run: str = "r") -> None:
        wait_until(lambda: all(self.places(run).values()), "the moves")

    def close(self) -> None:
        self.offload.close()
        self.store.close()


Make = Callable[..., HostDir]


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    (tmp_path / "objects").mkdir()
    return open_objects(str(tmp_path / "objects"))


@pytest.fixture
def make(tmp_path: Path, objects: ObjectStore) -> Iterator[Make]:
    """Make the data dir of a host, of two without twins where nothing else is said."""
    made: list[HostDir] = []

    def one(place: int, of: int = 2, shards: int = 2, folder: str = "host") -> HostDir:
        made.append(HostDir(tmp_path / f"{folder}-{place}", objects, place, of, shards))
        return made[-1]

    yield one
    for each in made:
        each.close()


def listed(objects: ObjectStore) -> list[str]:
    """Each snapshot in the store, without the digits."""
    return [path.partition(".")[0] for path in objects.find("snapshot.json")]


def recovered(tmp_path: Path, objects: ObjectStore, place: int, of: int = 2) -> dict[str, str | None]:
    """Recover a host to a new data dir, or once more; why each snapshot that it had moved was left out."""
    store = Store(tmp_path / f"new-{place}")
    try:
        return {f"{each.run}/{each.snapshot}": each.left_out for each in recover_host(store, objects, place, of)}
    finally:
        store.close()


def rows(tmp_path: Path, place: int) -> tuple[dict[str, list[SnapshotRow]], Store]:
    """By run, the snapshots of a recovered host."""
    store = Store(tmp_path / f"new-{place}")
    return {row.name: store.snapshots(row) for row in store.runs()}, store


# --- what hosts move -------------------------------------------------------------------------------------------------


def test_hosts_of_one_prefix_leave_each_other_alone(make: Make, objects: ObjectStore) -> None:
    """Of one run, snapshot and moment: each has a place of its own, and removes nothing of the other's."""
    hosts = [make(place) for place in (0, 1)]
    for host in hosts:
        host.run()
        host.take("s", 2.5)
        host.moved()
    assert listed(objects) == ["_host-0-of-2/r/s", "_host-1-of-2/r/s"]
    hosts[0].remove("s")
    assert listed(objects) == ["_host-1-of-2/r/s"]


def test_a_snapshot_that_other_hosts_may_lack_stays(make: Make, objects: ObjectStore) -> None:
    """It is moved once it is there on all hosts, by its row."""
    host = make(0)
    row = host.run()
    text = host.take("s", 2.5, begun=True)
    host.take("t", 3.5)
    wait_until(lambda: host.places()["t"], "the other's move")
    assert (listed(objects), host.offload.waiting) == (["_host-0-of-2/r/t"], 0)
    shown = RowChange(shown=("s", json.dumps({**json.loads(text), "begun": False})))
    host.store.keep_record(row, "", 9, durable=True, change=shown)
    host.offload.wake()
    host.moved()


def test_a_place_of_another_cluster_is_told(make: Make, objects: ObjectStore) -> None:
    """Nothing is moved where a cluster of another number of hosts has moved snapshots, until these are gone."""
    other = make(0, 3, 3)
    other.run()
    other.take("s", 2.5)
    other.moved()
    host = make(1, 2, 2)
    host.run()
    host.take("s", 2.5)
    wait_until(lambda: host.offload.fault, "the fault")
    assert "3 hosts (_host-0-of-3), and this is host 1 of 2" in (host.offload.fault or "")
    assert host.places() == {"s": None}
    other.close()
    shutil.rmtree(Path(objects.url) / "_host-0-of-3")
    host.moved()


def test_a_host_that_was_taken_over_from_removes_nothing(
    make: Make, objects: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its list is old: whoever has the data dir by now may have moved a snapshot to a folder that is on it."""
    lost = threading.Event()
    removals = Store.removals

    def hold(_: FolderLock) -> None:
        if lost.is_set():
            raise TakenOver("a later process has the data dir")

    def removals_and_lose(store: Store) -> list[str]:
        found = removals(store)
        if found:
            lost.set()
        return found

    monkeypatch.setattr(FolderLock, "hold", hold)
    host = make(0)
    row = host.run()
    host.take("s", 2.5)
    host.moved()
    monkeypatch.setattr(Store, "removals", removals_and_lose)
    host.store.remove_snapshot(row, "s")
    host.offload.wake()
    wait_until(lambda: host.offload.fault, "the fault")
    assert "a later process" in (host.offload.fault or "")
    assert listed(objects) == ["_host-0-of-2/r/s"]


def test_a_new_data_dir_finds_what_the_host_had_moved(make: Make) -> None:
    """Under the row's text alone, by whatever number the run has now, and not while it is being removed."""
    host = make(0)
    host.run()
    text = host.take("s", 2.5)
    host.moved()
    host.close()
    new = make(0, folder="new")
    new.store.remove_run(new.run("before", birth=1))
    row = new.run(birth=2)
    found = new.offload.find(row, "s", text)
    assert found
    assert found[0].startswith("_host-0-of-2/r/s.")
    assert new.offload.find(row, "s", json.dumps({**json.loads(text), "recovered": True})) == found
    assert new.offload.find(row, "s", json.dumps({**json.loads(text), "checksums": {"ema": "00"}})) is None
    assert new.offload.find(row, "t", text) is None
    new.offload.close()
    adopted = SnapshotRow(row.id, "s", text, 9.5, *found)
    assert new.store.add_removal(found[0])
    assert not new.store.adopt_snapshot(adopted)
    new.store.drop_removal(found[0])
    assert new.store.adopt_snapshot(adopted)
    assert not new.store.add_removal(found[0]), "a snapshot lies there"


# --- which of it is recovered ----------------------------------------------------------------------------------------


def test_all_hosts_have_the_same(make: Make, objects: ObjectStore, tmp_path: Path) -> None:
    """Of the latest run of a name, and of each name the latest: what all had moved. Again where it was interrupted."""
    for host in [make(place) for place in (0, 1)]:
        host.store.remove_run(host.run("gone", birth=1, created_at=1.0))
        host.run(birth=4, created_at=2.5)
        host.take("s", 5.5)
        host.take("t", 4.5)
        host.moved()
        host.close()
    late = make(0)
    late.take("alone", 6.5)
    late.moved()
    for place in (0, 1):
        expected = {"r/s": None, "r/t": None}
        if place == 0:
            expected["r/alone"] = "not all hosts had moved it, or it was deleted"
        assert recovered(tmp_path, objects, place) == expected
        assert recovered(tmp_path, objects, place) == expected
        found, store = rows(tmp_path, place)
        assert [row.name for row in found["r"]] == ["t", "s"]
        assert all(json.loads(row.info)["recovered"] and row.folder for row in found["r"])
        [run] = store.runs()
        directory, shard = store.directory(), store.shard(run)
        assert directory
        assert shard
        assert (directory.place, directory.of, decode(directory.record, Record)) == (place, 2, Record(revision=4))
        assert (shard.place, shard.of, shard.record, shard.birth, run.created_at) == (place, 2, "", 4, 2.5)
        whole = json.loads(store.whole(run))
        assert [each["shape"] for each in whole["layout"]] == [[4, 2], [4]]
        assert json.loads(run.config)["layout"] != whole["layout"]
        store.close()


def test_an_earlier_snapshot_of_the_name_is_left_out(make: Make, objects: ObjectStore, tmp_path: Path) -> None:
    """It was deleted, and no host had removed it yet."""
    for host in [make(place) for place in (0, 1)]:
        host.run()
        host.take("s", 2.5)
        host.moved()
        kept = shutil.copytree(objects.url, tmp_path / "kept")
        host.remove("s")
        host.take("s", 3.5)
        host.moved()
        host.close()
        shutil.copytree(kept, objects.url, dirs_exist_ok=True)
        shutil.rmtree(kept)
    assert len(objects.find("snapshot.json")) == 4
    for place in (0, 1):
        recovered(tmp_path, objects, place)
        found, store = rows(tmp_path, place)
        assert [json.loads(row.info)["created_at"] for row in found["r"]] == [3.5]
        store.close()


def test_runs_have_the_same_averages_on_all_hosts(make: Make, objects: ObjectStore, tmp_path: Path) -> None:
    """Of which there were others by the time that one of the hosts moved its slice."""
    for place in (0, 1):
        host = make(place)
        row = host.run()
        if place:
            added = read_setup(whole_config(RunConfig("r", LAYOUT), 2), None)
            host.store.set_averages(row, dump_setup(added))
        host.take("s", 2.5)
        host.moved()
        host.close()
    told = []
    for place in (0, 1):
        recovered(tmp_path, objects, place)
        _, store = rows(tmp_path, place)
        told += [row.averages for row in store.runs()]
        store.close()
    assert told == [None, None]


def test_an_earlier_run_of_the_name_is_left_out(make: Make, objects: ObjectStore, tmp_path: Path) -> None:
    """A host had not removed yet what it had of a run that was deleted and made anew."""
    for host in [make(place) for place in (0, 1)]:
        host.run(birth=1, created_at=1.5)
        host.take("s", 2.5)
        host.moved()
        host.close()
    for host in [make(place, folder="later") for place in (0, 1)]:
        host.run(birth=3, created_at=3.5)
        host.take("t", 4.5)
        host.moved()
        host.close()
    for place in (0, 1):
        assert {name for name, why in recovered(tmp_path, objects, place).items() if why is None} == {"r/t"}


def test_of_twins_one_is_enough(make: Make, objects: ObjectStore, tmp_path: Path) -> None:
    """A twin that had moved less is told to be filled, where the other had all; neither is asked for the other's."""
    for place in range(4):
        host = make(place, 4, 2)
        host.run()
        host.take("s", 2.5)
        if place != 3:
            host.take("t", 3.5)
        host.moved()
        host.close()
    for place in (0, 1, 2):
        assert recovered(tmp_path, objects, place, 4) == {"r/s": None, "r/t": None}
    with pytest.raises(NotRecovered, match=r"host 3 had not moved snapshot 't' .* empty data dir"):
        recovered(tmp_path, objects, 3, 4)


@pytest.mark.parametrize("of", [3, 4])
def test_a_wrong_place_is_refused(make: Make, objects: ObjectStore, tmp_path: Path, of: int) -> None:
    """Also one of as many hosts, with twins where there were none: nothing is written."""
    for place in (0, 1):
        host = make(place)
        host.run()
        host.take("s", 2.5)
        host.moved()
    with pytest.raises(NotRecovered, match="2 hosts with 2 shards, and this is to be host 0 of"):
        recovered(tmp_path, objects, 0, of)
    store = Store(tmp_path / "new-0")
    assert store.directory() is None
    store.close()


def test_a_data_dir_that_was_served_is_refused(make: Make, objects: ObjectStore, tmp_path: Path) -> None:
    """The hosts agreed on something since, which recovering would undo; so is one of another place, or of no host."""
    for place in (0, 1):
        host = make(place)
        host.run()
        host.take("s", 2.5)
        host.moved()
    recovered(tmp_path, objects, 0)
    store = Store(tmp_path / "new-0")
    store.keep_directory(encode(Record(Term(1, "c"), revision=1)))
    store.close()
    with pytest.raises(NotRecovered, match="served since"):
        recovered(tmp_path, objects, 0)
    (tmp_path / "new-0").rename(tmp_path / "new-1")
    with pytest.raises(CatalogUnusable, match="host 0 of 2"):
        recovered(tmp_path, objects, 1)


def test_slices_are_no_snapshots_of_a_server(make: Make, objects: ObjectStore, tmp_path: Path) -> None:
    """Recovering without a place leaves them out, with what to do; a store without any has nothing of a host."""
    host = make(0)
    host.run()
    assert recovered(tmp_path, objects, 0) == {}
    host.take("s", 2.5)
    host.moved()
    store = Store(tmp_path / "alone")
    [found] = recover(store, objects)
    assert (found.run, found.snapshot) == ("r", "s")
    assert "--shard 0/2" in (found.left_out or "")
    assert store.runs() == []
    store.close()
