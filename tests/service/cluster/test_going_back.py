"""Checkpoints of one revision on all hosts, and the way back to one after a machine went down: all hosts or none.

Knows hosts with memory files and data dirs (town.py), and what a power loss leaves. Does not know when a checkpoint is
due (host), or HTTP.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from torch import Tensor

from ema_client.errors import AwaitingWeights, Overloaded
from ema_service.cluster import Adjustment, Kept
from ema_service.storage.catalog import Catalog
from tests.service.cluster.town import POINTS, Town

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle

Model = Callable[[int], dict[str, Tensor]]


@pytest.fixture
def town(tmp_path: Path, model: Model, ram_dir: Path) -> Iterator[Callable[..., Town]]:
    """Make a town of so many hosts, whose versions lie in memory files, with its initial weights."""
    made: list[Town] = []

    def make(hosts: int = 2, **config: Any) -> Town:
        made.append(Town(tmp_path / str(len(made)), hosts, model, ram_dir, **config))
        made[-1].push(0)
        return made[-1]

    yield make
    for each in made:
        each.close()


def kept(here: Town) -> list[Kept]:
    return [host.shard.kept() for host in here.hosts if host.shard]


@pytest.mark.parametrize("rolled_back", [False, True], ids=["all rows", "old rows"])
@pytest.mark.parametrize("place", [0, 1])
def test_all_go_back_with_the_host_that_lost(
    place: int, rolled_back: bool, town: Callable[..., Town], model: Model, litema: type[LitEmaOracle]
) -> None:
    """A host's machine goes down: all hosts go back to the newest checkpoint that all have, bit for bit, in a new
    epoch, and the run goes on."""
    here, oracle = town(3, decay=0.9), litema(model(0), decay=0.9)
    here.push(1)
    oracle.update(model(1))
    assert here.checkpoint("c").committed
    assert {host.local.info.checkpoint_step for host in here.hosts} == {1}
    medium = here.hosts[place].medium() if rolled_back else None
    here.push(2)
    here.change("k", Adjustment("decay", 0.5))
    here.push(3)
    assert {host.local.info.checkpoint_step for host in here.hosts} == {1}

    here.hosts[place].lose_power(medium)
    here.deliver()
    here.say_again()

    here.assert_at("2.1", oracle)
    assert {(host.local.info.durable_step, host.local.info.checkpoint_step) for host in here.hosts} == {(1, 1)}
    assert ["back at step 1" in _lines(host) for host in here.hosts] == [True] * 3
    here.push(5)
    oracle.update(model(5))
    here.assert_at("2.2", oracle)


def _lines(host: Any) -> str:
    return " ".join(line.text for line in host.server.registry.timeline("r").lines(0.0, 100))


def test_lost_host_takes_no_updates_alone(town: Callable[..., Town]) -> None:
    """Until all hosts have gone back, the one that lost its versions says so, reads as of its checkpoint, and takes
    nothing: whoever sends it an update sends that again, for nobody has to do anything about it."""
    here = town(2)
    here.push(1)
    here.checkpoint("c")
    here.push(2)
    here.hosts[0].stop()
    here.hosts[1].lose_power()
    here.deliver()
    info = here.hosts[1].local.info
    assert (info.status, info.version, info.checkpoint_step) == ("degraded", "1.1", 1)
    assert "go back together" in str(info.reason)
    with pytest.raises(Overloaded, match="go back together"):
        here.send(3, "u3", 1)
    here.hosts[0].restart()
    here.say_again()
    assert here.versions() == ["2.1", "2.1"]
    here.push(3)
    assert here.versions() == ["2.2", "2.2"]


@pytest.mark.parametrize("then", ["voted", "committed"])
def test_memory_that_is_gone(then: str, town: Callable[..., Town], model: Model, litema: type[LitEmaOracle]) -> None:
    """Memory that is gone while the machine is there, as of a container made anew, is lost as with the machine: also
    where a shard has voted for what lay there and the version before is on its disk."""
    here = town(2)
    here.checkpoint("c")
    if then == "voted":
        here.send(1, "u1", 1)
    else:
        here.push(1)
    host = here.hosts[1]
    memory = host.server.store.memory_files.folder  # type: ignore[union-attr]
    host.stop()
    shutil.rmtree(memory)
    host.server.start()
    host.start()
    here.deliver()
    oracle = litema(model(0))
    here.assert_at("2.0", oracle)
    here.push(1)
    oracle.update(model(1))
    here.assert_at("2.1", oracle)


def test_without_a_checkpoint_the_run_begins_anew(
    town: Callable[..., Town], model: Model, litema: type[LitEmaOracle]
) -> None:
    """Where no checkpoint was ever taken no host has weights, as on a server that decides alone; and a trainer may give
    the same weights again."""
    here = town(2)
    here.push(1)
    here.hosts[0].lose_power()
    here.deliver()
    for _ in range(2):
        assert [host.local.info.status for host in here.hosts] == ["awaiting_weights"] * 2
        assert [host.shard.record.revision for host in here.hosts if host.shard] == [3, 3], "once"
        for host in here.hosts:
            host.restart()
        here.deliver()
    with pytest.raises(AwaitingWeights):
        here.send(2, "u2", 0)
    here.push(0, "again")
    here.push(2)
    oracle = litema(model(0))
    oracle.update(model(2))
    here.assert_at("1.1", oracle)


def test_loss_is_noticed_before_the_first_checkpoint(
    tmp_path: Path, model: Model, ram_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host whose machine takes every row that was not synced still knows that there were weights: it would come up
    as a new one, and nothing would ever be decided."""
    here, synced = Town(tmp_path, 2, model, ram_dir), {}
    host = here.hosts[0]
    transaction = Catalog._transaction

    @contextlib.contextmanager
    def noted(catalog: Catalog, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        with transaction(catalog, durable=durable) as database:
            yield database
        if durable and catalog is host.server.store._catalog:  # type: ignore[union-attr]
            synced.update(host.medium())

    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "_transaction", noted)
        synced.update(host.medium())
        here.push(0)
        here.push(1)
    host.lose_power(synced)
    here.deliver()
    here.say_again()
    assert [each.local.info.status for each in here.hosts] == ["awaiting_weights"] * 2
    here.push(0, "again")
    assert here.versions() == ["1.0", "1.0"]
    here.close()


