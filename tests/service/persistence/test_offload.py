"""Snapshots on an object store, in a folder: crashes after each step, faults of the store, what is removed there.

Knows registries opened again on a data dir, and an object store that fails when it is told to. Does not know S3, HTTP
or processes (tests/e2e/test_snapshot_store.py).
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from torch import Tensor

from ema_client.errors import Overloaded, SnapshotDamaged, SnapshotExists, StorageDisabled, StorageFailed
from ema_client.protocol import AverageConfig
from ema_service.persistence import offload
from ema_service.persistence.cards import CARD
from ema_service.persistence.recovering import recover
from ema_service.storage import ObjectStore, ObjectStoreFailed, open_objects
from ema_service.storage.store import Store
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.service.conftest import LocalRun, LocalServer

Model = Callable[[int], dict[str, Tensor]]

TWO = (AverageConfig("slow"), AverageConfig("fast", decay=0.5))


class Failing(ObjectStore):
    """A folder as an object store, which fails before the writes of one file, or changes a byte of what it is given.

    before: the end of a path that is not written. flips: the end of a path whose last byte is changed.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._objects = open_objects(str(folder))
        self.url = self._objects.url
        self.before = self.flips = "-"
        self.tried = threading.Event()

    def names(self) -> list[str]:
        return self._objects.names()

    def write(self, path: str, pieces: Iterable[bytes | memoryview], size: int) -> None:
        if path.endswith(self.before):
            self.tried.set()
            raise ObjectStoreFailed("it was told to fail")
        whole = b"".join(bytes(piece) for piece in pieces)
        if path.endswith(self.flips):
            self.tried.set()
            whole = flipped(whole)
        self._objects.write(path, [whole], size)

    def read(self, path: str, start: int, stop: int) -> bytes:
        return self._objects.read(path, start, stop)

    def remove(self, folder: str, first: str) -> None:
        self._objects.remove(folder, first)

    def find(self, name: str) -> list[str]:
        return self._objects.find(name)

    def files(self) -> list[str]:
        return sorted(name for _, _, names in os.walk(self.folder) for name in names)


def flipped(whole: bytes) -> bytes:
    """With another last bit."""
    return whole[:-1] + bytes([whole[-1] ^ 1])


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that failed is tried again after hundredths of a second."""
    monkeypatch.setattr(offload, "_RETRY_SECONDS", (0.01, 0.05))


@pytest.fixture
def objects(tmp_path: Path) -> Failing:
    return Failing(tmp_path / "objects")


@pytest.fixture
def server(local_server: Callable[..., LocalServer], objects: Failing, model: Model) -> LocalServer:
    """With a run of two averages at step 10."""
    server = local_server(objects=objects)
    begun(server, model)
    return server


def begun(server: LocalServer, model: Model, run: str = "r") -> LocalRun:
    run = server.create(run, model(0), averages=TWO, durability="memory")
    run.begin(model(0))
    run.push(10, model(10))
    return run


def content(server: LocalServer, name: str = "s") -> dict[str, tuple[bytes, str]]:
    """What readers get of a snapshot, and what its ETag is made of."""
    found = {}
    for average in ("slow", "fast"):
        file, _ = server.registry.snapshots("r").open(name, average)
        found[average] = bytes(file.read(0, file.header.data_bytes)), file.identity
        file.close()
    return found


def stored(server: LocalServer) -> dict[str, str]:
    return {info.name: info.stored for info in server.registry.snapshots("r").all()}


def moved(server: LocalServer) -> None:
    wait_until(lambda: set(stored(server).values()) == {"store"}, "the snapshots in the store")


#: What is never written, so that a server ends before it.
_BEFORE = ["slow.safetensors", "fast.safetensors", CARD]


@pytest.mark.parametrize("before", _BEFORE)
def test_crash_in_the_middle_of_a_move(server: LocalServer, objects: Failing, before: str) -> None:
    """Wherever it comes, the snapshot is whole in the data dir, nothing is listed in the store, and the next start
    moves it."""
    objects.before = before
    server.snapshot("s")
    expected = content(server)
    assert objects.tried.wait(60)
    server.crash()
    empty = Store(objects.folder.with_name("empty"))
    assert list(recover(empty, objects)) == []
    empty.close()
    server.start()
    assert (stored(server), content(server)) == ({"s": "local"}, expected)
    objects.before = "-"
    moved(server)
    assert content(server) == expected
    assert objects.files() == ["fast.safetensors", "slow.safetensors", CARD]


def test_crash_after_the_row(server: LocalServer, objects: Failing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the files in the data dir went: the start removes them. The commit alone decides."""
    monkeypatch.setattr(Store, "remove_snapshot_files", lambda *_: None)
    server.snapshot("s")
    moved(server)
    assert server.data_files("r.*/snapshots/s/*")
    monkeypatch.undo()
    server.crash()
    server.start()
    assert not server.data_files("r.*/snapshots/*")
    assert content(server).keys() == {"slow", "fast"}
    assert len(objects.files()) == 3


