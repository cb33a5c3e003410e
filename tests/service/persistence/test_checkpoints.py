"""Runs of durability ``memory``: checkpoints taken now and then, and what a stop, a crash and damage leave.

Knows data dirs, and registries opened on them again. Does not know HTTP or processes.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ema_client.errors import (
    RunDegraded,
    RunNotFound,
    StorageFailed,
)
from ema_client.protocol import AverageConfig, Durability, WeightsInfo
from ema_service.persistence import Versions
from ema_service.storage import Slot
from ema_service.storage.slot_files import SlotFiles
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


def seen(run: LocalRun) -> dict[str, bytes]:
    """The bytes of each average."""
    return run.bytes()


# --- restart --------------------------------------------------------------------------------------------------------


def test_clean_restart(server: LocalServer, run: LocalRun, model: Model) -> None:
    """After a clean stop everything is as it was, same version; the step is durable and exactly once still holds."""
    run.set_decay(0.75, "fast")
    before, info, tag = seen(run), run.info, run.etag
    server.stop()
    run = again(server)

    assert seen(run) == before
    assert run.etag == tag
    assert (run.info.version, run.info.step, run.info.durable_step) == (info.version, 30, 30)
    assert run.info.averages == info.averages
    assert (run.info.num_updates, run.info.updated_at, run.info.created_at) == (3, info.updated_at, info.created_at)
    assert not run.push(30, model(30)).applied
    assert run.run.ledger.status_of(30).state == "applied"
    assert run.push(40, model(40)).version == "1.4"


def test_copied_tensors_restart(server: LocalServer, model: Model) -> None:
    """What is copied goes on being copied, also after a rewind; what a snapshot holds of it comes back."""
    run = server.create("r", model(0), copied=("emb",))
    run.begin(model(0))
    run.push(1, model(1))
    server.snapshot("s")
    run.push(2, model(2))
    server.stop()
    run = again(server)

    assert run.info.copied == 1
    assert torch.equal(run.shadows()["emb"], model(2)["emb"].float())
    server.registry.rewind("r", "s")
    assert torch.equal(run.shadows()["emb"], model(1)["emb"].float())
    run.push(2, model(3))
    assert torch.equal(run.shadows()["emb"], model(3)["emb"].float())


def test_row_that_knows_of_no_copied_tensors(server: LocalServer, run: LocalRun, model: Model) -> None:
    """A run of a version that averaged everything goes on so."""
    server.stop()
    assert server.folder is not None
    with closing(sqlite3.connect(server.folder / "catalog.db")) as db, db:
        db.execute("UPDATE runs SET config = json_remove(config, '$.copied')")
    run = again(server)

    assert run.info.copied == 0
    run.push(40, model(40))
    assert not torch.equal(run.shadows()["conv.weight"], model(40)["conv.weight"])


def test_run_without_weights_restarts(server: LocalServer, model: Model) -> None:
    """A run that awaits its weights comes back awaiting them."""
    server.create("r", model(0), decay=0.5)
    server.stop()

    assert (again(server).info.status, server.run("r").info.decay) == ("awaiting_weights", 0.5)


def test_run_without_updates_restarts(server: LocalServer, model: Model) -> None:
    """A run with initial weights only comes back with them, and the same initial weights again change nothing."""
    run = server.create("r", model(0), durability="memory")
    run.begin(model(0), num_updates=5, step=100)
    before = seen(run)
    server.stop()
    run = again(server)
    run.begin(model(0), num_updates=5, step=100)

    assert seen(run) == before
    assert (run.info.version, run.info.num_updates, run.info.step, run.info.durable_step) == ("1.0", 5, 100, 100)


def test_crash_brings_back_the_checkpoint(server: LocalServer, run: LocalRun, model: Model) -> None:
    """After a crash the run stands where its last checkpoint was taken, in a new epoch; durable_step had said so."""
    server.registry.checkpoint()
    before, tag = seen(run), run.etag
    assert run.info.durable_step == 30
    assert run.push(40, model(40)).durable_step == 30
    server.crash()
    run = again(server)

    assert (run.info.step, run.info.version, run.info.durable_step) == (30, "2.3", 30)
    assert seen(run) == before
    assert run.etag != tag, "the version is another: its ETag is too"


def test_each_crash_is_a_new_epoch(server: LocalServer, run: LocalRun, model: Model) -> None:
    """The epoch grows at each unclean stop and at no clean one, with or without updates in between."""
    server.stop()
    versions = []
    for stop in (server.crash, server.crash, server.stop, server.stop, server.crash):
        run = again(server)
        versions.append(run.info.version)
        stop()
    run = again(server)
    run.push(40, model(40))
    server.crash()
    versions.append(again(server).info.version)

    assert versions == ["1.3", "2.3", "3.3", "3.3", "3.3", "5.3"]


def test_crash_before_any_checkpoint(server: LocalServer, run: LocalRun, model: Model) -> None:
    """A run that was never kept comes back awaiting weights, and what a reader saw before has no ETag in common."""
    tags = {run.etag}
    assert run.info.durable_step is None
    server.crash()
    run = again(server)
    assert run.info.status == "awaiting_weights"
    run.begin(model(99))
    for step in (10, 20, 30):
        run.push(step, model(step))

    assert run.etag not in tags


def test_deleted_and_created_again(server: LocalServer, run: LocalRun, model: Model) -> None:
    """A run deleted and created anew under its name shares no ETag with the old one: its bytes are others."""
    old = run.etag
    server.registry.delete("r")
    run = server.create("r", model(0), averages=TWO, durability="memory")
    run.begin(model(99))
    for step in (10, 20, 30):
        run.push(step, model(step))

    assert run.etag != old


def test_checkpoint_only_of_what_moved(server: LocalServer, run: LocalRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that did not move since its checkpoint is not written again, not at the end either."""
    server.registry.checkpoint()
    written: list[str] = []
    write = Slot.write

    def note(slot: Slot, average: str, data: memoryview, upto: int) -> None:
        written.append(average)
        write(slot, average, data, upto)

    monkeypatch.setattr(Slot, "write", note)
    server.registry.checkpoint()
    assert written == []
    run.set_decay(0.5)
    server.registry.checkpoint()
    assert sorted(written) == ["fast", "slow"]
    server.stop()
    assert len(written) == 2


