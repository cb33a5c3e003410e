"""One run's disk holds up no other run: while it hangs, others are created, pushed to, changed and deleted.

Knows registries in this process, and which of the system's calls reach a disk. Does not know HTTP (tests/service/api).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from ema_client.errors import EmaError, Overloaded, RunExists, StorageFailed, TooManyRuns
from ema_client.protocol import AverageConfig
from ema_client.schedules import litema, power
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.service.conftest import LocalServer

Model = Callable[[int], dict[str, Tensor]]

LONG, OTHER = power(0.1, name="long"), litema(0.5, name="other")
#: Far longer than any of these steps takes, and shorter than a hang that nobody ends.
SECONDS = 10.0


class Hang:
    """Calls of the system that hang for the files of one run. waiting: how many calls hang now."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: str) -> None:
        self._patch = monkeypatch
        self._run = f"/runs/{run}."
        self._over = threading.Event()
        self.waiting = 0

    def begin(self, call: str) -> None:
        """From now on ``call`` of the os module hangs for a file of the run."""
        real = getattr(os, call)

        def hanging(descriptor: int, *arguments: Any) -> Any:
            if self._run in str(Path(f"/proc/self/fd/{descriptor}").readlink()) and not self._over.is_set():
                self.waiting += 1
                self._over.wait(3 * SECONDS)
            return real(descriptor, *arguments)

        self._patch.setattr(os, call, hanging)

    def end(self) -> None:
        """Let every call go on."""
        self._over.set()


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hang]:
    """The disk of the run ``stuck``, which hangs from begin() on."""
    found = Hang(monkeypatch, "stuck")
    yield found
    found.end()


@pytest.fixture
def threads(hang: Hang) -> Iterator[ThreadPoolExecutor]:
    """Threads that are waited for once the disk goes on."""
    with ThreadPoolExecutor(8) as pool:
        yield pool
        hang.end()


@pytest.fixture(params=["memory files", "slots"])
def server(request: pytest.FixtureRequest, local_server: Callable[..., LocalServer], ram_dir: Path) -> LocalServer:
    return local_server(ram_dir=ram_dir if request.param == "memory files" else None)


def life(server: LocalServer, model: Model, name: str = "free") -> None:
    """What becomes of another run, from its creation to its end."""
    server.create(name, model(0), decay=0.5)
    run = server.create(name, model(0), decay=0.25)  # which takes the place of the first
    run.begin(model(0))
    assert run.push(1, model(1)).applied
    server.registry.add_average(name, LONG)
    assert server.snapshot("s", run=name)[1]
    server.registry.rewind(name, "s")
    server.registry.set_decay(name, 0.5, None)
    server.registry.remove_average(name, "long")
    assert server.run(name).info.status == "ready"
    assert name in [each.config.run for each in server.registry.runs()]
    server.registry.delete(name)


def hung(hang: Hang, work: Future[Any], waiting: Future[Any]) -> None:
    """Returns once one call of ``work`` hangs and ``waiting`` has had the time to come behind it."""
    wait_until(lambda: hang.waiting or work.done(), "a call that hangs")
    with contextlib.suppress(TimeoutError):
        waiting.result(0.2)
    assert not any((work.done(), waiting.done())), "there was nothing to wait for"


WAITING: dict[str, Callable[[LocalServer], object]] = {
    "add": lambda server: server.registry.add_average("stuck", LONG),
    "remove": lambda server: server.registry.remove_average("stuck", "other"),
    "delete": lambda server: server.registry.delete("stuck"),
}


@pytest.mark.parametrize("waiting", WAITING)
def test_checkpoint(waiting: str, server: LocalServer, model: Model, hang: Hang, threads: ThreadPoolExecutor) -> None:
    """While the checkpoint of a run hangs, and who changes its averages or deletes it waits, another lives."""
    run = server.create("stuck", model(0), averages=(AverageConfig("ema"), OTHER), durability="memory")
    run.begin(model(0))
    hang.begin("fdatasync")
    checkpoint = threads.submit(server.registry.checkpoint)
    hung(hang, checkpoint, changed := threads.submit(WAITING[waiting], server))
    threads.submit(life, server, model).result(SECONDS)
    assert not any((checkpoint.done(), changed.done()))
    hang.end()
    changed.result(SECONDS)
    checkpoint.result(SECONDS)
    names = [each.config.run for each in server.registry.runs()]
    assert names == ([] if waiting == "delete" else ["stuck"])


def test_update_in_hand(server: LocalServer, model: Model, threads: ThreadPoolExecutor) -> None:
    """While an average waits to be added until a run's update is applied, another run lives."""
    run = server.create("stuck", model(0))
    with run.run._lock:
        added = threads.submit(server.registry.add_average, "stuck", LONG)
        threads.submit(life, server, model).result(SECONDS)
        assert not added.done()
    assert added.result(SECONDS)[1]


def test_average_that_takes_its_room(
    server: LocalServer, model: Model, hang: Hang, threads: ThreadPoolExecutor
) -> None:
    """While the room of an average is taken, and a creation that takes the run's place waits for it, others live."""
    server.create("stuck", model(0), durability="disk")
    hang.begin("posix_fallocate")
    added = threads.submit(server.registry.add_average, "stuck", LONG)
    # Whoever comes first takes the run's locks: the average.
    wait_until(lambda: hang.waiting, "a call that hangs")
    replaced = threads.submit(server.create, "stuck", model(0), decay=0.5)
    hung(hang, added, replaced)
    threads.submit(life, server, model).result(SECONDS)
    assert not any((added.done(), replaced.done()))
    hang.end()
    assert added.result(SECONDS)[1]
    replaced.result(SECONDS)
    assert [average.decay for average in server.run("stuck").info.averages] == [0.5]


