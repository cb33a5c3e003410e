"""Snapshots of a run on several hosts: of one version, there on all hosts or on none, whoever is killed where.

Knows hosts in one process (town.py), and what their catalogs and folders have. Does not know HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ema_client.errors import SnapshotNotFound
from ema_client.protocol import RunConfig
from ema_service.cluster import Adjustment, Checkpoint, Rewind, SnapshotBegun, SnapshotGone, SnapshotTaken, decode
from ema_service.cluster.reasons import error_of
from ema_service.storage import ShardRow
from ema_service.storage.catalog import Catalog
from ema_service.storage.store import Store
from tests.service.cluster.town import POINTS, Town
from tests.service.conftest import specs_of

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle
    from tests.service.conftest import LocalServer

Model = Callable[[int], dict[str, Tensor]]

BEGUN, TAKEN = SnapshotBegun("s", 5.0, "k"), SnapshotTaken("s", 5.0)


@pytest.fixture
def town(tmp_path: Path, model: Model, ram_dir: Path) -> Iterator[Callable[..., Town]]:
    """Make a town of so many hosts, whose versions lie in memory files, with its initial weights and an update."""
    made: list[Town] = []

    def make(hosts: int = 2, **config: Any) -> Town:
        made.append(Town(tmp_path / str(len(made)), hosts, model, ram_dir, **config))
        made[-1].push(0)
        made[-1].push(1)
        return made[-1]

    yield make
    for each in made:
        each.close()


def names(here: Town) -> list[list[str]]:
    return [[info.name for info in host.server.registry.snapshots("r").all()] for host in here.hosts]


def data(host: Any, name: str) -> list[tuple[str, bytes]]:
    """The bytes of a snapshot's files."""
    return [(path.name, path.read_bytes()) for path in host.server.data_files(f"*/snapshots/{name}/*")]


def shadows(host: Any, name: str) -> Tensor:
    info, averages, arenas = host.server.registry.snapshots("r").read(name, host.local.run.ledger.setup.members)
    assert (info.version, len(averages)) == ("1.1", 1)
    whole: Tensor = arenas[0].tensor
    return whole


def test_a_snapshot_is_of_one_version(town: Callable[..., Town]) -> None:
    """Updates go on between the two changes; each host's snapshot is of the version that all had at the first."""
    here = town(3)
    before = [host.local.state.arenas[0].tensor.clone() for host in here.hosts]
    assert here.change("b", BEGUN).committed
    here.push(2)
    assert names(here) == [[], [], []]
    with pytest.raises(SnapshotNotFound):
        here.hosts[0].server.registry.snapshots("r").open("s")
    assert here.change("t", TAKEN).committed
    for _ in range(2):
        assert names(here) == [["s"]] * 3
        for host, expected in zip(here.hosts, before, strict=True):
            assert torch.equal(shadows(host, "s"), expected)
            assert host.server.registry.snapshots("r").find("s").created_at == 5.0
            host.restart()
        here.deliver()
    refused = here.change("b2", SnapshotBegun("s", 6.0, "other"))
    assert error_of(refused.reason).code == "snapshot_exists"
    assert here.change("g", SnapshotGone("s", 5.0)).committed
    assert names(here) == [[], [], []]
    assert [data(host, "s") for host in here.hosts] == [[], [], []]
    assert error_of(here.change("g2", SnapshotGone("s", 5.0)).reason).code == "snapshot_not_found"


def test_older_ones_of_a_series_go(town: Callable[..., Town]) -> None:
    """By the change by which the new one is there."""
    here = town(2)
    for number in range(3):
        name = f"e-{number}"
        here.change(f"b{number}", SnapshotBegun(name, float(number), name))
        gone = here.hosts[0].server.registry.snapshots("r").series(name, 2)
        here.change(f"t{number}", SnapshotTaken(name, float(number), " ".join(gone)))
    assert names(here) == [["e-1", "e-2"]] * 2
    assert [data(host, "e-0") for host in here.hosts] == [[], []]