@pytest.mark.parametrize("rolled_back", [False, True], ids=["all rows", "old rows"])
def test_all_machines_go_down(
    rolled_back: bool, town: Callable[..., Town], model: Model, litema: type[LitEmaOracle]
) -> None:
    """Where all hosts lost what they had, they go back to what all have, whichever checkpoint each had taken last."""
    here, oracle = town(2), litema(model(0))
    here.push(1)
    oracle.update(model(1))
    here.checkpoint("c1")
    here.push(2)
    here.hosts[1].shard.checkpoints._saving = Never()  # type: ignore[union-attr]  # killed before it is written
    here.checkpoint("c2", settles=kept(here)[0].newer)
    mediums = [host.medium() if rolled_back else None for host in here.hosts]
    assert [each.newer - each.older for each in kept(here)] == [2, 0]
    here.push(3)
    for host, medium in zip(here.hosts, mediums, strict=True):
        host.lose_power(medium)
    here.deliver()
    here.say_again()
    here.assert_at("2.1", oracle)
    assert {each.older for each in kept(here)} == {each.newer for each in kept(here)}


class Never:
    """An executor that does nothing: the process is killed before."""

    def submit(self, *_: object) -> None:
        """Do nothing."""


def test_one_checkpoint_stays_until_all_have_the_next(
    town: Callable[..., Town], model: Model, litema: type[LitEmaOracle]
) -> None:
    """A checkpoint that one host could not write settles nothing: the one before stays on all, and there are two slots
    at most; the next one does."""
    here, oracle = town(2), litema(model(0))
    here.push(1)
    oracle.update(model(1))
    assert here.checkpoint("c1").committed
    first = kept(here)[0].newer
    here.push(2)
    here.hosts[1].shard.checkpoints._saving = Never()  # type: ignore[union-attr]
    assert here.checkpoint("c2", settles=first).committed
    second = kept(here)[0].newer
    here.hosts[1].restart()
    here.deliver()
    assert kept(here) == [Kept(first, second), Kept(first, first)]
    here.push(3)
    refused = here.checkpoint("c3", settles=second)
    assert not refused.committed
    assert "is not on this host" in refused.reason
    assert kept(here) == [Kept(first, second), Kept(first, first)]
    assert here.checkpoint("c4").committed
    third = kept(here)[0].newer
    assert kept(here) == [Kept(first, third)] * 2
    assert here.checkpoint("c5", settles=third).committed
    assert {each.older for each in kept(here)} == {third}
    for host in here.hosts:
        assert len(host.server.data_files("*/slots/*")) <= 2
    for step in (2, 3):
        oracle.update(model(step))
    here.hosts[0].lose_power()
    here.deliver()
    here.assert_at("2.3", oracle)


