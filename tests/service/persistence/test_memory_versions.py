"""Runs whose versions lie in memory files: what a crash, a reboot, damage and a lack of room leave.

Processes that are really killed are in tests/e2e/test_crash.py. Knows data dirs, folders in shared memory, and
registries opened on them again. Does not know HTTP or processes.
"""

from __future__ import annotations

import gc
import os
import shutil
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from ema_client.errors import AwaitingWeights, Overloaded, RunDegraded, StorageFailed
from ema_client.protocol import AverageConfig
from ema_service.persistence.releasing import release
from ema_service.storage import MEMORY, MemoryFiles, MemoryFilesUnusable, Store
from ema_service.storage.catalog import Catalog
from ema_service.storage.slots import Slot

if TYPE_CHECKING:
    from tests.service.conftest import LocalRun, LocalServer

Model = Callable[[int], dict[str, Tensor]]

TWO = (AverageConfig("slow"), AverageConfig("fast", decay=0.5))


@pytest.fixture
def server(local_server: Callable[..., LocalServer], ram_dir: Path) -> LocalServer:
    return local_server(ram_dir=ram_dir)


@pytest.fixture
def begun(server: LocalServer, model: Model) -> Callable[..., LocalRun]:
    """Make the run ``r`` with two averages and push ``steps`` to it."""

    def make(steps: Iterator[int] | range = range(10, 40, 10), **config: Any) -> LocalRun:
        run = server.create("r", model(0), averages=TWO, **config)
        run.begin(model(0))
        for step in steps:
            run.push(step, model(step))
        return run

    return make


def again(server: LocalServer) -> LocalRun:
    """The run after a new start, with its memory looked through."""
    server.start()
    server.registry.verify()
    return server.run("r")


def seen(run: LocalRun) -> dict[str, Any]:
    """Everything of a run that must come back."""
    return {"version": run.version, "bytes": run.bytes(), "etag": run.etag, "status": run.info.status}


def files_of(server: LocalServer) -> list[Path]:
    """The memory files that are there."""
    return sorted(path for path in server.ram_dir.rglob("*.*") if path.is_file()) if server.ram_dir else []


def reboot(server: LocalServer) -> None:
    """What the machine's end takes: the process, and all that lies in memory."""
    server.crash()
    assert server.ram_dir is not None
    shutil.rmtree(server.ram_dir)


# --- the end of the process -----------------------------------------------------------------------------------------


def test_crash_loses_nothing(server: LocalServer, begun: Callable[..., LocalRun], model: Model) -> None:
    """After a crash at any number of updates everything is as it was, same version and ETag, no epoch is spent."""
    run = begun(range(0))
    for step in (*range(10, 60, 10), None):
        before = seen(run)
        assert run.info.durable_step == run.info.step
        server.crash()
        run = again(server)
        assert seen(run) == before
        assert run.info.durable_step == run.info.step
        if step is not None:
            assert run.push(step, model(step)).durable_step == step

    assert run.info.versions_in == "memory files"
    assert not run.push(50, model(50)).applied
    states = [run.run.ledger.status_of(step).state for step in (10, 30, 45, 50)]
    assert states == ["applied", "applied", "unknown", "applied"]


