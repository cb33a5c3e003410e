"""The ring of a run on several hosts: the same snapshots on all of them, and those that one server would have.

Knows hosts in one process (town.py), and what their catalogs and folders have. Does not know HTTP, or who asks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
from torch import Tensor

from ema_client.errors import SnapshotDamaged
from ema_client.protocol import Posthoc, RingInfo
from ema_service.averaging import Ring
from ema_service.cluster import Answer, Rewind, RingKept, SnapshotBegun, SnapshotTaken
from ema_service.cluster.reasons import error_of, lacked_in
from ema_service.persistence import ShardRing
from ema_service.storage.catalog import Catalog
from ema_service.storage.store import Store
from tests.service.cluster.town import POINTS, Host, Town
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.service.conftest import LocalServer

Model = Callable[[int], dict[str, Tensor]]

SMALL = Posthoc(snapshots=3, sigma_rel=(0.03, 0.25))
_KEYS = itertools.count()


@pytest.fixture
def town(tmp_path: Path, model: Model, ram_dir: Path) -> Iterator[Callable[..., Town]]:
    """Make a town of so many hosts, whose run has a ring, with its initial weights."""
    made: list[Town] = []

    def make(hosts: int = 2, **config: Any) -> Town:
        made.append(Town(tmp_path / str(len(made)), hosts, model, ram_dir, posthoc=SMALL, **config))
        made[-1].push(0)
        return made[-1]

    yield make
    for each in made:
        each.close()


def ring(host: Host) -> ShardRing:
    found = host.server.registry.ring("r")
    assert found is not None
    return found


def written(here: Town) -> None:
    for host in here.hosts:
        wait_until(lambda host=host: ring(host).is_written)


def agree(here: Town) -> Answer | None:
    """Have all hosts agree on one more ring, as the first one wants it that wants another; None where none does."""
    written(here)
    for host in here.hosts:
        if wanted := ring(host).wanted():
            answer = here.change(f"ring {next(_KEYS)}", RingKept(wanted[0], " ".join(wanted[1])))
            if lacked := lacked_in(answer.reason):
                ring(host).give_up(lacked, "a host lacks them")
            return answer
    return None


def agreed(here: Town) -> None:
    """Have all hosts agree on what they have written."""
    while agree(here):
        pass
    written(here)


def push(here: Town, first: int, last: int) -> None:
    """Push updates, after each of which the hosts agree."""
    for step in range(first, last + 1):
        here.push(step)
        agreed(here)


def told(host: Host) -> RingInfo:
    found = host.local.info.ring
    assert found is not None
    return found


def times(here: Town) -> tuple[int, ...]:
    """The times of the ring, which are the same on all hosts, on the disk and of what is told."""
    found = [told(host) for host in here.hosts]
    assert len({(each.times, each.begin) for each in found}) == 1, found
    for host in here.hosts:
        names = {each.version for each in ring(host).shelf.all}
        wait_until(lambda host=host, names=names: {path.name for path in host.server.data_files("*/ring/*")} == names)
    return found[0].times


def rule(upto: int) -> tuple[int, ...]:
    """The times that a ring has after so many updates."""
    found = Ring(SMALL.sigma_rel, SMALL.snapshots, 1)
    for n in range(1, upto + 1):
        if found.due(n):
            found = found.taken(n)
            found = found if (surplus := found.surplus()) is None else found.dropped(surplus)
    return found.times


def test_hosts_have_the_ring_of_one_server(
    town: Callable[..., Town], local_server: Callable[..., LocalServer], model: Model
) -> None:
    """After each update the same times, on all hosts and on a server that decides alone; also once all came back."""
    here, alone = town(3), local_server()
    run = alone.create("r", model(0), posthoc=SMALL)
    run.begin(model(0))
    agreed(here)
    for step in range(1, 14):
        run.push(step, model(step))
        wait_until(lambda: alone.registry.synthesiser("r").ring.idle)
        push(here, step, step)
        assert run.info.ring
        assert (times(here), told(here.hosts[0]).begin) == (run.info.ring.times, run.info.ring.begin)
        if step == 10:
            for host in here.hosts:
                host.restart()
            here.deliver()
    assert len(times(here)) == 3


def test_what_came_at_once_is_judged_in_order(town: Callable[..., Town]) -> None:
    """Snapshots that wait for one another to be agreed on, by one change: those that one after the other had left."""
    here = town(2)
    for step in range(1, 7):
        here.push(step)
        written(here)
    assert [len(ring(host).shelf.leading_to(host.local.version).begun) for host in here.hosts] == [7, 7]
    answer = agree(here)
    assert answer
    assert answer.committed
    assert agree(here) is None
    assert times(here) == rule(6)


@pytest.mark.parametrize("point", [each for each in POINTS if POINTS[each][0] not in ("vote", "put")])
@pytest.mark.parametrize("place", [0, 1])
def test_host_is_killed(place: int, point: str, town: Callable[..., Town]) -> None:
    """A host that is killed at any point comes back with the ring of the others, and the ring goes on."""
    here = town(2)
    push(here, 1, 3)
    here.push(4)
    written(here)  # or the killed host lacks it, and the others go on without it
    here.hosts[place].kill_at = point
    if point.startswith("term"):
        here.replace_coordinator()
    agreed(here)
    here.say_again()
    agreed(here)
    assert here.hosts[place].kills == 1
    assert times(here) == rule(4)
    push(here, 5, 12)
    assert times(here) == rule(12)


@pytest.mark.parametrize("place", [0, 1])
def test_what_a_host_did_not_write_is_nowhere(place: int, town: Callable[..., Town]) -> None:
    """A host whose disk is full, or that is killed before it has written: the others give that snapshot up, wait for
    it no more, and what comes next is in the ring of all."""
    here = town(2)
    push(here, 1, 2)
    full = here.hosts[place].server.store
    check_room = Store.check_room

    def checked(store: Store, nbytes: int) -> None:
        if store is full:
            raise OSError(28, "No space left on device")
        check_room(store, nbytes)

    with patch.object(Store, "check_room", checked):
        push(here, 3, 3)
    assert times(here) == (1, 2)
    assert [(ring(host).idle, told(host).waiting) for host in here.hosts] == [(True, 0)] * 2
    push(here, 4, 4)
    assert times(here) == (1, 2, 4)
    with patch.object(ShardRing, "_write", lambda *_: None):
        here.push(5)
        written(here)
    here.hosts[place].restart()
    here.deliver()
    agreed(here)
    assert times(here) == (1, 2, 4)
    push(here, 6, 12)
    assert times(here)[-1] == 12


@pytest.mark.parametrize("place", [0, 1])
def test_a_host_that_lost_a_file_is_found(place: int, town: Callable[..., Town]) -> None:
    """Whoever reads is told; with the next ring none of the hosts has that snapshot any more."""
    here = town(2)
    push(here, 1, 3)
    lost = ring(here.hosts[place])
    [snapshot] = [each for each in lost.shelf.all if each.time == 2]
    for path in here.hosts[place].server.data_files("*/ring/1.2/*"):
        path.unlink()
    with pytest.raises(SnapshotDamaged, match=r"1\.2"):
        lost.shelf.open(snapshot, snapshot.averages[0])
    push(here, 4, 4)
    assert times(here) == (1, 3, 4)


def test_all_go_back_with_one_ring(town: Callable[..., Town]) -> None:
    """A host loses its machine, with whatever was not synced: the ring of all is what led to where they go back."""
    here = town(2)
    push(here, 1, 3)
    here.checkpoint("c1")
    kept = here.hosts[1].medium()
    push(here, 4, 8)
    here.hosts[1].lose_power(here.hosts[1].medium())
    here.say_again()
    assert here.versions() == ["2.3", "2.3"]
    agreed(here)
    assert times(here) == tuple(time for time in (1, 2, 3) if time in times(here))
    assert kept
    push(here, 4, 8)
    assert times(here)[-1] == 8


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("then", ["voted", "committed there"])
def test_machine_goes_down(then: str, lost: int, town: Callable[..., Town]) -> None:
    """A host whose machine goes down between its vote and the verdict: the ring of all is the one that all voted for,
    without what they went back over."""
    here = town(2)
    push(here, 1, 2)
    here.checkpoint("c")
    here.push(3)
    written(here)
    host, first = here.hosts[lost], ring(here.hosts[0])
    change = RingKept(1, "1.0 1.2")  # all that the hosts have, but for one that led to the checkpoint
    assert {each.version for each in first.shelf.all} == {"1.0", "1.1", "1.2", "1.3"}
    if then == "committed there":
        host.kill_at = "verdict read, no row"
        mediums: list[dict[str, bytes]] = []

        def lose() -> None:
            mediums.append(host.medium())
            host.lose_power(mediums[0])

        with patch.object(host, "restart", lose):
            here.change("k", change)
    else:
        here.coordinator_dies = 3
        here.change("k", change)
        host.lose_power(host.medium())
    here.deliver()
    here.say_again()
    assert here.versions() == ["2.2", "2.2"]
    agreed(here)
    assert times(here) == (2,)


def test_votes_outlive_the_machine(town: Callable[..., Town], monkeypatch: pytest.MonkeyPatch) -> None:
    """A power loss takes no host's vote for a ring back, nor the verdict."""
    here, seen = town(2), []
    push(here, 1, 3)
    here.push(4)
    written(here)
    transaction = Catalog._transaction

    def noted(catalog: Catalog, *, durable: bool = True) -> Any:
        seen.append(durable)
        return transaction(catalog, durable=durable)

    monkeypatch.setattr(Catalog, "_transaction", noted)
    assert agree(here)
    assert seen == [True] * 4