def test_what_one_host_could_not_write_is_nowhere(town: Callable[..., Town], monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full on one host: nobody finds the snapshot, and nothing is left of it once it is given up."""
    here = town(2)
    full = here.hosts[1].server.store

    def check_room(store: Store, _: int) -> None:
        if store is full:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "check_room", check_room)
        assert here.change("b", BEGUN).committed
    fault = error_of(here.change("t", TAKEN).reason)
    assert (fault.code, fault.retryable, "No space left" in fault.detail) == ("storage_failed", True, True)
    assert names(here) == [[], []]
    assert here.change("g", SnapshotGone("s", 5.0, begun=True)).committed
    assert [data(host, "s") for host in here.hosts] == [[], []]
    assert here.change("b2", SnapshotBegun("s", 6.0, "k")).committed
    assert here.change("t2", SnapshotTaken("s", 6.0)).committed
    assert names(here) == [["s"], ["s"]]


def test_what_was_begun_makes_room(town: Callable[..., Town]) -> None:
    """A snapshot that was begun by someone who is gone is written anew under its name, and goes in an hour."""
    here = town(2)
    here.change("b", BEGUN)
    here.push(2)
    here.change("b2", SnapshotBegun("s", 6.0, "k2"))
    assert error_of(here.change("t", TAKEN).reason).code == "version_gone"
    here.change("b3", SnapshotBegun("other", 4000.0, "k3"))
    assert [data(host, "s") for host in here.hosts] == [[], []]


@pytest.mark.parametrize("change", ["begun", "taken", "gone"])
@pytest.mark.parametrize("point", [each for each in POINTS if POINTS[each][0] not in ("vote", "put")])
@pytest.mark.parametrize("place", [0, 1])
def test_host_is_killed(place: int, point: str, change: str, town: Callable[..., Town]) -> None:
    """A host that is killed at any point of a change comes back with the same snapshots as the others."""
    here = town(2)
    for name, message in (("begun", BEGUN), ("taken", TAKEN), ("gone", SnapshotGone("s", 5.0))):
        if name == change:
            here.hosts[place].kill_at = point
            if point.startswith("term"):
                here.replace_coordinator()
        answer = here.change(name, message)
        here.say_again()
        if name == "taken" and not answer.committed:
            assert change == "begun"  # killed before it was written
            assert error_of(answer.reason).code == "version_gone"  # so a client asks again
            assert names(here) == [[], []]
            return
        assert names(here) == [["s"] if name == "taken" else []] * 2
    assert here.hosts[place].kills == 1
    assert [[line[0] for line in host.lines()] for host in here.hosts] == [["snapshot", "snapshot_deleted"]] * 2
    assert [data(host, "s") for host in here.hosts] == [[], []]


def test_votes_outlive_the_machine(town: Callable[..., Town], monkeypatch: pytest.MonkeyPatch) -> None:
    """The vote that a snapshot is there, or is not, is on the medium before it is told, and so is the verdict."""
    here, seen = town(2), []
    transaction = Catalog._transaction

    def noted(catalog: Catalog, *, durable: bool = True) -> Any:
        seen.append(durable)
        return transaction(catalog, durable=durable)

    here.change("b", BEGUN)
    monkeypatch.setattr(Catalog, "_transaction", noted)
    here.change("t", TAKEN)
    here.change("g", SnapshotGone("s", 5.0))
    assert seen == [True] * 8


@pytest.mark.parametrize("kept", ["memory files", "slots"])
def test_rewind(kept: str, tmp_path: Path, model: Model, ram_dir: Path, litema: type[LitEmaOracle]) -> None:
    """All hosts go back to a snapshot, bit for bit, in a new epoch; once for a key; and the run goes on."""
    durability = "process" if kept == "memory files" else "disk"
    here = Town(tmp_path / "t", 2, model, ram_dir if kept == "memory files" else None, durability=durability)
    oracle = litema(model(0))
    for step in (0, 1):
        here.push(step)
    oracle.update(model(1))
    here.change("b", BEGUN)
    here.change("t", TAKEN)
    for step in (2, 3):
        here.push(step)
    assert error_of(here.change("r0", Rewind("s", 6.0)).reason).code == "snapshot_not_found"
    assert here.change("r", Rewind("s", 5.0)).committed
    for _ in range(2):
        assert here.versions() == ["2.0", "2.0"]
        found = here.shadows()
        assert all(torch.equal(found[name], shadow) for name, shadow in oracle.shadow.items())
        for host in here.hosts:
            host.restart()
        here.deliver()
    here.push(2, "u2 again")
    oracle.update(model(2))
    found = here.shadows()
    assert all(torch.equal(found[name], shadow) for name, shadow in oracle.shadow.items())
    assert here.versions() == ["2.1", "2.1"]
    here.close()


@pytest.mark.parametrize("point", [each for each in POINTS if POINTS[each][0] != "discard"])
@pytest.mark.parametrize("place", [0, 1])
def test_host_is_killed_over_a_rewind(
    place: int, point: str, town: Callable[..., Town], litema: type[LitEmaOracle], model: Model
) -> None:
    """A host that is killed at any point of a rewind comes back, and all are at the snapshot, once."""
    here, oracle = town(2), litema(model(0))
    oracle.update(model(1))
    here.change("b", BEGUN)
    here.change("t", TAKEN)
    here.push(2)
    here.hosts[place].kill_at = point
    if point.startswith("term"):
        here.replace_coordinator()
    here.change("r", Rewind("s", 5.0))
    here.say_again()
    assert here.hosts[place].kills == 1
    assert here.versions() == ["2.0", "2.0"]
    assert [[line[0] for line in host.lines()] for host in here.hosts] == [["snapshot", "rewound"]] * 2
    found = here.shadows()
    assert all(torch.equal(found[name], shadow) for name, shadow in oracle.shadow.items())


def branch_off(here: Town, name: str = "base", **config: Any) -> None:
    """Give every host another run, with a snapshot "s" of what the run has by now."""
    for host, part in zip(here.hosts, here.parts(0), strict=True):
        registry = host.server.registry
        registry.create(RunConfig(name, specs_of(part), **config), ShardRow(host.place, here.hosts_count))
        with patch.object(time, "time", lambda: 5.0):
            registry.snapshots(name).take("s", host.local.run.ready_state)


BRANCH = Rewind("s", 5.0, "1.1", 1, "base")


@pytest.mark.parametrize("point", [None, *(each for each in POINTS if POINTS[each][0] != "discard")])
@pytest.mark.parametrize("place", [0, 1])
def test_host_is_killed_over_a_branch(
    place: int, point: str | None, town: Callable[..., Town], litema: type[LitEmaOracle], model: Model
) -> None:
    """All go on from another run's snapshot, once and in a new epoch, whoever is killed; and tell so."""
    here, oracle = town(2), litema(model(0))
    oracle.update(model(1))
    branch_off(here)
    here.push(2)
    here.hosts[place].kill_at = point
    if point and point.startswith("term"):
        here.replace_coordinator()
    assert here.change("r", BRANCH).committed or point
    here.say_again()
    assert here.hosts[place].kills == (1 if point else 0)
    assert here.versions() == ["2.0", "2.0"]
    said = ("rewound", 1, 1, "rewound to snapshot s of run base (version 1.1, step 1)")
    assert [host.lines() for host in here.hosts] == [[said]] * 2
    here.push(2, "again")
    oracle.update(model(2))
    found = here.shadows()
    assert all(torch.equal(found[name], shadow) for name, shadow in oracle.shadow.items())


def test_what_no_host_can_branch_from(town: Callable[..., Town]) -> None:
    """Whoever asks gets the reason of one server, and the run is as it was; so where one host alone has it not."""
    here = town(2)
    assert error_of(here.change("r1", BRANCH).reason).code == "run_not_found"
    branch_off(here)
    branch_off(here, "uncounted", use_num_updates=False)
    assert error_of(here.change("r2", BRANCH._replace(source="uncounted")).reason).code == "invalid_request"
    assert error_of(here.change("r3", BRANCH._replace(snapshot="t")).reason).code == "snapshot_not_found"
    here.hosts[1].server.registry.snapshots("base").delete("s")
    assert error_of(here.change("r4", BRANCH).reason).code == "snapshot_not_found"
    assert here.versions() == ["1.1", "1.1"]
    assert [host.lines() for host in here.hosts] == [[], []]
    here.push(2)
    assert here.versions() == ["1.2", "1.2"]


def test_a_rewind_of_an_earlier_server_is_read() -> None:
    """It stands in records, and said no more than the snapshot."""
    assert decode('{"rewind":{"snapshot":"s","created_at":5.0}}', Rewind) == Rewind("s", 5.0)


def test_the_timeline_says_what_one_server_says(
    town: Callable[..., Town], local_server: Callable[..., LocalServer], model: Model
) -> None:
    """Word for word, of all that hosts do together, with step and counter of then; once, after a restart too."""
    here, alone = town(2), local_server()
    alone.create("r", model(0)).begin(model(0))
    alone.run("r").push(1, model(1))
    registry = alone.registry
    registry.snapshots("r").take("s", registry.get("r").ready_state)
    registry.set_decay("r", 0.5, None)
    registry.reset_num_updates("r")
    registry.attach("r")
    registry.rewind("r", "s")
    registry.snapshots("r").delete("s")
    for key, change in {
        "b": BEGUN,
        "t": TAKEN,
        "d": Adjustment("decay", 0.5),
        "n": Adjustment("reset"),
        "w": Adjustment("writer"),
        "r": Rewind("s", 5.0, "1.1", 1),
        "g": SnapshotGone("s", 5.0),
    }.items():
        assert here.change(key, change).committed
    said = [(line.kind, line.step, line.num_updates, line.text) for line in registry.timeline("r").lines(0.0, 99)]
    assert len(said) == 7
    for host in here.hosts:
        assert host.lines() == said[1:]
        host.restart()
        assert host.lines() == said[1:]


def test_damaged_snapshot_keeps_all_where_they_are(town: Callable[..., Town]) -> None:
    """Where one host cannot read its files no host goes back, and whoever asked is told why."""
    here = town(2)
    here.change("b", BEGUN)
    here.change("t", TAKEN)
    for path in here.hosts[1].server.data_files("*/snapshots/s/*"):
        path.write_bytes(b"")
    assert error_of(here.change("r", Rewind("s", 5.0)).reason).code == "snapshot_damaged"
    assert here.versions() == ["1.1", "1.1"]
    here.push(2)
    assert here.versions() == ["1.2", "1.2"]


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("then", ["voted", "committed here", "committed there"])
def test_machine_goes_down(then: str, lost: int, town: Callable[..., Town]) -> None:
    """A host whose machine goes down between its vote and the verdict, or after: the snapshot is on all hosts or on
    none, also once all went back to a checkpoint from before."""
    here = town(2)
    here.change("c", Checkpoint())
    here.change("b", BEGUN)
    host = here.hosts[lost]
    if then == "committed there":
        here.hosts[lost].kill_at = "verdict read, no row"
        mediums: list[dict[str, bytes]] = []
        restart = host.restart

        def lose() -> None:
            mediums.append(host.medium())
            host.lose_power(mediums[0])

        host.restart = lose  # type: ignore[method-assign]
        here.change("t", TAKEN)
        host.restart = restart  # type: ignore[method-assign]
    elif then == "committed here":
        here.change("t", TAKEN)
        host.lose_power(host.medium())
    else:
        here.coordinator_dies = 3
        here.change("t", TAKEN)
        host.lose_power(host.medium())
    here.deliver()
    here.say_again()
    assert here.versions() == ["2.1", "2.1"]
    assert names(here) == [["s"], ["s"]]
    here.push(5)
    assert here.versions() == ["2.2", "2.2"]
