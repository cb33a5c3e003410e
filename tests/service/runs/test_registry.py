"""The registry: creating, finding, deleting runs; budgets; and what it does without a disk.

Knows registries in this process. Does not know HTTP, or how a state is kept (test_persistence).
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from ema_client.errors import (
    InvalidRequest,
    Overloaded,
    RunExists,
    RunNotFound,
    StorageDisabled,
    StorageFailed,
    Superseded,
    TooManyRuns,
)
from ema_client.protocol import AverageConfig, RunConfig, TensorSpec

if TYPE_CHECKING:
    from tests.service.conftest import LocalServer

Model = Callable[[int], dict[str, Tensor]]
StartServer = Callable[..., "LocalServer"]


@pytest.fixture(params=[False, True], ids=["disk", "memory"])
def server(request: pytest.FixtureRequest, local_server: StartServer) -> LocalServer:
    return local_server(memory=request.param)


def test_same_config_again_is_the_same_run(server: LocalServer, model: Model) -> None:
    """Creating a run again with the same configuration, its tensors in any order, gives that run."""
    first = server.create("r", model(0), decay=0.5)
    again = server.create("r", dict(reversed(model(0).items())), decay=0.5)

    assert again.run is first.run
    assert [run.config.run for run in server.registry.runs()] == ["r"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decay": 0.6}, "decay (0.5, not 0.6)"),
        ({"decay": 0.5, "use_num_updates": False}, "use_num_updates (True, not False)"),
        ({"decay": 0.5, "decay_per": "step"}, "decay_per (update, not step)"),
        ({"decay": 0.5, "non_finite": "allow"}, "non_finite (refuse, not allow)"),
        ({"decay": 0.5, "averages": (AverageConfig("a"),)}, "averages"),
        ({"decay": 0.5, "copied": ("wide", "emb")}, "choice of copied tensors (emb, wide)"),
    ],
)
def test_other_config_is_refused(changes: dict[str, Any], words: str, server: LocalServer, model: Model) -> None:
    """Creating a run that has weights with another configuration is refused, naming the run and what differs."""
    server.create("r", model(0), decay=0.5).begin(model(0))

    with pytest.raises(RunExists) as refusal:
        server.create("r", model(0), **changes)

    assert "'r'" in refusal.value.detail
    assert words in refusal.value.detail


def test_run_without_weights_gives_way(server: LocalServer, model: Model) -> None:
    """A run that awaits its weights is replaced where the configuration is another, and nothing of it stays: its files,
    its place among the runs, its number of writers alone. Who still has it in hand is told to come again."""
    old = server.create("r", model(0), decay=0.5)
    server.create("later", model(0))
    server.registry.attach("r")
    new = server.create("r", {"other": torch.zeros(3)}, decay=0.25)

    assert (new.info.status, new.info.decay, new.info.writer) == ("awaiting_weights", 0.25, 1)
    assert new.info.created_at > old.info.created_at
    assert [run.config.run for run in server.registry.runs()] == ["later", "r"]
    assert server.folder is None or len(server.data_files("r.*")) == 1
    with pytest.raises(Superseded, match="was made anew"):
        old.begin(model(0))
    with pytest.raises(RunNotFound, match="of that time"):
        server.registry.get("r", old.info.created_at)
    new.begin({"other": torch.ones(3)})
    with pytest.raises(RunExists):
        server.create("r", model(0), decay=0.5)


def test_run_that_gives_way_makes_room(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the number of runs nor their memory counts a run twice that is replaced; where the new run has no room
    the old one stays."""
    monkeypatch.setattr("ema_service.runs.claims.MAX_RUNS", 1)
    server.create("r", {"w": torch.zeros(1 << 20)})
    monkeypatch.setattr(server.registry.memory.budget, "limit", 40 << 20)
    assert server.create("r", {"w": torch.zeros(1 << 20)}, decay=0.5).info.decay == 0.5
    with pytest.raises(Overloaded, match="0 runs take 0"):
        server.create("r", {"w": torch.zeros(1 << 24)})
    assert server.run("r").info.decay == 0.5


