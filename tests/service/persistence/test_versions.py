"""Runs of durability ``process`` and ``disk``: what a crash, a power loss, a failing disk and damage leave.

Processes that are really killed are in tests/e2e/test_crash.py. Knows data dirs, and registries opened on them again.
Does not know HTTP or processes.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import shutil
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from ema_client.errors import (
    AwaitingWeights,
    RunDegraded,
    RunNotFound,
    StaleStep,
    StorageDisabled,
    StorageFailed,
    Superseded,
)
from ema_client.protocol import AverageConfig
from ema_service.persistence import rows
from ema_service.storage.catalog import Catalog, CatalogUnusable
from ema_service.storage.slot_files import SlotFiles
from tests.service.persistence.power import Power
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.service.conftest import LocalRun, LocalServer

Model = Callable[[int], dict[str, Tensor]]

TWO = (AverageConfig("slow"), AverageConfig("fast", decay=0.5))
DURABILITIES = ["process", "disk"]


@pytest.fixture
def server(local_server: Callable[..., LocalServer]) -> LocalServer:
    return local_server()


@pytest.fixture
def begun(server: LocalServer, model: Model) -> Callable[..., LocalRun]:
    """Make the run ``r`` with two averages and push ``steps`` to it."""

    def make(durability: str | None, steps: Iterator[int] | range = range(10, 40, 10)) -> LocalRun:
        run = server.create("r", model(0), averages=TWO, durability=durability)
        run.begin(model(0))
        for step in steps:
            run.push(step, model(step))
        return run

    return make


def again(server: LocalServer) -> LocalRun:
    """The run after a new start."""
    server.start()
    return server.run("r")


def seen(run: LocalRun) -> dict[str, Any]:
    """Everything of a run that must come back: its bytes, counters, version, ETag, and what it knows of steps."""
    return {
        "averages": {each.name: (each, run.bytes()[each.name]) for each in run.version.averages},
        "bytes": run.bytes(),
        "version": run.version,
        "etag": run.etag,
        "status": run.info.status,
    }


def newest_slot(server: LocalServer) -> Path:
    """The folder of what a restart brings back."""
    assert server.folder is not None
    with closing(sqlite3.connect(server.folder / "catalog.db")) as catalog:
        [(folder,)] = catalog.execute("SELECT folder FROM checkpoints ORDER BY id DESC LIMIT 1").fetchall()
    [run_folder] = (server.folder / "runs").iterdir()
    return run_folder / str(folder)


def damage(path: Path, position: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# --- a crash of the process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", DURABILITIES)
def test_crash_loses_nothing(
    durability: str, server: LocalServer, begun: Callable[..., LocalRun], model: Model
) -> None:
    """After a crash at any number of updates everything is as it was, same version and ETag, no epoch is spent."""
    run = begun(durability, range(0))
    for step in (*range(10, 60, 10), None):
        before = seen(run)
        assert run.info.durable_step == run.info.step
        server.crash()
        run = again(server)
        assert seen(run) == before
        if step is not None:
            assert run.push(step, model(step)).durable_step == step

    assert not run.push(50, model(50)).applied
    assert {run.run.ledger.status_of(step).state for step in (40, 50)} == {"applied"}
    with pytest.raises(StaleStep):
        run.push(40, model(40))


@pytest.mark.parametrize("durability", DURABILITIES)
def test_changes_without_tensors_survive(
    durability: str, server: LocalServer, begun: Callable[..., LocalRun], model: Model
) -> None:
    """A changed decay and a counter that was reset come back from a crash, before and after a sync."""
    run = begun(durability)
    changes: list[Callable[[LocalRun], object]] = [
        lambda _: server.registry.set_decay("r", 0.25, "fast"),
        lambda _: [versions.sync() for versions in server.registry.unsynced()],
        lambda run: run.set_decay(0.75),
        lambda run: run.reset_num_updates(),
    ]
    for change in changes:
        change(run)
        before = seen(run)
        server.crash()
        run = again(server)
        assert seen(run) == before
    assert run.info.num_updates == 0
    assert run.push(40, model(40)).num_updates == 1


def test_process_is_the_default(server: LocalServer, model: Model, local_server: Callable[..., LocalServer]) -> None:
    """Left out, durability is process with a data dir, memory without; a disk that is not there is refused."""
    run = server.create("r", model(0))
    assert run.info.durability == "process"
    assert server.create("r", model(0)).run is run.run
    assert server.create("r", model(0), durability="process").run is run.run
    other = server.create("other", model(0), durability="disk")
    assert server.create("other", model(0)).run is other.run

    memory = local_server(memory=True)
    assert memory.create("r", model(0)).info.durability == "memory"
    for durability in DURABILITIES:
        with pytest.raises(StorageDisabled, match=durability):
            memory.create("x", model(0), durability=durability)
    assert [run.config.run for run in memory.registry.runs()] == ["r"]


@pytest.mark.parametrize("durability", DURABILITIES)
def test_slots_are_few_and_reused(
    durability: str, server: LocalServer, begun: Callable[..., LocalRun], model: Model
) -> None:
    """However many updates: two slots for disk, three for process, whose newest is a file the library opens."""
    run = begun(durability, range(1, 30))
    for versions in server.registry.unsynced():
        versions.sync()
    for step in range(30, 60):
        run.push(step, model(step))
    loaded = load_file(newest_slot(server) / "fast.safetensors")

    assert len(list(newest_slot(server).parent.iterdir())) == {"disk": 2, "process": 3}[durability]
    assert all(torch.equal(loaded[name], value) for name, value in run.shadows("fast").items())


@pytest.mark.parametrize("durability", DURABILITIES)
def test_push_that_breaks_off_gives_its_slot_back(
    durability: str, server: LocalServer, begun: Callable[..., LocalRun], model: Model
) -> None:
    """Pushes that are dropped half way, lose a race or hold a NaN leave what counts alone, and no slot behind."""
    run = begun(durability)
    before = seen(run)
    for step in range(40, 50):
        update = run.run.begin(step, run.staged(model(step)))
        update.preparation.advance(100)
        del update
    assert run.info.status == "ready"
    assert len(list(newest_slot(server).parent.iterdir())) == {"disk": 2, "process": 3}[durability]
    server.crash()

    assert seen(again(server)) == before


def test_rewind_waits_for_a_sync_under_way(
    server: LocalServer, begun: Callable[..., LocalRun], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rewind is answered once it outlives the machine, also where an older version is being synced when it comes."""
    run = begun("process")
    server.snapshot("s")
    run.push(40, model(40))
    began, goes_on, sync = threading.Event(), threading.Event(), SlotFiles.sync

    def slow(files: SlotFiles) -> None:
        began.set()
        goes_on.wait(30)
        sync(files)

    monkeypatch.setattr(SlotFiles, "sync", slow)
    [versions] = server.registry.unsynced()
    behind = threading.Thread(target=versions.sync)
    behind.start()
    began.wait(30)
    rewinding = threading.Thread(target=server.registry.rewind, args=("r", "s"))
    rewinding.start()
    wait_until(lambda: run.info.version == "2.0")
    rewinding.join(0.1)
    waited = rewinding.is_alive()
    goes_on.set()
    rewinding.join(30)
    behind.join(30)

    assert waited
    assert (run.info.checkpoint_step, server.registry.unsynced()) == (30, [])