def test_rewinding_that_would_not_last_says_so(
    server: LocalServer, run: LocalRun, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of durability memory is rewound for good or the trainer is told; asking again is all it takes."""
    server.snapshot("there")
    at_snapshot = seen(run)
    run.push(40, model(40))

    def full(_: int, __: memoryview, ___: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StorageFailed, match="No space left") as refusal:
            server.registry.rewind("r", "there")
    assert refusal.value.retryable
    server.registry.rewind("r", "there")
    server.crash()

    run = again(server)
    assert run.info.step == 30
    assert seen(run) == at_snapshot


def test_failed_checkpoint_leaves_the_one_before(
    server: LocalServer, run: LocalRun, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk costs a checkpoint, never the one before; durable_step stays true and the next one catches up."""
    server.registry.checkpoint()
    before = seen(run)
    run.push(40, model(40))

    def full(_: int, __: memoryview, ___: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        server.registry.checkpoint()
    assert run.info.durable_step == 30
    assert (run.info.status, "No space left" in (run.info.reason or "")) == ("degraded", True)
    server.crash()
    run = again(server)
    assert seen(run) == before
    run.push(41, model(41))
    server.registry.checkpoint()
    assert run.info.durable_step == 41


def test_checkpoint_does_not_need_frozen_budget(local_server: Callable[..., LocalServer], model: Model) -> None:
    """However small the readers' budget, a run with several averages is kept at a clean stop."""
    server = local_server(frozen_bytes=1)
    run = server.create("r", model(0), averages=TWO, durability="memory")
    run.begin(model(0))
    run.push(1, model(1))
    before = seen(run)
    server.stop()

    assert again(server).info.status == "ready"
    assert seen(server.run("r")) == before


def test_reader_does_not_keep_a_run_from_disk(local_server: Callable[..., LocalServer], model: Model) -> None:
    """Readers that use up their budget do not keep a checkpoint from being written."""
    server = local_server(frozen_bytes=1)
    run = server.create("r", model(0), durability="memory")
    run.begin(model(0))
    server.registry.frozen.acquire(run.state.arenas[0])
    run.push(1, model(1))
    server.registry.checkpoint()

    assert run.info.durable_step == 1


def test_updates_go_on_while_a_checkpoint_is_written(
    server: LocalServer, run: LocalRun, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is of one version although updates pass while its files are written, and no update waits for it."""
    before = seen(run)
    writing, go_on = threading.Event(), threading.Event()
    write = Slot.write

    def slowly(slot: Slot, average: str, data: memoryview, upto: int) -> None:
        writing.set()
        assert go_on.wait(30)
        write(slot, average, data, upto)

    monkeypatch.setattr(Slot, "write", slowly)
    keeping = threading.Thread(target=server.registry.checkpoint)
    keeping.start()
    assert writing.wait(30)
    for step in range(31, 60):
        run.push(step, model(step))
    go_on.set()
    keeping.join(30)
    assert run.info.durable_step == 30
    server.crash()

    assert seen(again(server)) == before


@pytest.mark.parametrize("durability", ["memory", "process"])
def test_large_checkpoint_leaves_cores_to_updates(
    local_server: Callable[..., LocalServer], ram_dir: Path, durability: Durability, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for a checkpoint: one thread writes it, past the page cache, which copies nothing."""
    threads, ways = set[int](), list[bool]()
    write = SlotFiles.write

    def note(files: SlotFiles, average: str, data: memoryview, start: int, *, cached: bool) -> None:
        threads.add(threading.get_ident())
        ways.append(cached)
        write(files, average, data, start, cached=cached)

    server = local_server(ram_dir=ram_dir)
    large = {"w": torch.zeros(12 << 20)}
    run = server.create("r", large, durability=durability)
    run.begin(large)
    run.push(1, large)
    monkeypatch.setattr(SlotFiles, "write", note)
    server.registry.checkpoint()

    assert run.info.checkpoint_step == 1
    assert threads == {threading.get_ident()}
    assert set(ways) == {False}


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("average", ["slow", "fast"])
def test_damaged_checkpoint_degrades_the_run(
    damage: str, average: str, server: LocalServer, run: LocalRun, model: Model
) -> None:
    """A damaged checkpoint makes that run degraded, saying why; it refuses work, and its files are left for a human."""
    other = server.create("other", model(0))
    other.begin(model(0))
    server.stop()
    [path] = server.data_files(f"r.*/slots/*/{average}.safetensors")
    DAMAGE[damage](path)
    left = {each: each.read_bytes() for each in server.data_files("r.*/slots/*/*")}
    run = again(server)

    assert run.info.status == "degraded"
    for act in (lambda: run.push(40, model(40)), lambda: run.begin(model(0)), lambda: run.state):
        with pytest.raises(RunDegraded, match="checkpoint"):
            act()
    assert run.info.durable_step is None
    assert server.run("other").info.status == "ready"
    server.stop()
    assert {each: each.read_bytes() for each in server.data_files("r.*/slots/*/*")} == left


def test_repaired_run_comes_back(server: LocalServer, run: LocalRun) -> None:
    """A degraded run whose file is put back is what it was after the next start."""
    before = seen(run)
    server.stop()
    [path] = server.data_files("r.*/slots/*/slow.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert again(server).info.status == "degraded"
    server.stop()
    path.write_bytes(whole)

    assert seen(again(server)) == before


@pytest.mark.usefixtures("run")
def test_degraded_run_can_be_deleted(server: LocalServer, model: Model) -> None:
    """A degraded run can be deleted and created anew."""
    server.stop()
    server.data_files("r.*/slots/*/slow.safetensors")[0].unlink()
    again(server)
    server.registry.delete("r")

    assert server.data_files("r.*") == []
    assert server.create("r", model(0)).info.status == "awaiting_weights"


# --- files ----------------------------------------------------------------------------------------------------------


def test_checkpoint_is_plain_safetensors(server: LocalServer, run: LocalRun) -> None:
    """A checkpoint's files open in the safetensors library, with the shadows' bytes and what they are of."""
    shadows = {name: run.shadows(name) for name in ("slow", "fast")}
    server.registry.checkpoint()
    for name, expected in shadows.items():
        [path] = server.data_files(f"r.*/slots/*/{name}.safetensors")
        loaded = load_file(path)
        assert all(torch.equal(loaded[each], value) for each, value in expected.items())
        with safe_open(path, "pt") as file:
            info = WeightsInfo.from_metadata(file.metadata())
        assert (info.run, info.average, info.version, info.step) == ("r", name, "1.3", 30)


def test_checkpoints_take_turns_in_two_slots(server: LocalServer, run: LocalRun, model: Model) -> None:
    """However many checkpoints are taken, two slots are enough; the one that counts is never written to."""
    seen = []
    for step in range(40, 46):
        before = {path: path.read_bytes() for path in server.data_files("r.*/slots/*/*")}
        run.push(step, model(step))
        server.registry.checkpoint()
        seen.append(
            {path.parent.name for path in server.data_files("r.*/slots/*/*") if before.get(path) != path.read_bytes()}
        )

    assert [len(each) for each in seen] == [1] * 6
    assert len(set.union(*seen)) == 2
    assert all(one != other for one, other in pairwise(seen))


@pytest.mark.usefixtures("run")
def test_deletion_removes_the_files(server: LocalServer) -> None:
    """Deleting a run removes its folder, and after a restart it is still gone."""
    server.snapshot("s")
    server.registry.checkpoint()
    server.registry.delete("r")
    assert server.data_files("r.*") == []
    server.stop()
    server.start()

    with pytest.raises(RunNotFound):
        server.run("r")


def test_deleted_run_is_not_kept_by_a_late_checkpoint(server: LocalServer, run: LocalRun) -> None:
    """A checkpoint that comes after the deletion writes nothing."""
    assert server.store is not None
    [row] = server.store.runs()
    versions = Versions(run.run.config, row, server.store, run.run.layout, server.memory)
    state = run.state
    server.registry.delete("r")
    with versions.closing():
        pass
    versions.save(state, final=True)

    assert server.data_files("r.*") == []


@pytest.mark.usefixtures("run")
def test_stored_state_is_json(server: LocalServer) -> None:
    """What the catalog says of a checkpoint is JSON that names the state, for whoever has to repair it."""
    server.registry.checkpoint()
    assert server.store is not None
    [row] = server.store.runs()
    [checkpoint] = server.store.checkpoints(row)
    state = json.loads(checkpoint.state)

    assert (state["epoch"], state["n"], state["step"], state["num_updates"], state["final"]) == (1, 3, 30, 3, False)
