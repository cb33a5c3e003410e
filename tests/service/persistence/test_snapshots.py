"""Snapshots of a run: named copies that nothing changes, on full disks, under readers, after a restart.

Knows data dirs, and registries opened on them again. Does not know HTTP or processes.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from torch import Tensor

from ema_client.errors import (
    AverageNotFound,
    AwaitingWeights,
    EmaError,
    InvalidRequest,
    SnapshotExists,
    SnapshotNotFound,
)
from ema_client.protocol import AverageConfig
from ema_service.storage import files as storage_files
from ema_service.storage import store as storage_store
from tests.service.persistence.damage import DAMAGE

if TYPE_CHECKING:
    from tests.service.conftest import LocalRun, LocalServer

Model = Callable[[int], dict[str, Tensor]]

TWO = (AverageConfig("slow"), AverageConfig("fast", decay=0.5))


@pytest.fixture
def server(local_server: Callable[..., LocalServer]) -> LocalServer:
    return local_server()


@pytest.fixture
def run(server: LocalServer, model: Model) -> LocalRun:
    """A run with two averages at step 30."""
    run = server.create("r", model(0), averages=TWO, durability="memory")
    run.begin(model(0))
    for step in (10, 20, 30):
        run.push(step, model(step))
    return run


def again(server: LocalServer) -> LocalRun:
    """The run after a new start."""
    server.start()
    return server.run("r")


# --- snapshots ------------------------------------------------------------------------------------------------------


def test_snapshot_is_a_version(server: LocalServer, run: LocalRun, model: Model) -> None:
    """A snapshot holds all averages as they were, whatever comes after, also after a restart."""
    before = run.bytes()
    info, new = server.snapshot("s")
    assert new
    assert (info.run, info.name, info.version, info.step, info.num_updates) == ("r", "s", "1.3", 30, 3)
    assert info.averages == ("slow", "fast")
    run.push(40, model(40))
    server.stop()
    again(server)

    snapshots = server.registry.snapshots("r")
    assert snapshots.all() == [info]
    paths = server.data_files("r.*/snapshots/s/*")
    assert info.bytes == sum(path.stat().st_size for path in paths)
    for name, expected in before.items():
        file, about = snapshots.open("s", name)
        assert bytes(file.read(0, len(expected))) == expected
        assert (about.average, about.version, about.snapshot) == (name, "1.3", "s")
        file.close()


def test_snapshot_again(server: LocalServer, run: LocalRun, model: Model) -> None:
    """The same name again is the same snapshot as long as the run has not moved; then it is refused."""
    snapshots = server.registry.snapshots("r")
    first, _ = server.snapshot("s")

    assert server.snapshot("s") == (first, False)
    run.push(40, model(40))
    with pytest.raises(SnapshotExists, match=r"1\.3.*1\.4"):
        server.snapshot("s")
    assert server.snapshot("t")[0].version == "1.4"
    assert [info.name for info in snapshots.all()] == ["s", "t"]


def test_keep_removes_of_its_series_alone(server: LocalServer, run: LocalRun) -> None:
    """Of a series the newest stay. A name without a dash is in no series: others without one stay too."""
    assert run.run.config.run == "r"
    for name in ("best", "final", "a-1", "a-2", "b-1"):
        server.snapshot(name)
    server.snapshot("latest", keep=1)
    assert names(server) == ["best", "final", "a-1", "a-2", "b-1", "latest"]
    server.snapshot("a-3", keep=2)
    assert names(server) == ["best", "final", "a-2", "b-1", "latest", "a-3"]


def names(server: LocalServer) -> list[str]:
    return [info.name for info in server.registry.snapshots("r").all()]


def test_names_that_differ_by_case(server: LocalServer, run: LocalRun, model: Model) -> None:
    """Where the file system cannot tell such names apart, no snapshot or average takes another's files."""
    assert server.store is not None
    if not server.store.folds_case:
        assert server.snapshot("Best")[1]
        assert server.snapshot("best")[1], "these are two files here"
        server.store.folds_case = True  # what a server finds on another disk
    server.snapshot("Final")
    with pytest.raises(SnapshotExists, match=r"'Final'.*case"):
        server.snapshot("FINAL")
    assert server.snapshot("Final")[1] is False
    with pytest.raises(InvalidRequest, match="averages"):
        server.create("two", model(0), averages=(AverageConfig("EMA"), AverageConfig("ema")))
    assert run.state


@pytest.mark.usefixtures("run")
def test_snapshots_that_are_not_there(server: LocalServer, model: Model) -> None:
    """Unknown snapshots and averages are named; a run without weights has nothing to copy."""
    snapshots = server.registry.snapshots("r")
    server.snapshot("s")
    for act in (
        lambda: snapshots.find("none"),
        lambda: snapshots.open("none", None),
        lambda: snapshots.delete("none"),
    ):
        with pytest.raises(SnapshotNotFound, match="'none'"):
            act()
    with pytest.raises(AverageNotFound, match="'none'"):
        snapshots.open("s", "none")
    server.create("empty", model(0))
    with pytest.raises(AwaitingWeights):
        server.snapshot("s", run="empty")


def test_snapshot_deleted_under_its_reader(server: LocalServer, run: LocalRun, model: Model) -> None:
    """Who reads a snapshot reads on to its end after it was deleted; its name is free for another version."""
    before = run.bytes()["slow"]
    snapshots = server.registry.snapshots("r")
    server.snapshot("s")
    file, _ = snapshots.open("s", None)
    snapshots.delete("s")
    assert server.data_files("r.*/snapshots/*") == []
    run.push(40, model(40))
    assert server.snapshot("s")[0].version == "1.4"

    assert bytes(file.read(0, len(before))) == before
    file.close()


@pytest.mark.parametrize("damage", ["cut by a byte", "a header of rubbish", "gone"])
@pytest.mark.usefixtures("run")
def test_damaged_snapshot_is_not_the_readers_fault(damage: str, server: LocalServer) -> None:
    """A damaged snapshot is an error of the server's, in the tree, naming the snapshot: not "send another body"."""
    snapshots = server.registry.snapshots("r")
    server.snapshot("s")
    [path] = server.data_files("r.*/snapshots/s/slow.safetensors")
    DAMAGE[damage](path)

    with pytest.raises(EmaError) as refusal:
        snapshots.open("s", "slow")
    assert refusal.value.status != 422
    assert "'s'" in refusal.value.detail


@pytest.mark.usefixtures("run")
def test_snapshot_on_a_full_disk(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot that could not be written is not there, and can be taken once there is room."""
    snapshots = server.registry.snapshots("r")

    def full(path: Path, chunks: Iterable[bytes | memoryview], _: object) -> int:
        for _ in chunks:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(storage_store, "write_whole", full)
        with pytest.raises((OSError, EmaError)):
            server.snapshot("s")
    assert snapshots.all() == []
    assert server.registry.frozen.bytes_in_use == 0

    assert server.snapshot("s")[1]


@pytest.mark.usefixtures("run")
def test_everything_is_synced_before_it_counts(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot's files, and every folder that got a new entry for them, are on disk before its row is."""
    synced: list[Path] = []
    sync = storage_files.sync_folder

    def note(folder: Path) -> None:
        synced.append(folder)
        sync(folder)

    monkeypatch.setattr(storage_files, "sync_folder", note)
    monkeypatch.setattr(storage_store, "sync_folder", note)
    server.snapshot("s")
    [folder] = server.data_files("r.*/snapshots/s")

    assert {folder, folder.parent, folder.parent.parent} <= set(synced)
