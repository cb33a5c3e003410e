"""Going on after damage: a host's file is damaged, or its data dir is an older copy, and an operator says what all
hosts go back to, all of them or none.

Knows hosts with data dirs (town.py), and how their files are damaged. Does not know HTTP, or who asks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from torch import Tensor

from ema_client.errors import RunDegraded
from ema_service.cluster import Adjustment, Answer, Rewind, SnapshotBegun, SnapshotTaken
from ema_service.cluster.reasons import error_of
from tests.service.cluster.town import POINTS, Host, Town

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle

Model = Callable[[int], dict[str, Tensor]]
#: The snapshot that is taken at update 1.
BACK = Rewind("s", 5.0, "1.1", 1)


@pytest.fixture(params=["slots", "memory files"])
def town(request: pytest.FixtureRequest, tmp_path: Path, model: Model, ram_dir: Path) -> Iterator[Callable[..., Town]]:
    """Make a town of so many hosts, with its initial weights, an update, a snapshot of that, and another update."""
    made: list[Town] = []

    def make(hosts: int = 2) -> Town:
        memory = ram_dir if request.param == "memory files" else None
        here = Town(tmp_path / str(len(made)), hosts, model, memory, decay=0.9)
        made.append(here)
        here.push(0)
        here.push(1)
        assert here.change("b", SnapshotBegun("s", 5.0, "k")).committed
        assert here.change("t", SnapshotTaken("s", 5.0)).committed
        here.push(2)
        return here

    yield make
    for each in made:
        each.close()


@pytest.fixture
def oracle(model: Model, litema: type[LitEmaOracle]) -> LitEmaOracle:
    """What the snapshot holds."""
    found = litema(model(0), decay=0.9)
    found.update(model(1))
    return found


def damage(host: Host) -> None:
    """The host finds its version damaged."""
    host.damage()
    host.town.deliver()
    assert host.local.info.status == "degraded"


def older_copy(host: Host, act: Callable[[], None]) -> None:
    """The host's data dir is replaced by one of before ``act``, and the coordinator is started anew."""
    folder = host.server.folder
    assert folder
    copied = folder.with_name(f"{folder.name}.copy")
    shutil.copytree(folder, copied, ignore=shutil.ignore_patterns("*-shm"))
    act()
    host.stop()
    shutil.rmtree(folder)
    copied.rename(folder)
    host.server.start()
    host.start()
    host.town.replace_coordinator()


def word(here: Town, change: Rewind | str = BACK, key: str = "w") -> Answer:
    """An operator says what all go back to."""
    return here.change(key, change, mends=True)


def goes_on(here: Town, version: str, model: Model, oracle: LitEmaOracle) -> None:
    """The next update is LitEma's too."""
    here.push(7)
    oracle.update(model(7))
    here.assert_at(version, oracle)


@pytest.mark.parametrize("place", [0, 2])
def test_all_go_back_to_a_snapshot(place: int, town: Callable[..., Town], model: Model, oracle: LitEmaOracle) -> None:
    """A file of one host is damaged: nothing is decided, and that is told, until somebody names a snapshot. Then all
    are there, bit for bit, in an epoch of its own; once, however often it is said."""
    here = town(3)
    damage(here.hosts[place])
    assert here.coordinator.fault == (
        f"the versions of shard {place} are damaged: an operator says what all shards go back to"
    )
    with pytest.raises(RunDegraded):
        here.send(3, "u3", place)
    here._say(here.coordinator.propose("k", "decay"))
    here.deliver()
    assert [str(here.hosts[each].local.version) for each in range(3) if each != place] == ["1.2", "1.2"]

    assert word(here).committed
    assert here.coordinator.fault is None
    here.assert_at("2.0", oracle)
    assert ["rewound to snapshot s" in host.lines()[-1][3] for host in here.hosts] == [True] * 3
    here.answers.clear()
    word(here)
    assert here.versions() == ["2.0"] * 3
    goes_on(here, "2.1", model, oracle)


