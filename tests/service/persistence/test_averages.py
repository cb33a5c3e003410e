"""Averages that are added to a run and removed: what memory, disk, a crash and a power loss have of them.

Servers that are really killed between two steps are in tests/e2e/test_crash.py. Knows data dirs, memory files, and
registries opened on them again. Does not know HTTP.
"""

from __future__ import annotations

import contextlib
import gc
import random
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from ema_client.errors import (
    AverageNotFound,
    AwaitingWeights,
    LastAverage,
    Overloaded,
    RunDegraded,
    RunNotFound,
    StorageFailed,
    Superseded,
)
from ema_client.protocol import AverageConfig
from ema_client.schedules import litema, power
from ema_service.persistence import rows
from ema_service.persistence.releasing import release
from ema_service.storage import MemoryFilesUnusable, Store
from ema_service.storage.catalog import Catalog
from ema_service.storage.slot_files import SlotFiles
from tests.service.persistence.power import Power

if TYPE_CHECKING:
    from tests.service.conftest import LocalRun, LocalServer

Model = Callable[[int], dict[str, Tensor]]

SLOW, FAST, LONG = litema(name="slow"), litema(0.5, name="fast"), power(0.1, name="long")
#: Where versions lie: the durability, and whether there are memory files.
PLACES = {"memory files": ("process", True), "slots": ("process", False), "disk": ("disk", False)}
CHANGES: dict[str, Callable[[LocalServer], object]] = {
    "add": lambda server: server.registry.add_average("r", LONG),
    "remove": lambda server: server.registry.remove_average("r", "slow"),
}
#: Slots of a run, by place.
SLOTS = {"memory files": 2, "slots": 3, "disk": 2}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(place: str, local_server: Callable[..., LocalServer], ram_dir: Path) -> LocalServer:
    return local_server(ram_dir=ram_dir if PLACES[place][1] else None)


@pytest.fixture
def run(place: str, server: LocalServer, model: Model) -> LocalRun:
    """The run ``r`` with the averages slow and fast, at step 3."""
    made = server.create("r", model(0), averages=(SLOW, FAST), durability=PLACES[place][0])
    made.begin(model(0))
    push(made, model, 1, 2, 3)
    return made


def push(run: LocalRun, model: Model, *steps: int) -> None:
    for step in steps:
        assert run.push(step, model(step)).applied


def again(server: LocalServer) -> LocalRun:
    """The run after a new start."""
    server.start()
    server.registry.verify()
    return server.run("r")