def test_lent_while_it_is_moved(server: LocalServer, objects: Failing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of the files are told, wherever these are by then."""
    objects.before = CARD
    server.snapshot("s")
    snapshots = server.registry.snapshots("r")
    before, path = snapshots.lent(), Store.snapshot_file

    def found_late(*named: object) -> Path:
        objects.before = "-"
        moved(server)
        wait_until(lambda: not server.data_files("r.*/snapshots/*"), "the room")
        return path(*named)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "snapshot_file", found_late)
    assert snapshots.lent() == before
    assert stored(server) == {"s": "store"}


def test_store_with_other_bytes(server: LocalServer, objects: Failing) -> None:
    """What the store gives back is compared before the data dir's copy goes; what it damages later is told."""
    objects.flips = "fast.safetensors"
    server.snapshot("s")
    assert objects.tried.wait(60)
    offloading = server.registry.offload
    assert offloading
    wait_until(lambda: "other bytes" in (offloading.fault or ""), "the fault")
    assert stored(server) == {"s": "local"}
    objects.flips = "-"
    moved(server)
    [path] = objects.folder.rglob("fast.safetensors")
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(SnapshotDamaged, match="not those that were written"):
        server.registry.rewind("r", "s")
    path.unlink()
    with pytest.raises(SnapshotDamaged, match="fast"):
        content(server)


def test_removals_are_remembered(server: LocalServer, objects: Failing, model: Model) -> None:
    """While the store is away, beyond a restart: of a snapshot by its name, the oldest of a series, a run's."""
    for name in ("s", "e-1"):
        server.snapshot(name)
    begun(server, model, "other")
    server.snapshot("of-another", run="other")
    moved(server)
    wait_until(lambda: objects.files().count(CARD) == 3, "all three in the store")
    away = objects.folder.with_name("away")
    objects.folder.rename(away)
    with pytest.raises(StorageFailed, match="is not there: make it, or mount its disk"):
        content(server)
    server.registry.snapshots("r").delete("s")
    server.snapshot("e-2", keep=1)
    server.registry.delete("other")
    server.crash()
    server.start()
    assert stored(server) == {"e-2": "local"}
    assert sorted(path.parent.name.partition(".")[0] for path in away.rglob(CARD)) == ["e-1", "of-another", "s"]
    away.rename(objects.folder)
    moved(server)
    wait_until(lambda: len(objects.files()) == 3, "the removals")
    [card] = objects.folder.rglob(CARD)
    assert card.parent.name.startswith("e-2.")


def test_file_that_cannot_be_read_here(server: LocalServer, objects: Failing) -> None:
    """It stays where it is, and holds up no other."""
    objects.before = ".safetensors"
    server.snapshot("bad")
    [path] = server.data_files("r.*/snapshots/bad/fast.*")
    path.write_bytes(b"short")
    server.snapshot("good")
    objects.before = "-"
    wait_until(lambda: stored(server) == {"bad": "local", "good": "store"}, "the other")
    wait_until(lambda: len(objects.files()) == 3, "what was begun to be removed")


def test_readers_are_bounded(server: LocalServer) -> None:
    """Beyond so many a reader is told to come again; each that ends gives its place back, once."""
    server.snapshot("s")
    moved(server)
    snapshots = server.registry.snapshots("r")
    files = [snapshots.open("s")[0] for _ in range(offload.MOST_READERS)]
    with pytest.raises(Overloaded):
        snapshots.open("s")
    for _ in range(2):
        files[0].close()
    files[0] = snapshots.open("s")[0]
    with pytest.raises(Overloaded):
        snapshots.open("s")
    for file in files:
        file.close()


def test_server_without_the_store(server: LocalServer) -> None:
    """Snapshots there are listed, and reading says what is missing; they are there again with the store."""
    server.snapshot("s")
    moved(server)
    expected = content(server)
    server.stop()
    objects, server.objects = server.objects, None
    server.start()
    assert stored(server) == {"s": "store"}
    with pytest.raises(StorageDisabled, match="object store") as refused:
        content(server)
    assert "--snapshot-store" in refused.value.hint
    server.stop()
    server.objects = objects
    server.start()
    assert content(server) == expected


def test_recovered_snapshots(
    server: LocalServer, objects: Failing, local_server: Callable[..., LocalServer], tmp_path: Path, model: Model
) -> None:
    """They come in order, once, and not into a run of other tensors or in place of another snapshot; a version of the
    new run that has a recovered one's name is another."""
    for name in ("first", "last"):
        server.snapshot(name)
    moved(server)
    server.crash()
    other = local_server(folder=tmp_path / "new", objects=objects)
    run = begun(other, model)
    assert str(run.version) == "1.1"
    other.snapshot("last")
    moved(other)
    other.stop()
    store = Store(tmp_path / "new")
    for _ in range(2):
        found = {each.folder.partition(".")[0]: each.left_out for each in recover(store, objects) if each.left_out}
        assert found == {"r/last": "run 'r' has another snapshot of this name"}
    store.close()
    other.start()
    assert list(stored(other)) == ["last", "first"]
    with pytest.raises(SnapshotExists, match="recovered"):
        other.snapshot("first")
    other.registry.rewind("r", "first")
    shutil.rmtree(server.folder)
    third = local_server(folder=tmp_path / "third")
    third.create("r", {"w": model(0)["wide"]})
    third.stop()
    store = Store(tmp_path / "third")
    assert {each.left_out for each in recover(store, objects)} == {"run 'r' has other tensors by now"}
    store.close()