def test_an_older_copy_goes_back_with_the_others(town: Callable[..., Town], oracle: LitEmaOracle) -> None:
    """A host's data dir is an older copy: its shard takes the snapshot as its next revision, as the others do, and what
    the others know of trainers and keys is what all know."""
    here = town()
    if here.ram_dir:
        pytest.skip("a copy of a data dir has no memory files: its host comes up lost")
    older_copy(here.hosts[1], lambda: [here.push(step) for step in (3, 4)] and here.change("a", Adjustment("writer")))
    assert "is its data dir an older copy?" in str(here.coordinator.fault)

    assert word(here).committed
    assert {host.shard.record.revision for host in here.hosts if host.shard} == {here.hosts[0].shard.record.revision}
    assert {host.local.run.ledger.writer for host in here.hosts} == {1}
    here.assert_at("2.0", oracle)


def test_a_word_that_cannot_be_obeyed(town: Callable[..., Town]) -> None:
    """A snapshot that one host cannot read is refused, with its error, and the next word counts."""
    here = town()
    for path in here.hosts[0].server.data_files("*/snapshots/s/*"):
        path.write_bytes(b"")
    damage(here.hosts[1])

    assert error_of(word(here).reason).code == "snapshot_damaged"
    assert error_of(word(here, Rewind("other", 6.0), "w2").reason).code == "snapshot_not_found"
    assert {host.local.info.status for host in here.hosts} == {"ready", "degraded"}


def test_the_newest_version_that_all_have(town: Callable[..., Town], model: Model, litema: type[LitEmaOracle]) -> None:
    """Without a snapshot's name all go on with the newest checkpoint that all can read; where each version lies in a
    slot alone there is none that all have kept."""
    here, oracle = town(), litema(model(0), decay=0.9)
    if here.ram_dir:
        assert here.checkpoint("c").committed
    here.push(3)
    damage(here.hosts[0])

    shard = here.hosts[1].shard
    assert shard
    with shard.expecting("w", lambda: "made here") as made:
        told = word(here, "")
    assert made.done() is told.committed
    if not here.ram_dir:
        assert error_of(told.reason).code == "run_degraded"
        assert "no version that all hosts can read" in error_of(told.reason).detail
        return
    assert told.committed
    for step in (1, 2):
        oracle.update(model(step))
    here.assert_at("2.2", oracle)
    assert all("was accepted" in str(host.lines()) for host in here.hosts)
    assert all("back at step 2" in str(host.lines()) for host in here.hosts)
    goes_on(here, "2.3", model, oracle)
    here.answers.clear()
    assert error_of(word(here, "", "w2").reason).code == "invalid_request"


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("place", [0, 1])
def test_a_host_is_killed_over_a_word(
    place: int, point: str, town: Callable[..., Town], model: Model, oracle: LitEmaOracle
) -> None:
    """At any point, the damaged one or another: all come to the snapshot, once."""
    here = town()
    damage(here.hosts[1])
    here.hosts[place].kill_at = point
    with here.hosts[place].living():
        word(here)
    here.calm()
    here.say_again()

    assert word(here, key="w").committed or "applied before" in word(here, key="w").reason
    here.assert_at("2.0", oracle)
    goes_on(here, "2.1", model, oracle)


@pytest.mark.parametrize("message", range(8))
def test_the_coordinator_is_killed_over_a_word(
    message: int, town: Callable[..., Town], model: Model, oracle: LitEmaOracle
) -> None:
    """Between any two messages: its successor sees the word through, or hears it again."""
    here = town()
    damage(here.hosts[0])
    here.coordinator_dies = message
    word(here)
    here.coordinator_dies = None
    here.say_again()

    here.assert_at("2.0", oracle)
    goes_on(here, "2.1", model, oracle)


def test_what_was_voted_for_is_damaged(town: Callable[..., Town], oracle: LitEmaOracle) -> None:
    """A host's vote stands whose version cannot be read: others may have committed it. It is committed there too, and
    waits for a word."""
    here = town()
    here.hosts[1].kill_at = "report sent, verdict not read"
    here.push(3, "orphan", only=[1])
    damage(here.hosts[1])
    here.push(3, "orphan", only=[0])

    assert word(here).committed
    here.assert_at("2.0", oracle)