def test_a_rewind(town: Callable[..., Town]) -> None:
    """What did not lead to the version that all go back to is gone on all hosts."""
    here = town(2)
    push(here, 1, 2)
    here.change("b", SnapshotBegun("s", 5.0, "k"))
    here.change("t", SnapshotTaken("s", 5.0))
    push(here, 3, 4)
    here.push(5)
    written(here)
    wanted = ring(here.hosts[0]).wanted()
    assert wanted
    assert here.change("r", Rewind("s", 5.0)).committed
    late = here.change("late", RingKept(wanted[0], " ".join(wanted[1])))
    assert error_of(late.reason).code == "invalid_request"
    agreed(here)
    for host in here.hosts:
        wait_until(lambda host=host: ring(host).idle)
    assert set(times(here)) <= {1, 2}
    for host in here.hosts:
        host.restart()
    here.deliver()
    here.push(3, "again")
    agreed(here)
    assert times(here)[-1] == 3


def live(here: Town, seed: int) -> None:
    """Updates, rewinds and rings, while messages are lost, late, twice and out of order, and hosts end anywhere: once
    all is calm the hosts have one ring, of what led to the version."""
    dice = Random(seed)
    here.change("b", SnapshotBegun("s", 5.0, "k"))
    here.change("t", SnapshotTaken("s", 5.0))
    for step in range(1, 13):
        for host in here.hosts:
            host.kill_at = dice.choice(list(POINTS)) if dice.random() < 0.2 else None
        here.dice = dice if dice.random() < 0.7 else None
        here.push(step, f"u{step} {dice.random()}")
        written(here)
        if wanted := ring(here.hosts[0]).wanted():
            here.change(f"r{step}", RingKept(wanted[0], " ".join(wanted[1])))
        here.calm()
        if step == 7:
            here.change("back", Rewind("s", 5.0))
        if dice.random() < 0.2:
            here.hosts[dice.randrange(3)].restart()
        here.calm()
        agreed(here)
        for host in here.hosts:
            wait_until(lambda host=host: ring(host).idle)
        assert len(times(here)) <= SMALL.snapshots
        assert set(times(here)) <= set(range(1, here.hosts[0].local.version.num_updates + 1))


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(each, marks=pytest.mark.soak) for each in range(3, 60))])
def test_lives(seed: int, town: Callable[..., Town]) -> None:
    """Whatever happens, there is one ring."""
    live(town(3), seed)


def test_a_run_without_a_ring_gets_none(tmp_path: Path, model: Model) -> None:
    """Such a change is refused by name."""
    here = Town(tmp_path / "t", 2, model)
    here.push(0)
    assert error_of(here.change("k", RingKept(1, "1.0")).reason).code == "invalid_request"
    here.close()