def test_creation(server: LocalServer, model: Model, hang: Hang, threads: ThreadPoolExecutor) -> None:
    """While the room of a new run is taken others live; who creates the same run waits, and gets it."""
    hang.begin("posix_fallocate")
    made = [threads.submit(server.create, "stuck", model(0), durability="disk") for _ in range(3)]
    hung(hang, made[0], made[1])
    threads.submit(life, server, model).result(SECONDS)
    assert (hang.waiting, [each.config.run for each in server.registry.runs()]) == (1, [])
    hang.end()
    assert len({id(each.result(SECONDS).run) for each in made}) == 1


# --- room that is promised ------------------------------------------------------------------------------------------


def test_runs_being_made_count(
    server: LocalServer, model: Model, hang: Hang, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is being made is one of those that a server may hold, until its creation fails."""
    monkeypatch.setattr("ema_service.runs.claims.MAX_RUNS", 1)
    hang.begin("posix_fallocate")
    made = threads.submit(server.create, "stuck", model(0), durability="disk")
    wait_until(lambda: hang.waiting, "a call that hangs")
    with pytest.raises(TooManyRuns, match="holds 1 runs"):
        threads.submit(server.create, "free", model(0)).result(SECONDS)
    monkeypatch.setattr("ema_service.persistence.Versions.allocate", _full)
    hang.end()
    made.result(SECONDS)
    server.registry.delete("stuck")
    with pytest.raises(StorageFailed):
        server.create("free", model(0), durability="disk")
    monkeypatch.undo()
    monkeypatch.setattr("ema_service.runs.claims.MAX_RUNS", 1)
    server.create("free", model(0))


#: Adds to what the run ``stuck`` takes, or makes it, by the averages that it has then: four MiB each.
TAKING: dict[str, tuple[int, Callable[[LocalServer, dict[str, Tensor]], object]]] = {
    "creation": (1, lambda server, large: server.create("stuck", large, durability="disk")),
    "average": (4, lambda server, _: server.registry.add_average("stuck", LONG)),
}


@pytest.mark.parametrize("what", TAKING)
def test_memory_is_promised_once(
    what: str, server: LocalServer, hang: Hang, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for one more is not given to a run that is made while another is made, or gets another average."""
    (averages, take), large = TAKING[what], {"w": torch.zeros(1 << 20)}
    if averages > 1:
        few = tuple(AverageConfig(f"a{n}") for n in range(averages - 1))
        server.create("stuck", large, durability="disk", averages=few)
    hang.begin("posix_fallocate")
    # Room for a version of the run and the one after it, and for less than another run beside.
    monkeypatch.setattr(server.registry.memory.budget, "limit", (2 * averages * 4 + 3) << 20)
    taken = threads.submit(take, server, large)
    wait_until(lambda: hang.waiting or taken.done())
    with pytest.raises(Overloaded, match="1 runs take"):
        threads.submit(server.create, "free", large, durability="disk").result(SECONDS)
    assert not taken.done()
    hang.end()
    taken.result(SECONDS)
    server.registry.delete("stuck")
    server.create("free", large, durability="disk")


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


# --- many at once ---------------------------------------------------------------------------------------------------


def test_nobody_waits_for_ever(server: LocalServer, model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """Threads that do anything to three runs at once, for two seconds, all come to an end; nothing stays of runs that
    were deleted, and nothing of that is an error."""
    registry, names, steps = server.registry, ("a", "b", "c"), itertools.count(1)
    acts: list[Callable[[str], object]] = [
        lambda name: server.create(name, model(0), decay=random.choice((0.5, 0.25))),
        lambda name: server.create(name, model(0), decay=0.5).begin(model(0)),
        lambda name: server.run(name).push(next(steps), model(1)),
        lambda name: registry.add_average(name, random.choice((LONG, OTHER))),
        lambda name: registry.remove_average(name, random.choice(("long", "other"))),
        lambda name: server.snapshot("s", run=name),
        lambda name: registry.rewind(name, "s"),
        lambda name: registry.rewind(name, "s", source=random.choice(names)),
        lambda name: registry.set_decay(name, 0.5, None),
        lambda name: registry.attach(name),
        lambda _: registry.checkpoint(),
        lambda _: [versions.sync() for versions in registry.unsynced()],
        registry.delete,
    ]
    until = time.monotonic() + 2

    def live(seed: int) -> int:
        done, chosen = 0, random.Random(seed)
        while time.monotonic() < until:
            with contextlib.suppress(EmaError):
                chosen.choice(acts)(chosen.choice(names))
                done += 1
        return done

    # Daemons, so that a deadlock fails this test and does not hang the process.
    done: list[int] = []
    living = [threading.Thread(target=lambda n=n: done.append(live(n)), daemon=True) for n in range(8)]
    for each in living:
        each.start()
    for each in living:
        each.join(SECONDS)
    assert len(done) == len(living), "a thread waits for ever, or met a defect"
    for name in names:
        with contextlib.suppress(RunExists):
            server.create(name, model(0), decay=0.5)
        registry.delete(name)
    assert (registry.runs(), len(registry._claims), registry._making) == ([], 0, set())
    assert server.data_files("*") == []
    assert server.store
    assert not server.store.memory_files or server.store.memory_files.names() == set()
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR] == []
