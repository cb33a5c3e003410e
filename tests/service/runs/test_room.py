"""Whether a run has room: what it takes at rest and for a push, against what the server measures it to take.

Knows layouts, numbers and the registry. Does not know HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from torch import Tensor

from ema_client.errors import Overloaded
from ema_client.protocol import AverageConfig
from ema_service.memory import Memory
from ema_service.memory.arena import buffer_bytes
from ema_service.runs.measurements import MOST_BYTES
from ema_service.runs.room import Needs, check_room

if TYPE_CHECKING:
    from tests.service.conftest import LocalServer

Model = Callable[[int], dict[str, Tensor]]


def test_the_runs_and_one_push() -> None:
    """All runs at rest, and the largest push of any: so much is looked for, and not a byte more."""
    others = [Needs(100, 50), Needs(200, 10)]
    check_room(others, Needs(30, 20), 380)
    check_room([], Needs(30, 20), 50)

    with pytest.raises(Overloaded, match="takes 30 bytes of memory, and a push 50 more; 2 runs take 300 of the 379"):
        check_room(others, Needs(30, 20), 379)
    with pytest.raises(Overloaded, match="and a push 81 more"):
        check_room(others, Needs(30, 81), 410)


@pytest.mark.parametrize("averages", [1, 3])
@pytest.mark.parametrize("durability", ["process", "memory", "disk"])
def test_needs_are_what_is_taken(
    durability: str, averages: int, local_server: Callable[..., LocalServer], model: Model, ram_dir: Path
) -> None:
    """What a run is said to take is what is counted in the budget, once pushes have come, but for its layout."""
    server = local_server(ram_dir=ram_dir)
    configs = tuple(AverageConfig(f"a{number}") for number in range(averages))
    run = server.create("run", model(0), durability=durability, averages=configs)
    run.begin(model(0))
    for step in range(1, 4):
        run.push(step, model(step))
    layout = run.run.layout
    needs = Needs.of(layout, averages, on_host=True, in_files=durability == "process")
    assert Needs.of(layout, averages, on_host=True, in_files=durability == "process", measured=True) == Needs(
        needs.resident + MOST_BYTES, needs.push
    )
    counted = needs.resident + needs.push - 1024 * len(layout.params)

    assert server.memory.budget.used <= counted <= server.memory.budget.used + buffer_bytes(layout)


def test_run_for_which_there_is_no_room(local_server: Callable[..., LocalServer], model: Model, ram_dir: Path) -> None:
    """Refused when it is created, and nothing of it stays; another run is no obstacle once it is deleted."""
    server = local_server(ram_dir=ram_dir)
    layout = server.create("first", model(0)).run.layout
    one = Needs.of(layout, 1, on_host=True, in_files=True, measured=True)
    server.memory.budget.limit = one.resident * 2 - 1
    with pytest.raises(Overloaded, match="the run takes"):
        server.create("second", model(0))
    assert [run.config.run for run in server.registry.runs()] == ["first"]
    assert server.store is not None
    assert [row.name for row in server.store.runs()] == ["first"]
    server.registry.delete("first")

    server.create("second", model(0)).begin(model(0))


@pytest.mark.parametrize("durability", ["process", "memory", "disk"])
def test_restart_with_less_memory(
    durability: str, local_server: Callable[..., LocalServer], model: Model, ram_dir: Path
) -> None:
    """A run without room comes up degraded, its files as they were; with the memory it is back, to the bit."""
    limit = [1 << 30]
    server = local_server(ram_dir=ram_dir, new_memory=lambda: Memory("cpu", keep_bytes=1 << 20, limit=limit[0]))
    run = server.create("run", model(0), durability=durability)
    run.begin(model(0))
    run.push(1, model(1))
    expected = run.bytes()
    server.stop()
    limit[0] = 10
    server.start()
    info = server.run("run").info
    assert (info.status, info.step) == ("degraded", None)
    assert "--memory-limit" in str(info.reason)
    server.crash()
    limit[0] = 1 << 30
    server.start()

    assert server.run("run").bytes() == expected
    server.run("run").push(2, model(2))