def test_checkpoint_of_no_weights(tmp_path: Path, model: Model, ram_dir: Path) -> None:
    """A checkpoint that is asked for before there are weights, or once they are gone, is in the way of none after."""
    here = Town(tmp_path, 2, model, ram_dir)
    assert here.checkpoint("c0").committed
    here.push(0)
    assert here.checkpoint("c1").committed
    assert {each.newer for each in kept(here)} == {3}
    here.close()


def test_checkpoint_is_refused_while_another_is_written(town: Callable[..., Town]) -> None:
    """There is never more than one checkpoint beside the settled one."""
    here = town(2)
    here.hosts[1].shard.checkpoints._saving = Never()  # type: ignore[union-attr]
    assert here.checkpoint("c1").committed
    here.push(1)
    refused = here.checkpoint("c2")
    assert "still being written" in refused.reason


class Stuck(Never):
    """An executor that is still at it."""

    def submit(self, *_: object) -> Future[None]:  # type: ignore[override]
        return Future()


def test_machine_goes_down_again_over_the_way_back(
    town: Callable[..., Town], model: Model, litema: type[LitEmaOracle]
) -> None:
    """A host whose machine takes what the host has voted for on the way back reads it again: its vote stands, and the
    others may have gone back by it."""
    here, oracle = town(2, decay=0.9), litema(model(0), decay=0.9)
    here.push(1)
    oracle.update(model(1))
    here.checkpoint("c")
    here.push(2)
    here.hosts[0].shard._saving = Stuck()  # type: ignore[union-attr]  # its checkpoint is being read
    here.hosts[1].lose_power()
    here.deliver()
    assert here.hosts[1].shard
    assert here.hosts[1].shard.record.vote
    here.hosts[1].lose_power()
    here.deliver()
    here.hosts[0].restart()
    here.deliver()
    here.say_again()

    here.assert_at("2.1", oracle)
    here.push(5)
    oracle.update(model(5))
    here.assert_at("2.2", oracle)