def test_run_with_snapshots_does_not_give_way(local_server: StartServer, model: Model) -> None:
    """A run of ``memory`` that a crash left without weights keeps its name as long as it has a snapshot."""
    server = local_server()
    server.create("r", model(0), durability="memory").begin(model(0))
    server.snapshot("s")
    server.crash()
    server.start()
    assert server.run("r").info.status == "awaiting_weights"
    with pytest.raises(RunExists):
        server.create("r", model(0), durability="memory", decay=0.5)
    server.registry.snapshots("r").delete("s")
    assert server.create("r", model(0), durability="memory", decay=0.5).info.decay == 0.5


def test_locked_catalog_leaves_the_run(
    local_server: StartServer, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the row of a run cannot be removed the run stays as it was; where that of the new one cannot be written
    there is neither, and the name is free."""
    server = local_server()
    server.create("r", model(0), decay=0.5)

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    with monkeypatch.context() as locked:
        locked.setattr("ema_service.storage.catalog.Catalog.remove_run", fail)
        with pytest.raises(StorageFailed, match="was not deleted"):
            server.create("r", model(0), decay=0.25)
    assert (server.run("r").info.decay, server.run("r").info.status) == (0.5, "awaiting_weights")
    with monkeypatch.context() as locked:
        locked.setattr("ema_service.storage.catalog.Catalog.add_run", fail)
        with pytest.raises(StorageFailed, match="was not created"):
            server.create("r", model(0), decay=0.25)
    assert server.registry.runs() == []
    server.create("r", model(0), decay=0.25).begin(model(0))


def test_runs_are_counted(server: LocalServer, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the most runs a server holds another is refused; those that exist are found, a deleted one makes room."""
    monkeypatch.setattr("ema_service.runs.claims.MAX_RUNS", 2)
    for name in ("a", "b", "a"):
        server.create(name, model(0))

    with pytest.raises(TooManyRuns, match="holds 2 runs"):
        server.create("c", model(0))
    server.registry.delete("a")
    server.create("c", model(0))
    assert {run.config.run for run in server.registry.runs()} == {"b", "c"}


def test_other_layout_is_refused_without_listing_it(server: LocalServer, model: Model) -> None:
    """A run with another layout is refused in one short line."""
    server.create("r", model(0)).begin(model(0))

    with pytest.raises(RunExists) as refusal:
        server.create("r", {**model(0), "more": torch.zeros(1)})

    assert refusal.value.detail == "run 'r' exists with another layout"


def test_copied_tensors_are_a_set(server: LocalServer, model: Model) -> None:
    """Their order does not matter; where others are copied a few of them are named; an unknown one makes no run."""
    run = server.create("r", model(0), copied=("emb", "wide"))

    assert server.create("r", model(0), copied=["wide", "emb"]).run is run.run
    run.begin(model(0))
    with pytest.raises(RunExists, match=r"copied tensors \(conv\.weight, emb, half, none, scalar and 1 more\)"):
        server.create("r", model(0), copied=("conv.weight", "half", "none", "scalar"))
    with pytest.raises(InvalidRequest, match="copied: not in the layout: w"):
        server.create("other", model(0), copied=("w",))
    assert len(server.registry.runs()) == 1


@pytest.mark.parametrize(
    ("averages", "word"),
    [
        ((), "0 were given"),
        (tuple(AverageConfig(f"a{i}") for i in range(17)), "17 were given"),
        ((AverageConfig("a"), AverageConfig("b"), AverageConfig("a")), "'a' stands there 2 times"),
    ],
)
def test_impossible_averages_are_refused(
    averages: tuple[AverageConfig, ...], word: str, server: LocalServer, model: Model
) -> None:
    """No averages, too many, or two of one name are refused, and no run is made."""
    with pytest.raises(InvalidRequest, match=word):
        server.create("r", model(0), averages=averages)

    assert server.registry.runs() == []


def test_impossible_layout_makes_no_run(server: LocalServer) -> None:
    """A layout no run can hold leaves nothing behind: the name is free."""
    with pytest.raises(InvalidRequest):
        server.registry.create(RunConfig("r", (TensorSpec("w", (1,), "I8"),)))
    server.create("r", {"w": torch.zeros(1)})


def test_unknown_run(server: LocalServer) -> None:
    """A run that is not there is named in the refusal, whatever is asked of it."""
    for act in (
        lambda: server.registry.get("nobody"),
        lambda: server.registry.snapshots("nobody"),
        lambda: server.registry.delete("nobody"),
        lambda: server.registry.set_decay("nobody", 0.5, None),
    ):
        with pytest.raises(RunNotFound, match="'nobody'"):
            act()


def test_deleted_run_is_gone(server: LocalServer, model: Model) -> None:
    """A deleted run is not found, takes no update, and its name is free for another layout."""
    run = server.create("r", model(0))
    run.begin(model(0))
    server.registry.delete("r")

    with pytest.raises(RunNotFound):
        server.registry.get("r")
    with pytest.raises(RunNotFound):
        run.push(1, model(1))
    assert server.create("r", {"other": torch.zeros(3)}).info.status == "awaiting_weights"


def test_runs_are_listed_oldest_first(server: LocalServer, model: Model) -> None:
    """runs() lists the runs in the order of their creation."""
    for name in ("c", "a", "b"):
        server.create(name, model(0))

    assert [run.config.run for run in server.registry.runs()] == ["c", "a", "b"]


def test_one_name_created_by_many(server: LocalServer, model: Model) -> None:
    """Eight threads that create one run at once get one run, and one of them made it."""
    specs = server.create("other", model(0)).run.config.layout
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: server.registry.create(RunConfig("r", specs)), range(8)))

    assert len({id(run) for run, _ in made}) == 1
    assert sum(new for _, new in made) == 1


