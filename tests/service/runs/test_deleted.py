"""What is still being written when its run is deleted comes to nothing: no file, no memory, no row, no warning.

Knows registries in this process, and where a write touches a disk or takes memory first. Does not know HTTP.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from ema_client.errors import EmaError, RunNotFound, StorageFailed, Superseded
from ema_client.protocol import SweepReport
from ema_service.persistence import Versions
from ema_service.runs import Parameters
from ema_service.storage import MemoryFiles, slot_files
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.service.conftest import LocalServer

Model = Callable[[int], dict[str, Tensor]]

#: Longer than any of these writes takes.
SECONDS = 10.0


class Held:
    """Calls that one thread makes wait until let_go(). waiting: whether the thread waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self._over = threading.Event()
        self.waiting = False

    def begin(self, owner: Any, name: str) -> None:
        """From now on whoever calls this method or function, other than the calling thread, waits before its work."""
        real, me = getattr(owner, name), threading.get_ident()

        def held(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() != me and not self._over.is_set():
                self.waiting = True
                self._over.wait(3 * SECONDS)
            return real(*arguments, **options)

        self._patch.setattr(owner, name, held)

    def let_go(self) -> None:
        """Let every call go on."""
        self._over.set()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    found = Held(monkeypatch)
    yield found
    found.let_go()


@pytest.fixture
def thread(held: Held) -> Iterator[ThreadPoolExecutor]:
    """A thread to write on."""
    with ThreadPoolExecutor(1) as pool:
        yield pool
        held.let_go()


@pytest.fixture
def in_slots(local_server: Callable[..., LocalServer]) -> LocalServer:
    """Every version is written to a slot on disk."""
    return local_server()


@pytest.fixture
def in_memory(local_server: Callable[..., LocalServer], ram_dir: Path) -> LocalServer:
    """Every version lies in memory files."""
    return local_server(ram_dir=ram_dir)


def check_nothing_is_left(server: LocalServer, caplog: pytest.LogCaptureFixture) -> None:
    assert server.data_files("*") == []
    assert server.store
    assert not server.store.memory_files or server.store.memory_files.names() == set()
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == []


# --- slots ----------------------------------------------------------------------------------------------------------


def update(server: LocalServer, model: Model) -> Callable[[], object]:
    run = server.create("r", model(0))
    run.begin(model(0))
    begun = run.run.begin(1, run.staged(model(1)))
    return lambda: run.run.commit(begun)


def large_update(server: LocalServer, _: Model) -> Callable[[], object]:
    """An update that threads write behind its averaging."""
    model = {"w": torch.ones(4 << 20)}
    run = server.create("r", model)
    run.begin(model)
    return lambda: run.push(1, model)


def first_weights(server: LocalServer, model: Model) -> Callable[[], object]:
    run = server.create("r", model(0))
    return lambda: run.begin(model(0))


def weights_anew(server: LocalServer, model: Model) -> Callable[[], object]:
    run = server.create("r", model(0))
    run.begin(model(0))
    replaced = str(run.version)
    return lambda: run.run.initialise_anew(Parameters(run.staged(model(1))), replaced)


def rewind(server: LocalServer, model: Model) -> Callable[[], object]:
    run = server.create("r", model(0))
    run.begin(model(0))
    server.snapshot("s")
    run.push(1, model(1))
    return lambda: server.registry.rewind("r", "s")


def accept(server: LocalServer, model: Model) -> Callable[[], object]:
    run = server.create("r", model(0))
    run.begin(model(0))
    run.run.ledger.fault = "a newer version was damaged"
    return lambda: server.registry.accept("r")


def sync(server: LocalServer, model: Model) -> Callable[[], object]:
    run = server.create("r", model(0))
    run.begin(model(0))
    [versions] = server.registry.unsynced()
    assert isinstance(versions, Versions)
    versions._newest.slot.files.close()  # type: ignore[union-attr]  # so that they are opened, or made, by the sync
    return versions.sync


SLOTS = (update, large_update, first_weights, weights_anew, rewind, accept, sync)


@pytest.mark.parametrize("when", ["while its files are removed", "after that"])
@pytest.mark.parametrize("prepared", SLOTS, ids=[each.__name__ for each in SLOTS])
def test_slot(
    prepared: Callable[[LocalServer, Model], Callable[[], object]],
    when: str,
    in_slots: LocalServer,
    model: Model,
    held: Held,
    thread: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A version that reaches its slot's files once the run is deleted is not written, and its sender is told so."""
    write = prepared(in_slots, model)
    held.begin(slot_files.SlotFiles, "open")
    written = thread.submit(write)
    wait_until(lambda: held.waiting or written.done(), "the write")
    assert held.waiting, written.exception()
    if when == "while its files are removed":
        _when_slots_are_empty(monkeypatch, lambda: (held.let_go(), written.exception(SECONDS)))
    in_slots.registry.delete("r")
    held.let_go()
    fault = written.exception(SECONDS)
    assert fault is None or isinstance(fault, RunNotFound | Superseded)
    assert isinstance(fault, EmaError) or prepared is sync
    check_nothing_is_left(in_slots, caplog)


def _when_slots_are_empty(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something in the course of a removal, once: the slots are gone, and the folder they lay in is not yet."""
    real, waiting = os.rmdir, [act]

    def remove(path: Any, **options: Any) -> None:
        if waiting and Path(path).name == "slots":
            waiting.pop()()
        real(path, **options)

    monkeypatch.setattr(os, "rmdir", remove)


def test_snapshot_folder_does_not_come_back(
    in_slots: LocalServer, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """The files of a snapshot, of those that were named and of the ring's, make no folder for a run that has none."""
    in_slots.create("r", model(0))
    [row] = in_slots.store.runs()  # type: ignore[union-attr]
    in_slots.registry.delete("r")
    for shelf in ("snapshots", "ring"):
        with pytest.raises(FileNotFoundError):
            in_slots.store.save_snapshot(row, "s", lambda: "{}", {"ema": [b"x"]}, shelf)  # type: ignore[union-attr,arg-type]
    check_nothing_is_left(in_slots, caplog)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_memory_is_not_lent(in_memory: LocalServer, model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """A push that takes its memory once the run is deleted gets none, and is told to look again."""
    run = in_memory.create("r", model(0))
    run.begin(model(0))
    in_memory.registry.delete("r")
    with pytest.raises(Superseded):
        run.staged(model(1))
    check_nothing_is_left(in_memory, caplog)


def test_memory_that_is_being_taken(
    in_memory: LocalServer, model: Model, held: Held, thread: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory files that are made while their run is deleted are given back by whoever makes them."""
    run = in_memory.create("r", model(0))
    run.begin(model(0))
    lent = run.run.memory.landing(8)  # the file that there is beside the state's
    held.begin(MemoryFiles, "create")
    taken = thread.submit(run.staged, model(1))
    wait_until(lambda: held.waiting or taken.done(), "the memory")
    assert held.waiting, taken.exception()
    in_memory.registry.delete("r")
    held.let_go()
    assert isinstance(taken.exception(SECONDS), Superseded)
    del lent
    check_nothing_is_left(in_memory, caplog)


# --- rows -----------------------------------------------------------------------------------------------------------


def test_rows(in_slots: LocalServer, model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """What is noted of a run once the run is deleted leaves no row: a line, a writer's number, averages, a sweep."""
    run = in_slots.create("r", model(0))
    run.begin(model(0))
    timeline, sweeps, store = in_slots.registry.timeline("r"), in_slots.registry.sweeps("r"), in_slots.store
    assert store
    [row] = store.runs()
    in_slots.registry.delete("r")
    timeline.record("reset", "the warm-up begins anew", run.run.ledger.version)
    with pytest.raises(RunNotFound):
        sweeps.add(SweepReport("loss", ()), None)
    store.set_writer(row, 7)
    store.set_averages(row, "{}")
    with pytest.raises(sqlite3.IntegrityError):
        store.put_checkpoint(row, "slots/0", "{}", synced=False, durable=False)
    assert (store.runs(), store.timeline(row, 0.0, 9), store.sweeps(row), store.checkpoints(row)) == ([], [], [], [])
    check_nothing_is_left(in_slots, caplog)


def test_fault_of_a_run_that_is_there(in_slots: LocalServer, model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """A write that fails for another reason is told, and logged, as ever."""
    run = in_slots.create("r", model(0))
    run.begin(model(0))
    [folder] = in_slots.data_files("r.*")
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(StorageFailed):
        run.push(1, model(1))
    assert "could not be written" in caplog.text