def reboot(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> LocalRun:
    """The run after the machine's end: memory is gone, files are as they were."""
    server.crash()
    if server.ram_dir:
        shutil.rmtree(server.ram_dir)
    monkeypatch.setattr(rows, "boot_id", lambda: "another")
    return again(server)


def seen(run: LocalRun) -> dict[str, Any]:
    """What must come back: averages with their counters and bytes, version, ETag; and which averages are to be had."""
    named = [average.name for average in run.info.averages]
    return {"version": run.version, "bytes": run.bytes(), "etag": run.etag, "averages": named, "info": run.info}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(left[key] == right[key] for key in ("version", "bytes", "etag", "averages"))


def slot_files(server: LocalServer) -> list[str]:
    """The averages that the slots have a file of, one for each file."""
    return sorted(path.stem for path in server.data_files("*/slots/*/*"))


def memory_files(server: LocalServer) -> list[Path]:
    return sorted(path for path in server.ram_dir.rglob("*.*") if path.is_file()) if server.ram_dir else []


def history(server: LocalServer) -> list[str]:
    assert server.store is not None
    return [line.text for line in server.store.timeline(server.store.runs()[0], 0.0, 9) if line.kind != "created"]


def of_params(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The shadow of an average that begins with these parameters: float32 of narrower ones."""
    return {name: tensor if tensor.dtype == torch.float64 else tensor.float() for name, tensor in tensors.items()}


# --- adding ---------------------------------------------------------------------------------------------------------


def test_added_average_outlives_a_crash(server: LocalServer, run: LocalRun, model: Model) -> None:
    """Before its first update, after it, and later: the run comes up with what it had, in the version that it had."""
    server.registry.add_average("r", LONG)
    for step in (None, 4, 5, 6):
        if step:
            push(run, model, step)
        before = seen(run)
        server.crash()
        run = again(server)
        assert same(seen(run), before)
        assert before["averages"] == ["slow", "fast", "long"]
        assert set(before["bytes"]) == {"slow", "fast"} | ({"long"} if step else set())
    assert run.info.averages[2].num_updates == 2
    assert history(server) == ["average long added (power, sigma_rel 0.1)"]


def test_late_average_begins_with_an_update(run: LocalRun, server: LocalServer, model: Model) -> None:
    """Its first update copies the parameters, and is not counted; the others go on as if there were no new one."""
    server.registry.add_average("r", LONG)
    told = run.info.averages[2]
    assert (told.name, told.num_updates, told.effective_decay, told.decay) == ("long", 0, None, 1.0)
    push(run, model, 4)
    assert all(torch.equal(run.shadows("long")[name], value) for name, value in of_params(model(4)).items())
    told = run.info.averages[2]
    assert (told.num_updates, told.effective_decay) == (0, None)
    assert run.info.averages[0].num_updates == 4
    push(run, model, 5)

    # The first update of a power average copies as well, as after initial weights.
    assert all(torch.equal(run.shadows("long")[name], value) for name, value in of_params(model(5)).items())
    assert run.info.averages[2].num_updates == 1


def test_room_is_taken_at_once(place: str, server: LocalServer, run: LocalRun) -> None:
    """Memory files and files of every slot are there when the average is, and no more come with the updates."""
    server.registry.add_average("r", LONG)
    assert slot_files(server) == sorted(["slow", "fast", "long"] * SLOTS[place])
    assert len(memory_files(server)) == (6 if server.ram_dir else 0)
    sizes = {path.stat().st_size for path in server.data_files("*/slots/*/long.safetensors")}
    assert min(sizes) > run.run.layout.shadow_bytes
    assert all(path.stat().st_blocks for path in server.data_files("*/slots/*/long.safetensors"))


def test_no_more_files_come(place: str, server: LocalServer, run: LocalRun, model: Model) -> None:
    """After many updates, checkpoints and a crash there are the files that were taken."""
    server.registry.add_average("r", LONG)
    push(run, model, *range(4, 20))
    server.registry.checkpoint()
    for versions in server.registry.unsynced():
        versions.sync()
    server.crash()
    run = again(server)
    push(run, model, *range(20, 30))
    server.registry.checkpoint()
    assert slot_files(server) == sorted(["slow", "fast", "long"] * SLOTS[place])
    assert len(memory_files(server)) == (6 if server.ram_dir else 0)


class Full:
    """A place that has no room from a certain file on."""

    def __init__(self, patch: pytest.MonkeyPatch, room: int) -> None:
        self._room, self._open = room, SlotFiles._open_file
        patch.setattr(SlotFiles, "_open_file", self)

    def __get__(self, files: SlotFiles, _: type) -> Callable[..., bool]:
        def open_file(average: str, extent: Any) -> bool:
            if average == "long":
                self._room -= 1
                if self._room < 0:
                    raise OSError(28, "no space left on device")
            return self._open(files, average, extent)

        return open_file


@pytest.mark.parametrize("room", [0, 1])
def test_disk_without_room(
    room: int, place: str, server: LocalServer, run: LocalRun, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the disk has too little room nothing is changed, and what was taken is given back."""
    before = seen(run)
    with monkeypatch.context() as patch:
        Full(patch, room)
        with pytest.raises(StorageFailed, match="no space left"):
            server.registry.add_average("r", LONG)
    assert same(seen(run), before)
    assert slot_files(server) == sorted(["slow", "fast"] * SLOTS[place])
    assert len(memory_files(server)) == (4 if server.ram_dir else 0)
    push(run, model, 4)
    assert server.registry.add_average("r", LONG)[1]
    push(run, model, 5)
    assert set(run.bytes()) == {"slow", "fast", "long"}


@pytest.mark.parametrize("place", ["memory files"], indirect=True)
def test_memory_without_room(server: LocalServer, run: LocalRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where shared memory has too little room nothing is changed, and the refusal says what mends it."""
    assert server.store
    assert server.store.memory_files

    def none(*_: object) -> None:
        raise MemoryFilesUnusable(28, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(server.store.memory_files, "create", none)
        with pytest.raises(Overloaded, match="no room") as refused:
            server.registry.add_average("r", LONG)
    assert "--ram-dir" in refused.value.hint
    assert [average.name for average in run.info.averages] == ["slow", "fast"]
    assert slot_files(server) == ["fast", "fast", "slow", "slow"]


def test_limit_of_memory(place: str, server: LocalServer, run: LocalRun, model: Model) -> None:
    """An average that the server's memory has no room for beside the other runs is refused, and nothing is changed."""
    before = seen(run)
    server.memory.budget.limit = server.memory.budget.used + 100
    with pytest.raises(Overloaded):
        server.registry.add_average("r", LONG)
    server.memory.budget.limit = 1 << 40
    assert same(seen(run), before)
    assert slot_files(server) == sorted(["slow", "fast"] * SLOTS[place])
    push(run, model, 4)


def test_staging_without_room(local_server: Callable[..., LocalServer], model: Model) -> None:
    """An average with which no push of the run would fit into staging any more is refused."""
    server = local_server()
    run = server.create("r", model(0), averages=(SLOW,))
    run.begin(model(0))
    server.registry.staging._budget.limit = server.registry.staging.needed(run.run.layout)
    with pytest.raises(Overloaded, match="staging"):
        server.registry.add_average("r", LONG)
    push(run, model, 1)


def test_row_that_cannot_be_written(
    place: str, server: LocalServer, run: LocalRun, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the catalog cannot be written neither an addition nor a removal has happened, and no room is taken."""

    def locked(*_: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    before = seen(run)
    for act in CHANGES.values():
        with monkeypatch.context() as patch:
            patch.setattr(Catalog, "set_averages", locked)
            with pytest.raises(StorageFailed, match="locked"):
                act(server)
        assert same(seen(run), before)
        assert slot_files(server) == sorted(["slow", "fast"] * SLOTS[place])
        assert len(memory_files(server)) == (4 if server.ram_dir else 0)
    server.crash()
    run = again(server)
    assert same(seen(run), before)
    push(run, model, 4)


# --- removing -------------------------------------------------------------------------------------------------------


def test_removed_average_is_gone(
    place: str, server: LocalServer, run: LocalRun, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files and its memory are given back at once, the others' weights are as they were, also after a crash and
    after the machine's end."""
    fast = run.bytes()["fast"]
    server.registry.remove_average("r", "slow")
    assert run.bytes() == {"fast": fast}
    assert run.info.version == "1.3"
    assert slot_files(server) == ["fast"] * SLOTS[place]
    gc.collect()
    push(run, model, 4)
    assert len(memory_files(server)) == (2 if server.ram_dir else 0), "the next update is in memory that was given back"
    server.registry.checkpoint()
    assert len(memory_files(server)) == (2 if server.ram_dir else 0)
    before = seen(run)
    server.crash()
    run = again(server)
    assert same(seen(run), before)
    with pytest.raises(AverageNotFound, match="it has fast"):
        run.shadows("slow")
    server.registry.checkpoint()
    for versions in server.registry.unsynced():
        versions.sync()
    run = reboot(server, monkeypatch)
    assert run.bytes() == before["bytes"]
    push(run, model, 5)
    assert history(server)[0] == "average slow removed"


def test_crash_before_the_files_go(
    place: str, server: LocalServer, run: LocalRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that dies once the removal is decided leaves files; the next one gives them back."""
    fast = run.bytes()["fast"]
    with monkeypatch.context() as patch:
        patch.setattr("ema_service.persistence.versions.Versions.give_back", lambda _: None)
        patch.setattr("ema_service.persistence.memory_versions.MemoryVersions.give_back", lambda _: None)
        server.registry.remove_average("r", "slow")
        server.crash()
    assert set(slot_files(server)) == {"fast", "slow"}
    run = again(server)
    assert run.bytes() == {"fast": fast}
    assert slot_files(server) == ["fast"] * SLOTS[place]
    assert len(memory_files(server)) == (2 if server.ram_dir else 0)


def test_reader_reads_on(server: LocalServer, run: LocalRun, model: Model) -> None:
    """Who holds the weights of an average when it is removed has them unchanged for as long as they are held."""
    state = run.state
    held = state.arenas[0]
    server.registry.frozen.hold(held)
    data = bytes(server.registry.frozen.data(held))
    server.registry.remove_average("r", "slow")
    push(run, model, *range(4, 12))
    server.registry.checkpoint()
    assert bytes(server.registry.frozen.data(held)) == data
    server.registry.frozen.release(held)


def test_last_average_stays(server: LocalServer, run: LocalRun, model: Model) -> None:
    """The last average cannot be removed, nor the last that has weights while others wait for theirs."""
    server.registry.remove_average("r", "slow")
    with pytest.raises(LastAverage, match="only average of run 'r'"):
        server.registry.remove_average("r", "fast")
    server.registry.add_average("r", LONG)
    with pytest.raises(LastAverage, match="long begins with the next update"):
        server.registry.remove_average("r", "fast")
    push(run, model, 4)
    server.registry.remove_average("r", "fast")
    assert list(run.bytes()) == ["long"]
    push(run, model, 5)


def test_awaiting_average_is_removed(server: LocalServer, run: LocalRun, model: Model) -> None:
    """An average that never had weights can be removed: the run is as it was."""
    before = seen(run)
    server.registry.add_average("r", LONG)
    server.registry.remove_average("r", "long")
    assert same(seen(run), before)
    server.crash()
    run = again(server)
    assert same(seen(run), before)
    push(run, model, 4)


@pytest.mark.parametrize("restarted", [False, True])
def test_another_average_of_the_name(restarted: bool, server: LocalServer, run: LocalRun, model: Model) -> None:
    """An average that is added under the name of a removed one begins anew: it never has the other's weights."""
    server.snapshot("s")
    server.registry.remove_average("r", "fast")
    server.registry.add_average("r", FAST)
    if restarted:
        server.crash()
        run = again(server)
    assert set(run.bytes()) == {"slow"}
    push(run, model, 4)
    assert all(torch.equal(run.shadows("fast")[name], value) for name, value in of_params(model(4)).items())
    server.registry.rewind("r", "s")

    assert set(run.bytes()) == {"slow"}
    push(run, model, 4)
    assert all(torch.equal(run.shadows("fast")[name], value) for name, value in of_params(model(4)).items())


def test_same_creation_again(server: LocalServer, run: LocalRun) -> None:
    """A trainer that comes again with the configuration of the beginning has the run, whatever its averages are now."""
    server.registry.add_average("r", LONG)
    server.registry.remove_average("r", "slow")
    config = run.run.ledger.setup.created
    assert server.registry.create(config) == (run.run, False)
    server.crash()
    run = again(server)
    assert server.registry.create(config) == (run.run, False)
    assert [average.name for average in run.run.config.averages] == ["fast", "long"]


# --- beside updates, checkpoints and deletions ----------------------------------------------------------------------


@pytest.mark.parametrize("change", ["add", "remove"])
def test_push_under_way_is_superseded(change: str, server: LocalServer, run: LocalRun, model: Model) -> None:
    """An update that was begun before the change is refused whole, and applied when it comes again; its slot and its
    memory are given back."""
    update = run.run.begin(4, run.staged(model(4)))
    update.preparation.advance(100)
    CHANGES[change](server)
    before = seen(run)
    with pytest.raises(Superseded):
        run.run.commit(update)
    del update
    gc.collect()
    assert same(seen(run), before)
    push(run, model, 4, 5, 6, 7)
    expected = {"slow", "fast", "long"} if change == "add" else {"fast"}
    assert set(run.bytes()) == expected
    assert set(slot_files(server)) == expected
    before = seen(run)
    server.crash()
    assert same(seen(again(server)), before)


def test_checkpoint_of_a_state_before_a_removal(server: LocalServer, run: LocalRun) -> None:
    """A checkpoint that was begun before a removal, and waited for it, does not write the removed average again."""
    state = run.state
    server.registry.set_decay("r", 0.25, "fast")
    server.registry.remove_average("r", "slow")
    disk = server.registry._runs["r"].disk
    assert disk
    disk.versions.save(state, final=True)
    assert set(slot_files(server)) == {"fast"}
    server.crash()
    assert set(again(server).bytes()) == {"fast"}


def test_checkpoint_that_comes_too_late(local_server: Callable[..., LocalServer], model: Model) -> None:
    """A checkpoint of an older state, which waited while a later one was taken, does not take its place."""
    server = local_server()
    run = server.create("r", model(0), durability="memory")
    run.begin(model(0))
    old = run.state
    push(run, model, 1)
    server.registry.checkpoint()
    disk = server.registry._runs["r"].disk
    assert disk
    disk.versions.save(old)
    server.crash()
    assert again(server).info.step == 1


@pytest.mark.parametrize("change", ["add", "remove"])
def test_deleted_run(change: str, server: LocalServer, run: LocalRun) -> None:
    """Of a deleted run no average is added or removed, and nothing of it comes back."""
    assert run.info.status == "ready"
    found = server.registry._runs["r"]
    server.registry.delete("r")
    server.registry._runs["r"] = found  # who found the run before it was deleted
    with pytest.raises(RunNotFound):
        CHANGES[change](server)
    del server.registry._runs["r"]
    assert (slot_files(server), memory_files(server)) == ([], [])


def test_deletion_beside_an_addition(server: LocalServer, run: LocalRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion that comes while room is taken waits for it, and gives back that room as well."""
    assert run.info.status == "ready"
    disk = server.registry._runs["r"].disk
    assert disk
    make_room, deleting = disk.versions.make_room, threading.Thread(target=server.registry.delete, args=("r",))

    def deleted_meanwhile(member: Any) -> None:
        make_room(member)
        deleting.start()
        deleting.join(0.2)

    monkeypatch.setattr(disk.versions, "make_room", deleted_meanwhile)
    assert server.registry.add_average("r", LONG)[1]
    deleting.join(30)
    assert (slot_files(server), memory_files(server)) == ([], [])
    with pytest.raises(RunNotFound):
        server.registry.get("r")


def test_before_initial_weights(server: LocalServer, model: Model, place: str) -> None:
    """On a run that awaits its weights an average is as one of those at creation."""
    run = server.create("r", model(0), averages=(SLOW, FAST), durability=PLACES[place][0])
    begun = run.run.begin_first(run.staged(model(0)))
    server.registry.add_average("r", LONG)
    server.registry.remove_average("r", "slow")
    server.crash()
    run = again(server)
    assert (run.info.status, [average.name for average in run.info.averages]) == (
        "awaiting_weights",
        ["fast", "long"],
    )
    del begun
    begun = run.run.begin_first(run.staged(model(0)))
    server.registry.add_average("r", SLOW)
    run.run.initialise(begun)
    assert list(run.bytes()) == ["fast", "long", "slow"]
    push(run, model, 1)
    before = seen(run)
    server.crash()
    assert same(seen(again(server)), before)


def test_degraded_run_stays_as_it_is(server: LocalServer, run: LocalRun) -> None:
    """Nothing is added to a run that is damaged, nor removed: first somebody decides which version it goes on with."""
    run.run.ledger.fault = "damaged"
    before = slot_files(server)
    for act in CHANGES.values():
        with pytest.raises(RunDegraded):
            act(server)
    assert slot_files(server) == before


# --- snapshots and rewinds ------------------------------------------------------------------------------------------


def test_snapshots_and_rewinds(server: LocalServer, run: LocalRun, model: Model) -> None:
    """A snapshot has the averages that have weights. Going back to one that lacks an average begins the average anew;
    an average that the run has no longer stays away."""
    assert server.snapshot("before")[0].averages == ("slow", "fast")
    server.registry.add_average("r", LONG)
    assert server.snapshot("waiting")[0].averages == ("slow", "fast")
    push(run, model, 4, 5)
    assert server.snapshot("after")[0].averages == ("slow", "fast", "long")
    after = run.bytes()
    server.registry.remove_average("r", "slow")
    server.registry.rewind("r", "before")
    assert list(run.bytes()) == ["fast"]
    assert [average.name for average in run.info.averages] == ["fast", "long"]
    push(run, model, 4)
    assert all(torch.equal(run.shadows("long")[name], value) for name, value in of_params(model(4)).items())
    server.registry.rewind("r", "after")
    assert run.bytes() == {"fast": after["fast"], "long": after["long"]}
    assert [average.num_updates for average in run.version.averages] == [5, 1]
    before = seen(run)
    server.crash()
    run = again(server)
    assert same(seen(run), before)

    file, info = server.registry.snapshots("r").open("after", "slow")
    file.close()
    assert (info.average, info.schedule) == ("slow", "litema")


def test_snapshot_without_any_average_of_the_run(server: LocalServer, run: LocalRun, model: Model) -> None:
    """There is no way back to a snapshot that has none of the averages that the run has by now."""
    server.snapshot("before")
    server.registry.add_average("r", LONG)
    push(run, model, 4)
    for name in ("slow", "fast"):
        server.registry.remove_average("r", name)
    before = seen(run)
    with pytest.raises(AverageNotFound, match="slow, fast, which are no averages of run 'r' any more"):
        server.registry.rewind("r", "before")
    assert same(seen(run), before)


def test_removal_beside_a_rewind(
    server: LocalServer, run: LocalRun, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rewind to the weights of an average that is removed meanwhile is refused, and can be asked for again."""
    server.snapshot("s")
    push(run, model, 4)
    rewound = run.run.ledger.rewound

    def removed_meanwhile(*arguments: Any) -> Any:
        version = rewound(*arguments)
        server.registry.remove_average("r", "slow")
        return version

    with monkeypatch.context() as patch:
        patch.setattr(run.run.ledger, "rewound", removed_meanwhile)
        with pytest.raises(Superseded):
            server.registry.rewind("r", "s")
    assert list(run.bytes()) == ["fast"]
    server.registry.rewind("r", "s")
    assert (list(run.bytes()), run.info.step) == (["fast"], 3)


def test_rewind_beside_a_removal(
    server: LocalServer, run: LocalRun, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A removal that was prepared before a rewind is refused: what the medium has may be another set of averages."""
    server.snapshot("s")
    push(run, model, 4)
    disk = server.registry._runs["r"].disk
    assert disk
    settle = disk.versions.settle

    def rewound_meanwhile(state: Any) -> None:
        settle(state)
        monkeypatch.undo()
        server.registry.rewind("r", "s")

    monkeypatch.setattr(disk.versions, "settle", rewound_meanwhile)
    with pytest.raises(Superseded):
        server.registry.remove_average("r", "slow")
    assert (list(run.bytes()), run.info.step) == (["slow", "fast"], 3)


# --- the machine's end ----------------------------------------------------------------------------------------------


def test_machine_ends_before_a_late_average_is_kept(
    place: str, server: LocalServer, run: LocalRun, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes back to a version before the average's first update begins the average anew with the next one."""
    server.registry.checkpoint()
    server.registry.add_average("r", LONG)
    if place == "disk":
        push(run, model, 4)
    run = reboot(server, monkeypatch)
    step = run.info.step or 0
    assert [average.name for average in run.info.averages] == ["slow", "fast", "long"]
    push(run, model, step + 1)
    if place != "disk":
        assert all(torch.equal(run.shadows("long")[n], value) for n, value in of_params(model(step + 1)).items())
    assert run.info.status == "ready"


def test_machine_ends_after_the_old_averages_went(
    server: LocalServer, run: LocalRun, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only averages that the newest checkpoint had are removed, and the machine ends: the run has the others."""
    server.registry.checkpoint()
    for versions in server.registry.unsynced():
        versions.sync()
    server.registry.add_average("r", LONG)
    push(run, model, 4)
    for name in ("slow", "fast"):
        server.registry.remove_average("r", name)
    before = run.bytes()
    run = reboot(server, monkeypatch)
    assert run.bytes() == before
    assert run.info.status == "ready"
    push(run, model, 5)


@pytest.mark.parametrize("place", ["memory files", "slots"], indirect=True)
def test_version_that_cannot_be_brought_to_the_medium(
    server: LocalServer, run: LocalRun, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is removed then: what the machine's end leaves might have no average of the run."""

    def fails(_: SlotFiles) -> None:
        raise OSError(5, "input/output error")

    before = seen(run)
    with monkeypatch.context() as patch:
        patch.setattr(SlotFiles, "sync", fails)
        with pytest.raises(StorageFailed, match="input/output error"):
            server.registry.remove_average("r", "slow")
    assert same(seen(run), before)
    push(run, model, 4)
    server.registry.remove_average("r", "slow")
    assert list(run.bytes()) == ["fast"]


class Chances:
    """Changes of a run's averages at random, and what is known of them: which there are, and all weights they had."""

    def __init__(self, server: LocalServer, run: LocalRun, seed: int) -> None:
        self._server = server
        self._run = run
        self._dice = random.Random(seed)
        self._known: dict[str, set[bytes]] = {}
        self.wanted = {"slow", "fast"}

    def happens(self, share: float) -> bool:
        return self._dice.random() < share

    def change(self) -> None:
        name = self._dice.choice(["slow", "late", "later"])
        if self.happens(0.4) and name not in self.wanted:
            self._server.registry.add_average("r", AverageConfig(name))
            self.wanted.add(name)
        name = self._dice.choice(sorted(self.wanted))
        if self.happens(0.3):
            with contextlib.suppress(LastAverage):
                self._server.registry.remove_average("r", name)
                self.wanted.discard(name)
                self._known.pop(name, None)

    def sync(self) -> None:
        for versions in self._server.registry.unsynced():
            versions.sync()

    def note(self) -> None:
        for name, content in self._run.bytes().items():
            self._known.setdefault(name, set()).add(content)

    def check(self, back: LocalRun) -> None:
        assert (back.info.status, back.info.reason) == ("ready", None)
        assert {each.name for each in back.info.averages} == self.wanted
        assert back.bytes()
        assert all(content in self._known[name] for name, content in back.bytes().items())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("place", ["slots", "disk"], indirect=True)
def test_power_loss_among_changes(
    seed: int,
    server: LocalServer,
    run: LocalRun,
    local_server: Callable[..., LocalServer],
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whenever the power goes between additions, removals and updates: the run is ready, with the averages that were
    decided on last, and weights that they had."""
    assert server.folder is not None
    chances, losing = Chances(server, run, seed), Power(server.folder, monkeypatch)
    chances.note()
    push(run, model, 4)
    chances.note()
    chances.sync()
    for step in range(5, 35):
        chances.change()
        if chances.happens(0.8):
            push(run, model, step)
        if chances.happens(0.4):
            chances.sync()
        chances.note()
        target = tmp_path / f"after-{step}"
        losing.lost(target, seed=step)
        with monkeypatch.context() as patch:
            patch.setattr(rows, "boot_id", lambda: "another")
            after = local_server(folder=target)
        chances.check(after.run("r"))
        push(after.run("r"), model, 99)
        after.end()
        shutil.rmtree(target)


@pytest.mark.parametrize("place", ["memory files"], indirect=True)
def test_release_of_changed_averages(server: LocalServer, run: LocalRun, model: Model) -> None:
    """What `ema-service release` brings to the disk is what the run has by now."""
    server.registry.add_average("r", LONG)
    server.registry.remove_average("r", "slow")
    push(run, model, 4)
    before = run.bytes()
    server.crash()
    assert server.folder is not None
    store = Store(server.folder)
    store.use_memory_files(server.ram_dir)
    assert list(release(store)) == [("r", 4)]
    store.close()
    run = again(server)
    assert run.bytes() == before


# --- keys -----------------------------------------------------------------------------------------------------------


def test_keys_are_kept_with_the_averages(server: LocalServer, run: LocalRun) -> None:
    """A write that comes again with its key changes nothing, after others have undone it, and after a crash."""
    assert server.registry.add_average("r", LONG, "add")[1]
    server.registry.remove_average("r", "long", "remove")
    assert server.registry.add_average("r", LONG, "add") == (run.run, False)
    assert [average.name for average in run.info.averages] == ["slow", "fast"]
    server.crash()
    run = again(server)
    assert server.registry.add_average("r", LONG, "add") == (run.run, False)
    server.registry.remove_average("r", "long", "remove")
    assert [average.name for average in run.info.averages] == ["slow", "fast"]
    assert server.registry.add_average("r", LONG, "another")[1]
    server.registry.remove_average("r", "long", "remove")
    assert [average.name for average in run.info.averages] == ["slow", "fast", "long"]
    with pytest.raises(AverageNotFound):
        server.registry.remove_average("r", "none", "fourth")


def test_decay_of_an_average_without_weights(server: LocalServer, run: LocalRun, model: Model) -> None:
    """It has no decay to change before it begins."""
    server.registry.add_average("r", AverageConfig("late", decay=0.9))
    with pytest.raises(AwaitingWeights, match="'late' of run 'r' has no weights before the next update"):
        server.registry.set_decay("r", 0.5, "late")
    push(run, model, 4)
    assert server.registry.set_decay("r", 0.5, "late").info().averages[2].decay == 0.5
