"""Averages that a run on several hosts gets, or loses: on all hosts or on none, whoever is killed where.

Knows hosts in one process (town.py), and what their catalogs and folders have. Does not know HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from ema_client.protocol import AverageConfig, to_json
from ema_service.cluster import AverageAdded, AverageRemoved, Checkpoint
from ema_service.cluster.reasons import error_of
from ema_service.storage.catalog import Catalog
from ema_service.storage.store import Store
from tests.service.cluster.town import POINTS, Town

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle

Model = Callable[[int], dict[str, Tensor]]
MakeTown = Callable[..., Town]

LONG = AverageConfig("long", decay=0.5)
ADDED = AverageAdded(json.dumps(to_json(LONG)), "l1")
REMOVED = AverageRemoved("long")


@pytest.fixture(params=["slots", "memory files"])
def town(request: pytest.FixtureRequest, tmp_path: Path, model: Model, ram_dir: Path) -> Iterator[MakeTown]:
    """Make a town of so many hosts, with its initial weights and an update."""
    made: list[Town] = []

    def make(hosts: int = 2) -> Town:
        in_memory = request.param == "memory files"
        durability = "process" if in_memory else "disk"
        made.append(
            Town(tmp_path / str(len(made)), hosts, model, ram_dir if in_memory else None, durability=durability)
        )
        made[-1].push(0)
        made[-1].push(1)
        return made[-1]

    yield make
    for each in made:
        each.close()


def members(here: Town) -> list[list[str]]:
    return [[member.name for member in host.local.run.ledger.setup.members] for host in here.hosts]


def shadows(here: Town, average: str) -> dict[str, Tensor]:
    parts = [host.local.shadows(average) for host in here.hosts]
    return {
        name: torch.cat([part[name] for part in parts if name in part]) if parts[0][name].dim() else parts[0][name]
        for name in parts[0]
    }


def assert_is(here: Town, average: str, oracle: LitEmaOracle) -> None:
    found = shadows(here, average)
    assert all(torch.equal(found[name], shadow) for name, shadow in oracle.shadow.items())


def files(here: Town, average: str) -> list[int]:
    """How many files of an average each host has."""
    return [len([*host.server.folder.rglob(f"*{average}*")]) if host.server.folder else 0 for host in here.hosts]


def test_an_average_comes_and_goes(town: MakeTown, model: Model, litema: type[LitEmaOracle]) -> None:
    """It begins with the next update's parameters, is LitEma's from there, after restarts too, and is gone once
    removed; the others go on."""
    here, first = town(3), litema(model(0))
    first.update(model(1))
    assert here.change("a", ADDED).committed
    assert members(here) == [["ema", "long"]] * 3
    assert here.versions() == ["1.1"] * 3
    assert error_of(here.change("a2", ADDED).reason).detail == "applied before"
    here.push(2)
    long = litema(model(2), decay=0.5)
    first.update(model(2))
    for step in (3, 4):
        for host in here.hosts:
            host.restart()
        here.deliver()
        here.push(step)
        first.update(model(step))
        long.update(model(step))
        assert_is(here, "ema", first)
        assert_is(here, "long", long)
    assert here.change("g", REMOVED).committed
    for _ in range(2):
        assert members(here) == [["ema"]] * 3
        for host in here.hosts:
            host.restart()
        here.deliver()
    here.push(5)
    first.update(model(5))
    assert_is(here, "ema", first)
    texts = [line[3] for line in here.hosts[1].lines()]
    assert texts == ["average long added (litema, decay 0.5)", "average long removed"]


@pytest.mark.parametrize("change", ["added", "removed"])
@pytest.mark.parametrize("point", [each for each in POINTS if POINTS[each][0] != "vote"])
@pytest.mark.parametrize("place", [0, 1])
def test_host_is_killed(place: int, point: str, change: str, town: MakeTown) -> None:
    """A host that is killed at any point of a change comes back with the averages that the others have, and room for
    them; the timeline has each change once."""
    here = town(2)
    for name, message in (("added", ADDED), ("removed", REMOVED)):
        if name == change:
            here.hosts[place].kill_at = point
            if point.startswith("term"):
                here.replace_coordinator()
        assert here.change(name, message).committed or name == change
        here.say_again()
        assert members(here) == [["ema", "long"] if name == "added" else ["ema"]] * 2
        here.push(2 if name == "added" else 3)
    assert here.hosts[place].kills == 1
    assert [[line[0] for line in host.lines()] for host in here.hosts] == [["average_added", "average_removed"]] * 2
    assert here.versions() == ["1.3", "1.3"]


def test_what_one_host_has_no_room_for_is_nowhere(town: MakeTown, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asked is told so, and what the other host took for the average is given back; a later try may do."""
    here = town(2)
    full = here.hosts[1].server.store

    def taking(store: Store, nbytes: int) -> Any:
        if store is full:
            raise OSError(28, "No space left on device")
        return taken(store, nbytes)

    taken = Store.taking
    with monkeypatch.context() as patch:
        patch.setattr(Store, "taking", taking)
        assert error_of(here.change("a", ADDED).reason).code == "storage_failed"
        assert members(here) == [["ema"], ["ema"]]
        assert files(here, "long") == [0, 0]
    assert here.change("a2", ADDED).committed
    assert min(files(here, "long")) > 0
    assert here.change("g", REMOVED).committed
    assert files(here, "long") == [0, 0]