def test_damaged_checkpoint_gives_way_to_the_one_before(
    town: Callable[..., Town], model: Model, litema: type[LitEmaOracle]
) -> None:
    """Where one host cannot read the newest checkpoint, all go back to the one that is settled; where none can be read,
    nobody goes anywhere, and no bytes are given up."""
    here, oracle = town(2), litema(model(0))
    here.push(1)
    oracle.update(model(1))
    here.checkpoint("c1")
    here.push(2)
    here.checkpoint("c2", settles=kept(here)[0].newer)
    here.push(3)
    host = here.hosts[0]
    newest = here.hosts[0].server.registry.shard("r").on_disk._newest  # type: ignore[union-attr]
    assert newest
    for path in host.server.data_files(f"*/{newest.slot.name}/*"):
        path.write_bytes(b"")
    here.hosts[1].lose_power()
    here.deliver()
    here.assert_at("2.1", oracle)

    for path in host.server.data_files("*/slots/*/*"):
        path.write_bytes(b"")
    here.hosts[1].lose_power()
    here.deliver()
    here.say_again()
    assert str(host.local.version) == "2.1"
    assert "no checkpoint that all can go back to" in str(here.coordinator.fault)


def test_clean_stop_is_a_checkpoint(
    town: Callable[..., Town], model: Model, litema: type[LitEmaOracle], ram_dir: Path
) -> None:
    """Hosts that were stopped at one revision have a checkpoint of it, beside the settled one."""
    here, oracle = town(2), litema(model(0))
    here.push(1)
    oracle.update(model(1))
    here.checkpoint("c1")
    here.push(2)
    oracle.update(model(2))
    for host in here.hosts:
        host.server.stop()
    assert [path for path in ram_dir.glob("*/*") if path.name != "owner"] == []
    for host in here.hosts:
        assert len(host.server.data_files("*/slots/*")) <= 2
        host.server.start()
        host.start()
    here.deliver()
    here.push(3)
    here.hosts[1].lose_power()
    here.deliver()
    here.assert_at("2.2", oracle)


def going_back(here: Town, arm: Callable[[], None]) -> None:
    """A checkpoint, then a loss of power at host 1, while somebody is killed; and on."""
    here.push(1)
    here.checkpoint("c1")
    here.push(2)
    arm()
    here.checkpoint("c2", settles=kept(here)[0].newer)
    here.push(3, "orphan", only=[0])
    here.hosts[1].lose_power()
    here.deliver()
    here.replace_coordinator()
    here.say_again()
    here.push(4)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("over", ["checkpoint", "way back"])
def test_host_is_killed_on_the_way_back(
    over: str, place: int, point: str, town: Callable[..., Town], model: Model, litema: type[LitEmaOracle]
) -> None:
    """A host that is killed at any point of a checkpoint, or of the way back, comes back, and all are at one version
    that was checkpointed."""
    here, oracle = town(2), litema(model(0))

    def arm() -> None:
        if over == "checkpoint":
            here.hosts[place].kill_at = point
            return
        lose = here.hosts[1].lose_power

        def lose_and_arm() -> None:
            here.hosts[place].kill_at = point
            lose()

        here.hosts[1].lose_power = lose_and_arm  # type: ignore[method-assign]

    with here.hosts[place].living():
        going_back(here, arm)
    if str(here.hosts[0].local.version) != str(here.hosts[1].local.version) or here.hosts[0].local.version.step != 4:
        here.say_again()
        here.push(4)
    back = here.hosts[0].local.version.n - 1
    for step in range(1, back + 1):
        oracle.update(model(step))
    assert back in (1, 2)
    had_no_vote = (over, place) == ("way back", 1) and point.startswith("abort")
    assert here.hosts[place].kills == (0 if had_no_vote else 1)
    oracle.update(model(4))
    here.assert_at(f"2.{back + 1}", oracle)


@pytest.mark.parametrize("message", range(19))
def test_coordinator_is_killed_on_the_way_back(
    message: int, town: Callable[..., Town], model: Model, litema: type[LitEmaOracle]
) -> None:
    """A coordinator that ends between any two messages is followed by one that goes on."""
    here, oracle = town(2), litema(model(0))

    def arm() -> None:
        here.coordinator_dies = message

    going_back(here, arm)
    back = here.hosts[0].local.version.n - 1
    for step in (*range(1, back + 1), 4):
        oracle.update(model(step))
    assert here.deaths == 1
    here.assert_at(f"2.{back + 1}", oracle)