def test_memory_mode_keeps_nothing(local_server: StartServer, model: Model) -> None:
    """Without a data dir snapshots are refused by name, updates work, and closing asks nothing of a disk."""
    server = local_server(memory=True)
    run = server.create("r", model(0))
    run.begin(model(0))
    run.push(1, model(1))
    server.registry.checkpoint()

    with pytest.raises(StorageDisabled, match="--memory"):
        server.registry.snapshots("r")
    assert run.info.durable_step is None
    server.stop()


def test_listing_does_not_wait_for_a_deletion(server: LocalServer, model: Model) -> None:
    """While a deletion waits for the update in hand, other runs can be listed and found: the event loop does both."""
    slow, _ = server.create("slow", model(0)), server.create("other", model(0))
    seen: list[int] = []
    with slow.run._lock:
        deleting = threading.Thread(target=server.registry.delete, args=("slow",), daemon=True)
        deleting.start()
        reading = threading.Thread(target=lambda: seen.append(len(server.registry.runs())), daemon=True)
        reading.start()
        reading.join(30)
        finished = not reading.is_alive()
    deleting.join(30)
    reading.join(30)

    assert finished, "runs() waited for the deletion of another run"


def test_set_decay_is_noted(local_server: StartServer, model: Model) -> None:
    """A change of the decay is in the run's timeline on disk."""
    server = local_server()
    run = server.create("r", model(0), averages=(AverageConfig("a"), AverageConfig("b")))
    run.begin(model(0))
    server.registry.set_decay("r", 0.25, None)
    server.registry.set_decay("r", 0.5, "b")
    assert server.store is not None
    lines = server.store.timeline(server.store.runs()[0], 0.0, 9)

    assert [(line.kind, line.text) for line in lines[1:]] == [
        ("decay_changed", "decay of a set to 0.25"),
        ("decay_changed", "decay of b set to 0.5"),
    ]