def test_rewind_that_cannot_be_synced_is_told(
    server: LocalServer, begun: Callable[..., LocalRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rewind whose version does not reach the medium is no rewind that outlives a crash."""
    begun("process")
    server.snapshot("s")

    def fails(_: SlotFiles) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(SlotFiles, "sync", fails)
    with pytest.raises(StorageFailed, match="input/output error"):
        server.registry.rewind("r", "s")


def test_racing_writers_have_a_slot_each(server: LocalServer, begun: Callable[..., LocalRun], model: Model) -> None:
    """Pushes under way at once write to slots of their own; the one that wins is what comes back."""
    run = begun("process")
    updates = [run.run.begin(step, run.staged(model(step))) for step in (40, 41, 42)]
    for update in updates:
        update.preparation.advance(run.run.layout.param_bytes)
    run.run.commit(updates[1])
    for update in (updates[0], updates[2]):
        with pytest.raises((StaleStep, Superseded)):
            run.run.commit(update)
    before = seen(run)
    server.crash()

    assert seen(again(server)) == before
    assert server.run("r").info.step == 41


@pytest.mark.parametrize("durability", ["memory", *DURABILITIES])
def test_keeping_a_run_keeps_no_memory(
    durability: str, server: LocalServer, begun: Callable[..., LocalRun], model: Model
) -> None:
    """What is on disk holds no version in memory: a superseded one, and those of a deleted run, are free at once."""
    run = begun(durability)
    server.registry.checkpoint()
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


# --- a failing disk -------------------------------------------------------------------------------------------------


def _full(*_: object, **__: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def _no_row(*_: object, **__: object) -> None:
    raise sqlite3.OperationalError("database or disk is full")


def _eio(*_: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


FAILURES = {
    "bytes": (os, "pwrite", _full),
    "row": (Catalog, "put_checkpoint", _no_row),
    "sync": (os, "fdatasync", _eio),
}


@pytest.mark.parametrize(
    ("durability", "where"),
    [("process", "bytes"), ("process", "row"), ("disk", "bytes"), ("disk", "row"), ("disk", "sync")],
)
def test_failed_write_refuses_the_push(
    durability: str,
    where: str,
    server: LocalServer,
    begun: Callable[..., LocalRun],
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A push that cannot be written is refused for now and changes nothing; the next that can makes all well again."""
    run = begun(durability)
    before = seen(run)
    with monkeypatch.context() as patch:
        patch.setattr(*FAILURES[where])
        for _ in range(3):
            with pytest.raises(StorageFailed) as refusal:
                run.push(40, model(40))
            assert (refusal.value.retryable, refusal.value.retry_after) == (True, 1.0)
            assert (run.info.status, run.info.durable_step) == ("degraded", 30)
            assert "version 1.4" in (run.info.reason or "")
    assert seen(run) == {**before, "status": "degraded"}
    assert run.push(40, model(40)).applied
    assert (run.info.status, run.info.reason) == ("ready", None)
    before = seen(run)
    server.crash()

    assert seen(again(server)) == before


def test_failed_write_refuses_the_initial_weights(
    server: LocalServer, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Initial weights that cannot be written are refused, and can be given again."""
    run = server.create("r", model(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _full)
        with pytest.raises(StorageFailed):
            run.begin(model(0))
    with pytest.raises(AwaitingWeights):
        _ = run.state
    run.begin(model(0))
    before = seen(run)
    server.crash()

    assert seen(again(server)) == before


def test_failed_change_is_not_made(begun: Callable[..., LocalRun], monkeypatch: pytest.MonkeyPatch) -> None:
    """A decay that cannot be kept stays as it was."""
    run = begun("process")
    before = seen(run)
    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "amend_checkpoint", _no_row)
        with pytest.raises(StorageFailed):
            run.set_decay(0.5)
    assert seen(run) == {**before, "status": "degraded"}
    run.set_decay(0.5)

    assert run.info.decay == 0.5


def test_slot_of_a_doubtful_row_is_left_alone(
    server: LocalServer, begun: Callable[..., LocalRun], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that was refused may yet come up after a crash: until another is committed nobody writes to its slot."""
    run = begun("disk")
    put = Catalog.put_checkpoint

    def committed_and_refused(catalog: Catalog, *values: Any, **flags: bool) -> None:
        put(catalog, *values, **flags)
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "put_checkpoint", committed_and_refused)
        with pytest.raises(StorageFailed):
            run.push(40, model(40))
    update = run.run.begin(41, run.staged(model(41)))
    update.preparation.advance(run.run.layout.param_bytes)
    server.crash()
    run = again(server)

    assert (run.info.status, run.info.step) == ("ready", 40)
    assert not run.push(40, model(40)).applied


def test_full_disk_at_creation(server: LocalServer, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that there is no room for is not created, and nothing of it is left."""
    assert server.folder is not None
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", _full)
        with pytest.raises(StorageFailed, match=r"'r' was not created.*No space left"):
            server.create("r", model(0))
    assert server.registry.runs() == []
    assert list((server.folder / "runs").iterdir()) == []

    server.create("r", model(0)).begin(model(0))


def test_failed_sync_is_told_and_never_believed(
    server: LocalServer, begun: Callable[..., LocalRun], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version whose sync failed is not asked for again: the kernel would say yes. The next version makes it good."""
    run = begun("process")
    [versions] = server.registry.unsynced()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", _eio)
        versions.sync()
    assert (run.info.status, "could not be synced" in (run.info.reason or "")) == ("degraded", True)
    assert server.registry.unsynced() == []
    versions.sync()
    assert run.info.status == "degraded"
    run.push(40, model(40))
    assert server.registry.unsynced() == [versions]
    versions.sync()

    assert (run.info.status, server.registry.unsynced()) == ("ready", [])


def test_clean_stop_after_a_failed_sync(
    server: LocalServer, begun: Callable[..., LocalRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end a version that could not be synced is written again, elsewhere."""
    run = begun("process")
    before = seen(run)
    slot = newest_slot(server)
    [versions] = server.registry.unsynced()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", _eio)
        versions.sync()
    server.stop()

    assert newest_slot(server) != slot
    assert seen(again(server)) == before


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("average", ["slow", "fast"])
def test_damage_is_told_and_the_version_before_is_there(
    durability: str, average: str, server: LocalServer, begun: Callable[..., LocalRun], model: Model
) -> None:
    """One flipped bit: the run comes up degraded at the version before, readable, naming the steps that are gone."""
    run = begun(durability)
    before = seen(run)
    run.push(40, model(40))
    server.crash()
    damage(newest_slot(server) / f"{average}.safetensors")
    run = again(server)

    info = run.info
    assert (info.status, info.step, info.version, info.durable_step) == ("degraded", 30, "2.3", 30)
    assert "the updates after step 30 up to step 40 are gone" in (info.reason or "")
    assert seen(run)["averages"] == before["averages"]
    for act in (lambda: run.push(50, model(50)), lambda: run.set_decay(0.5), run.reset_num_updates):
        with pytest.raises(RunDegraded, match="after step 30 up to step 40"):
            act()
    assert server.snapshot("rest")[0].step == 30
    server.crash()
    run = again(server)
    lines = server.registry.timeline(run.info.run).lines(0.0, 99)
    told = [(line.step, line.text) for line in lines if line.kind == "damaged"]
    assert told[-1] == (30, info.reason)
    assert len(set(told)) == len(told), "a server that is started again finds the same damage"


def test_repaired_file_brings_everything_back(
    server: LocalServer, begun: Callable[..., LocalRun], model: Model
) -> None:
    """A damaged run is left as it is, clean stops included: with the file put back it is what it was."""
    run = begun("process")
    before = seen(run)
    server.crash()
    path = newest_slot(server) / "slow.safetensors"
    whole = path.read_bytes()
    damage(path)
    for _ in range(2):
        assert again(server).info.version == "2.2"
        server.stop()
    path.write_bytes(whole)

    run = again(server)
    assert seen(run) == before
    assert run.push(40, model(40)).version == "1.4"


def test_everything_damaged(server: LocalServer, begun: Callable[..., LocalRun], model: Model) -> None:
    """With no version left the run is degraded and unreadable; it can be deleted."""
    begun("disk")
    server.crash()
    for path in newest_slot(server).parent.glob("*/slow.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    run = again(server)

    assert (run.info.status, run.info.version) == ("degraded", None)
    with pytest.raises(RunDegraded):
        _ = run.state
    server.registry.delete("r")
    server.create("r", model(0)).begin(model(0))


def test_damaged_row(server: LocalServer, begun: Callable[..., LocalRun]) -> None:
    """A row whose text is damaged is damage as any other: the version before it comes up, degraded."""
    begun("disk")
    server.crash()
    assert server.folder is not None
    with closing(sqlite3.connect(server.folder / "catalog.db")) as catalog, catalog:
        catalog.execute("UPDATE checkpoints SET state = replace(state, '\"step\"', '\"stfp\"') WHERE id = 4")
    run = again(server)

    assert (run.info.status, run.info.step, run.info.version) == ("degraded", 20, "2.2")
    assert "the updates after step 20 are gone" in (run.info.reason or "")


@pytest.mark.parametrize("seed", range(12))
def test_damaged_catalog(seed: int, server: LocalServer, begun: Callable[..., LocalRun]) -> None:
    """A flipped bit anywhere in the catalog: the server does not start and says so, or what it brings back is whole."""
    run = begun("disk")
    version = {run.info.version: seen(run)}
    server.stop()
    assert server.folder is not None
    path = server.folder / "catalog.db"
    damage(path, random.Random(seed).randrange(path.stat().st_size))
    try:
        run = again(server)
    except (CatalogUnusable, sqlite3.Error, RunNotFound):
        return
    if run.info.status == "ready" and run.info.version in version:
        back, before = seen(run), version[run.info.version]
        assert back["bytes"] == before["bytes"]


def test_clock_may_jump(server: LocalServer, begun: Callable[..., LocalRun], monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that runs backwards does not change which version is the newest."""
    clock = iter(range(10**9, 0, -(10**6)))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    before = seen(begun("process", range(1, 9)))
    server.crash()

    assert seen(again(server)) == before


def test_restarted_run_is_not_final(server: LocalServer, begun: Callable[..., LocalRun]) -> None:
    """After a clean stop and a start, a power loss may take what follows: the row says so before anything does."""
    begun("process")
    server.stop()
    finals = []
    for start in (lambda: None, server.start):
        start()
        assert server.folder is not None
        with closing(sqlite3.connect(server.folder / "catalog.db")) as catalog:
            [(state,)] = catalog.execute("SELECT state FROM checkpoints ORDER BY id DESC LIMIT 1").fetchall()
        finals.append(json.loads(state)["final"])

    assert finals == [True, False]


# --- an older data dir ----------------------------------------------------------------------------------------------


def test_checkpoint_without_checksums(server: LocalServer, model: Model) -> None:
    """A checkpoint of format 1 (another folder, header unpadded, no checksums) comes up, and its folder is a slot."""
    run = server.create("r", model(0), averages=TWO, durability="memory")
    run.begin(model(0))
    run.push(10, model(10))
    before = seen(run)
    server.stop()
    slot = newest_slot(server)
    old = slot.parents[1] / "checkpoint-b"
    slot.rename(old)
    (slot.parents[1] / "checkpoint-a").mkdir()
    assert server.folder is not None
    with closing(sqlite3.connect(server.folder / "catalog.db")) as catalog, catalog:
        [(text,)] = catalog.execute("SELECT state FROM checkpoints").fetchall()
        state = json.loads(text)
        del state["boot"]
        for each in state["averages"]:
            del each["checksum"]
        catalog.execute("UPDATE checkpoints SET folder = 'checkpoint-b', state = ?", (json.dumps(state),))
    run = again(server)

    assert seen(run) == before
    assert not (slot.parents[1] / "checkpoint-a").exists()
    for step in (20, 30, 40):
        run.push(step, model(step))
        server.registry.checkpoint()
    before = seen(run)
    server.stop()
    assert seen(again(server)) == before


@pytest.mark.parametrize("damaged", [False, True])
def test_checksums_of_all_bytes_as_one(damaged: bool, server: LocalServer, model: Model) -> None:
    """Before format 4 files had those: they are compared all the same, and what was right then is right now."""
    run = server.create("r", model(0), averages=TWO, durability="process")
    run.begin(model(0))
    run.push(10, model(10))
    server.snapshot("s")
    before = seen(run)
    server.stop()
    slot = newest_slot(server)
    data = {path.stem: path.read_bytes()[-run.run.layout.shadow_bytes :] for path in slot.glob("*.safetensors")}
    flat = {average: xxhash.xxh3_128_hexdigest(each) for average, each in data.items()}
    assert server.folder is not None
    with closing(sqlite3.connect(server.folder / "catalog.db")) as catalog, catalog:
        for row, text in catalog.execute("SELECT id, state FROM checkpoints").fetchall():
            state = json.loads(text)
            for each in state["averages"]:
                each["checksum"] = flat[each["name"]]
            catalog.execute("UPDATE checkpoints SET state = ? WHERE id = ?", (json.dumps(state), row))
        [(text,)] = catalog.execute("SELECT info FROM snapshots").fetchall()
        catalog.execute("UPDATE snapshots SET info = ?", (json.dumps({**json.loads(text), "checksums": flat}),))
    if damaged:
        path = next(slot.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    run = again(server)

    if damaged:
        assert run.info.status == "degraded"
    else:
        assert seen(run) == before
        run.push(20, model(20))
    server.registry.rewind("r", "s")
    assert seen(run)["bytes"] == before["bytes"]


# --- power loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", DURABILITIES)
def test_power_loss(
    durability: str,
    begun: Callable[..., LocalRun],
    server: LocalServer,
    local_server: Callable[..., LocalServer],
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whenever the power goes: disk has every acknowledged update, process the latest synced version or a later one.

    Bit for bit, never degraded, and a version name is never used for other bytes than it had.
    """
    assert server.folder is not None
    power = Power(server.folder, monkeypatch)
    run = begun(durability, range(0))
    named, synced = {}, None
    dice = random.Random(durability)
    for step in range(1, 25):
        run.push(step, model(step))
        named[run.info.version] = seen(run)
        if dice.random() < 0.3:
            for versions in server.registry.unsynced():
                versions.sync()
        if not server.registry.unsynced():
            synced = step
        half = run.run.begin(step + 1, run.staged(model(99)))
        half.preparation.advance(run.run.layout.param_bytes if dice.random() < 0.5 else 300)
        for seed in range(3):
            target = tmp_path / f"after-{step}-{seed}"
            power.lost(target, seed=step * 10 + seed)
            with monkeypatch.context() as patch:
                patch.setattr(rows, "boot_id", lambda: "another")
                _check(local_server(folder=target), durability, named, synced, step)
            shutil.rmtree(target)


def _check(
    after: LocalServer, durability: str, named: dict[str | None, dict[str, Any]], synced: int | None, step: int
) -> None:
    back = after.run("r")
    info = back.info
    if durability == "disk":
        assert seen(back) == named[f"1.{step}"]
    elif info.status == "awaiting_weights":
        assert synced is None
    else:
        assert (info.status, info.version) == ("ready", f"2.{info.step or 0}")
        assert (synced or 0) <= (info.step or 0) <= step
        if info.step:
            before = named[f"1.{info.step}"]
            assert seen(back)["averages"] == before["averages"]
    after.end()


def test_machine_that_went_down_cleanly(
    server: LocalServer, begun: Callable[..., LocalRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a clean stop the machine may start anew: nothing can be missing, so no epoch is spent."""
    before = seen(begun("process"))
    server.stop()
    monkeypatch.setattr(rows, "boot_id", lambda: "another")

    assert seen(again(server)) == before


def test_machine_whose_starts_cannot_be_told_apart(
    server: LocalServer, begun: Callable[..., LocalRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system does not say whether it went down, every unclean end spends an epoch, to be safe."""
    monkeypatch.setattr(rows, "boot_id", lambda: None)
    begun("process")
    server.crash()

    assert again(server).info.version == "2.3"