def test_what_hosts_refuse(town: MakeTown) -> None:
    """For the reason that one server has, and nothing is changed."""
    here = town(2)
    for key, change, code in (
        ("k1", AverageRemoved("other"), "average_not_found"),
        ("k2", AverageRemoved("ema"), "last_average"),
        ("k3", AverageAdded(json.dumps(to_json(AverageConfig("ema", decay=0.5))), "l"), "average_exists"),
        ("k4", AverageAdded(json.dumps(to_json(AverageConfig("p", schedule="power"))), "l"), "invalid_request"),
        ("k5", AverageAdded("no JSON", "l"), "invalid_request"),
        ("k6", AverageAdded("[]", "l"), "invalid_request"),
    ):
        assert error_of(here.change(key, change).reason).code == code, key
    assert here.change("a", ADDED).committed
    assert error_of(here.change("g", AverageRemoved("ema")).reason).code == "last_average", "long has no weights yet"
    assert members(here) == [["ema", "long"]] * 2
    here.push(2)
    assert here.versions() == ["1.2", "1.2"]


@pytest.mark.parametrize("town", ["memory files"], indirect=True)
def test_votes_outlive_the_machine(town: MakeTown, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vote and verdict are on the medium before they are told, also where versions are not."""
    here, seen = town(2), []
    transaction = Catalog._transaction

    def noted(catalog: Catalog, *, durable: bool = True) -> Any:
        seen.append(durable)
        return transaction(catalog, durable=durable)

    monkeypatch.setattr(Catalog, "_transaction", noted)
    here.change("a", ADDED)
    here.change("g", REMOVED)
    assert seen == [True] * 8


@pytest.mark.parametrize("town", ["memory files"], indirect=True)
@pytest.mark.parametrize("then", ["voted", "committed here", "committed there", "used"])
@pytest.mark.parametrize("lost", [0, 1])
def test_machine_goes_down(lost: int, then: str, town: MakeTown, model: Model, litema: type[LitEmaOracle]) -> None:
    """The averages of all hosts are the same, and not those of before; weights are those of the checkpoint, and the
    average that it does not have begins with the next update."""
    here, oracle = town(2), litema(model(0))
    oracle.update(model(1))
    here.change("c", Checkpoint())
    host = here.hosts[lost]
    if then == "voted":
        here.coordinator_dies = 3
    elif then == "committed there":
        host.kill_at = "verdict read, no row"
        restart, mediums = host.restart, []

        def lose() -> None:
            mediums.append(host.medium())
            host.lose_power(mediums[0])

        host.restart = lose  # type: ignore[method-assign]
    here.change("a", ADDED)
    if then == "committed there":
        host.restart = restart  # type: ignore[method-assign]
    else:
        if then == "used":
            here.push(2)
        host.lose_power(host.medium())
    here.deliver()
    here.say_again()
    assert members(here) == [["ema", "long"]] * 2
    assert here.versions() == ["2.1", "2.1"]
    here.push(5)
    oracle.update(model(5))
    assert_is(here, "ema", oracle)
    assert_is(here, "long", litema(model(5)))