def test_nothing_is_written_to_disk(
    begun: Callable[..., LocalRun], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push writes no file: what survives is memory and a row."""
    run = begun()

    def never(*_: object) -> None:
        raise AssertionError("a slot was written")

    monkeypatch.setattr(Slot, "write", never)
    monkeypatch.setattr(Slot, "finish", never)
    run.push(40, model(40))
    run.push(50, model(50))

    assert run.info.durable_step == 50
    assert run.info.checkpoint_step is None


def test_memory_is_used_again(server: LocalServer, begun: Callable[..., LocalRun], model: Model) -> None:
    """However many updates and crashes: two files for each average, and no more."""
    run = begun(range(1, 30))
    assert len(files_of(server)) == 4
    for _ in range(3):
        server.crash()
        run = again(server)
        for step in range(3):
            run.push((run.info.step or 0) + 1 + step, model(step))
        assert len(files_of(server)) == 4


def test_averages_share_the_first_file(server: LocalServer, begun: Callable[..., LocalRun], model: Model) -> None:
    """The initial weights are one file for both averages; after a crash, too, it is written over once only."""
    run = begun(range(0))
    assert run.state.arenas[0] is run.state.arenas[1]
    server.crash()
    run = again(server)
    assert run.state.arenas[0] is run.state.arenas[1]
    before = run.bytes()
    held = run.state
    run.push(1, model(1))
    run.push(2, model(2))

    assert [arena.tensor.numpy().tobytes() for arena in held.arenas] == list(before.values())
    assert run.state.arenas[0] is not run.state.arenas[1]


def test_changes_without_tensors_survive(server: LocalServer, begun: Callable[..., LocalRun], model: Model) -> None:
    """A changed decay and a counter that was reset come back from a crash."""
    run = begun()
    for change in (
        lambda: server.registry.set_decay("r", 0.25, "fast"),
        lambda: server.registry.reset_num_updates("r"),
    ):
        change()
        run = server.run("r")
        before = seen(run)
        server.crash()
        run = again(server)
        assert seen(run) == before
    assert run.push(40, model(40)).num_updates == 1


def test_superseded_version_is_free_at_once(server: LocalServer, begun: Callable[..., LocalRun], model: Model) -> None:
    """Keeping the newest version keeps no other; a deleted run keeps none, and no file."""
    run = begun()
    gc.disable()
    try:
        superseded = weakref.ref(run.state.arenas[0])
        run.push(40, model(40))
        assert superseded() is None
        latest = weakref.ref(run.state.arenas[0])
        server.registry.delete("r")
        del run
        assert latest() is None
    finally:
        gc.enable()
    assert files_of(server) == []


def test_push_that_breaks_off(server: LocalServer, begun: Callable[..., LocalRun], model: Model) -> None:
    """An update in the middle of its averaging when the process ends was never there."""
    run = begun()
    before = seen(run)
    update = run.run.begin(40, run.staged(model(40)))
    update.preparation.advance(run.run.layout.param_bytes)
    server.crash()

    assert seen(again(server)) == before
    assert update.plan.step == 40


def test_run_that_others_left_alone(server: LocalServer, model: Model) -> None:
    """Several runs in one folder come back each with its own; files of a run that is gone are freed."""
    runs = {name: server.create(name, model(0)) for name in ("a", "b", "gone")}
    for number, run in enumerate(runs.values()):
        run.begin(model(0))
        run.push(1, model(number))
    before = {name: run.bytes() for name, run in runs.items()}
    server.crash()
    assert server.folder is not None
    with sqlite3.connect(server.folder / "catalog.db") as catalog:
        catalog.execute("DELETE FROM runs WHERE name = 'gone'")
    catalog.close()
    server.start()
    server.registry.verify()

    assert {name: server.run(name).bytes() for name in ("a", "b")} == {name: before[name] for name in ("a", "b")}
    assert len(files_of(server)) == 4


# --- checkpoints, a clean stop, the end of the machine --------------------------------------------------------------


def test_clean_stop_gives_the_memory_back(server: LocalServer, begun: Callable[..., LocalRun], model: Model) -> None:
    """A clean stop brings the newest version to the disk and frees the memory; it comes back as the same version."""
    run = begun()
    before = seen(run)
    server.stop()
    assert files_of(server) == []
    assert server.ram_dir is not None
    assert not any(server.ram_dir.iterdir())
    run = again(server)

    assert seen(run) == before
    assert (run.info.durable_step, run.info.checkpoint_step) == (30, 30)
    run.push(40, model(40))
    assert (run.info.durable_step, run.info.checkpoint_step) == (40, 30)
    before = seen(run)
    server.crash()
    assert seen(again(server)) == before


def test_reboot_leaves_the_newest_checkpoint(server: LocalServer, begun: Callable[..., LocalRun], model: Model) -> None:
    """With the memory go the updates since the last checkpoint; ``checkpoint_step`` had said so; a new epoch begins."""
    run = begun()
    server.registry.checkpoint()
    before = run.bytes()
    assert (run.info.durable_step, run.info.checkpoint_step) == (30, 30)
    run.push(40, model(40))
    assert (run.info.durable_step, run.info.checkpoint_step) == (40, 30)
    reboot(server)
    run = again(server)

    assert (run.info.status, run.info.version, run.info.step) == ("ready", "2.3", 30)
    assert run.bytes() == before
    run.push(40, model(41))
    assert run.info.version == "2.4"
    reboot(server)
    assert again(server).info.version == "3.3"


def test_reboot_before_any_checkpoint(server: LocalServer, begun: Callable[..., LocalRun]) -> None:
    """A run that was never kept on disk awaits its weights again, as it says."""
    run = begun()
    assert run.info.checkpoint_step is None
    reboot(server)
    run = again(server)

    assert run.info.status == "awaiting_weights"
    with pytest.raises(AwaitingWeights):
        _ = run.state


def test_epochs_grow_beyond_what_was_lost(server: LocalServer, begun: Callable[..., LocalRun], model: Model) -> None:
    """A version that someone may have read in a later epoch, since lost, never has a name in common with a new one."""
    run = begun()
    server.snapshot("s")
    server.registry.checkpoint()
    run.push(40, model(40))
    server.registry.rewind("r", "s")
    for step in (40, 50):
        run.push(step, model(step))
    assert run.info.version == "2.2"
    reboot(server)

    assert again(server).info.version in ("3.0", "3.3")


def test_rewind_outlives_the_machine(server: LocalServer, begun: Callable[..., LocalRun], model: Model) -> None:
    """A rewind is on disk when it is answered, and in memory for what follows."""
    run = begun()
    server.snapshot("s")
    before = run.bytes()
    run.push(40, model(40))
    server.registry.rewind("r", "s")
    assert run.bytes() == before
    assert run.info.checkpoint_step == 30
    server.crash()
    run = again(server)
    assert (run.info.version, run.bytes()) == ("2.0", before)
    reboot(server)

    assert again(server).bytes() == before


def test_checkpoint_of_what_moved_only(
    server: LocalServer, begun: Callable[..., LocalRun], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that did not move since its last checkpoint is not written again."""
    run = begun()
    server.registry.checkpoint()
    written: list[str] = []
    finish = Slot.finish
    monkeypatch.setattr(Slot, "finish", lambda slot, headers: (written.append(slot.name), finish(slot, headers)))
    server.registry.checkpoint()
    assert written == []
    run.push(40, model(40))
    server.registry.checkpoint()
    assert len(written) == 1


def test_updates_go_on_while_a_checkpoint_is_written(
    server: LocalServer, begun: Callable[..., LocalRun], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is of one version although others follow meanwhile; what a reboot leaves is that version."""
    run = begun()
    before = run.bytes()
    writing, may_go_on = threading.Event(), threading.Event()
    finish = Slot.finish

    def slowly(slot: Slot, headers: dict[str, bytes]) -> None:
        writing.set()
        assert may_go_on.wait(30)
        finish(slot, headers)

    monkeypatch.setattr(Slot, "finish", slowly)
    keeping = threading.Thread(target=server.registry.checkpoint)
    keeping.start()
    assert writing.wait(30)
    for step in range(40, 60):
        run.push(step, model(step))
    may_go_on.set()
    keeping.join(30)
    monkeypatch.undo()
    assert (run.info.durable_step, run.info.checkpoint_step) == (59, 30)
    now = seen(run)
    server.crash()
    assert seen(again(server)) == now, "the row of the checkpoint came later and is of an earlier version"
    reboot(server)
    assert again(server).bytes() == before


def test_files_beyond_what_is_needed_go_back(server: LocalServer, begun: Callable[..., LocalRun], model: Model) -> None:
    """A version that a reader held costs files of its own; they are given back once nobody needs them."""
    run = begun()
    held = [run.state]
    for step in (40, 50, 60):
        run.push(step, model(step))
        held.append(run.state)
    assert len(files_of(server)) > 4
    held.clear()
    server.registry.checkpoint()

    assert len(files_of(server)) == 4


# --- damage ---------------------------------------------------------------------------------------------------------


def spoil(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(11)
        byte = file.read(1)
        file.seek(11)
        file.write(bytes([byte[0] ^ 1]))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "cut": lambda path: os.truncate(path, 100),
    "a hole": lambda path: (size := path.stat().st_size, os.truncate(path, 0), os.truncate(path, size)),
    "flipped": spoil,
}


def in_use(server: LocalServer) -> list[Path]:
    """The files that the catalog names."""
    assert server.folder is not None
    with sqlite3.connect(server.folder / "catalog.db") as catalog:
        [(text,)] = catalog.execute("SELECT state FROM checkpoints WHERE folder = ?", (MEMORY,)).fetchall()
    catalog.close()
    return [path for path in files_of(server) if path.name in text]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kept", [True, False], ids=["with a checkpoint", "without"])
def test_damaged_memory_is_told(
    damage: str, kept: bool, server: LocalServer, begun: Callable[..., LocalRun], model: Model
) -> None:
    """One file that is missing, cut or not what was written: degraded at the checkpoint, and no update is applied."""
    run = begun()
    before = run.bytes()
    if kept:
        server.registry.checkpoint()
    run.push(40, model(40))
    server.crash()
    DAMAGES[damage](in_use(server)[0])
    run = again(server)

    assert run.info.status == "degraded"
    assert "memory" in (run.info.reason or "")
    with pytest.raises(RunDegraded):
        run.push(50, model(50))
    if kept:
        assert "the updates after step 30 up to step 40 are gone" in (run.info.reason or "")
        assert (run.info.version, run.bytes()) == ("2.3", before)
        server.registry.accept("r")
        assert run.push(40, model(40)).applied
    else:
        with pytest.raises(RunDegraded):
            _ = run.state


def test_no_update_before_the_memory_was_looked_through(
    server: LocalServer, begun: Callable[..., LocalRun], model: Model
) -> None:
    """Readers are served at once; an update waits, and is refused where the memory turns out damaged."""
    begun()
    server.registry.checkpoint()
    server.crash()
    spoil(in_use(server)[0])
    server.start()
    run = server.run("r")
    assert run.info.status == "ready"
    faults: list[BaseException] = []

    def push() -> None:
        try:
            run.push(40, model(40))
        except RunDegraded as fault:
            faults.append(fault)

    pushing = threading.Thread(target=push)
    pushing.start()
    pushing.join(0.3)
    assert pushing.is_alive()
    server.registry.verify()
    pushing.join(30)

    assert len(faults) == 1
    assert run.info.step == 30


def test_row_that_is_damaged(server: LocalServer, begun: Callable[..., LocalRun]) -> None:
    """A row of memory files that cannot be read is damage, not a loss that was to be expected."""
    begun()
    server.registry.checkpoint()
    server.crash()
    assert server.folder is not None
    with sqlite3.connect(server.folder / "catalog.db") as catalog:
        catalog.execute("UPDATE checkpoints SET state = '{' WHERE folder = ?", (MEMORY,))
    catalog.close()

    assert again(server).info.status == "degraded"


# --- a lack of room -------------------------------------------------------------------------------------------------


def test_no_room_at_creation(
    server: LocalServer, begun: Callable[..., LocalRun], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory files have no room versions go to slots on disk, each of them; the run says so, and survives."""
    monkeypatch.setattr(MemoryFiles, "room", lambda _: 100)
    run = begun()
    assert "slots on disk, each of them" in (run.info.versions_in or "")
    assert "has room for 100" in (run.info.versions_in or "")
    assert files_of(server) == []
    before = seen(run)
    server.crash()
    run = again(server)
    assert seen(run) == before
    run.push(40, model(40))
    before = seen(run)
    monkeypatch.undo()
    server.crash()
    run = again(server)

    assert seen(run) == before, "the next start has room, and spends no epoch"
    run.push(50, model(50))
    assert run.info.versions_in == "memory files"


def test_no_room_for_one_more_push(
    begun: Callable[..., LocalRun], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where readers hold all files and no other can be had, a push is told to come again and changes nothing."""
    run = begun()
    held = run.state
    run.push(40, model(40))
    before = seen(run)
    monkeypatch.setattr(MemoryFiles, "room", lambda _: 0)
    with pytest.raises(Overloaded, match="memory"):
        run.push(50, model(50))
    assert seen(run) == before
    assert held.version.step == 30
    del held
    gc.collect()

    assert run.push(50, model(50)).applied


def test_no_memory_files_at_all(server: LocalServer, model: Model) -> None:
    """A folder that cannot be used is no reason not to start: runs whose memory is there are at their checkpoint."""
    run = server.create("r", model(0))
    run.begin(model(0))
    run.push(1, model(1))
    server.registry.checkpoint()
    run.push(2, model(2))
    server.crash()
    server.ram_dir = None
    run = again(server)

    assert (run.info.status, run.info.step, run.info.version) == ("ready", 1, "2.1")
    assert run.push(2, model(2)).durable_step == 2
    assert (run.info.versions_in or "").startswith("slots on disk")


# --- rows that fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("committed", [True, False], ids=["the row is there all the same", "no row"])
def test_failed_row(
    committed: bool,
    server: LocalServer,
    begun: Callable[..., LocalRun],
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A push whose row failed is refused; until a later row says otherwise both versions' files are left alone."""
    run = begun()
    before = seen(run)
    put = Catalog.put_checkpoint

    def fail(catalog: Catalog, *args: Any, **kwargs: Any) -> None:
        if committed:
            put(catalog, *args, **kwargs)
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "put_checkpoint", fail)
        for step in (40, 50):
            with pytest.raises(StorageFailed):
                run.push(step, model(step))
        assert run.info.status == "degraded"
        assert {**seen(run), "status": "ready"} == before
        doubtful = {path.name for path in in_use(server)}
    refilled = run.staged(model(7))
    assert server.store is not None
    assert server.store.memory_files is not None
    server.crash()
    run = again(server)
    assert run.info.status == "ready"
    assert run.info.step == (50 if committed else 30)
    assert run.push(60, model(60)).applied
    assert refilled.data is not None
    assert doubtful


def test_stop_on_a_full_disk_keeps_the_memory(
    server: LocalServer, begun: Callable[..., LocalRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A last checkpoint that cannot be written leaves everything in memory for the next start."""
    before = seen(begun())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Slot, "finish", full)
        server.stop()
    assert len(files_of(server)) == 4
    assert seen(again(server)) == before


# --- giving back ----------------------------------------------------------------------------------------------------


def test_release_of_a_killed_server(server: LocalServer, begun: Callable[..., LocalRun], model: Model) -> None:
    """What a clean stop would have done is done for a server that was killed: on disk, memory free, nothing lost."""
    run = begun()
    other = server.create("other", model(0), durability="disk")
    other.begin(model(0))
    before = seen(run)
    server.crash()
    assert server.folder is not None
    store = Store(server.folder)
    store.use_memory_files(server.ram_dir)
    assert list(release(store)) == [("r", 30)]
    assert list(release(store)) == []
    store.close()
    assert files_of(server) == []

    assert seen(again(server)) == before


def test_release_with_another_folder_for_memory(
    server: LocalServer, begun: Callable[..., LocalRun], model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run whose version in memory lies elsewhere is left as it is: the older checkpoint does not take its place."""
    run = begun()
    server.registry.checkpoint()
    run.push(40, model(40))
    before = seen(run)
    server.crash()
    assert server.folder is not None
    store = Store(server.folder)
    store.use_memory_files(tmp_path / "elsewhere")
    assert list(release(store)) == []
    store.close()
    assert f"its memory is not in {tmp_path / 'elsewhere'}: give the --ram-dir" in caplog.text

    assert seen(again(server)) == before


def test_release_of_damaged_memory(server: LocalServer, begun: Callable[..., LocalRun]) -> None:
    """A run whose memory is not what was written is left as it is, for someone to look at."""
    begun()
    server.crash()
    spoil(in_use(server)[0])
    assert server.folder is not None
    store = Store(server.folder)
    store.use_memory_files(server.ram_dir)
    assert list(release(store)) == []
    store.close()

    assert files_of(server) != []


def test_memory_files_are_one_servers(server: LocalServer, ram_dir: Path) -> None:
    """While a server runs, nobody else opens its folder."""
    assert server.folder is not None
    with pytest.raises(MemoryFilesUnusable):
        MemoryFiles(server.folder, ram_dir)


def test_other_durabilities_take_no_memory_files(server: LocalServer, model: Model) -> None:
    """``disk`` and ``memory`` are as they were."""
    for durability in ("disk", "memory"):
        run = server.create(durability, model(0), durability=durability)
        run.begin(model(0))
        run.push(1, model(1))

    assert files_of(server) == []
    assert torch.equal(server.run("disk").shadows()["conv.weight"], server.run("memory").shadows()["conv.weight"])
