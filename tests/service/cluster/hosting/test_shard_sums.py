"""Averages of other lengths as snapshots of a run on several hosts: of one version and one recipe, there on all hosts
or on none, whoever is killed where.

Knows hosts in one process (town.py), and what their catalogs and folders have. Does not know HTTP, or who asks.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ema_client.errors import VersionGone
from ema_client.protocol import Posthoc
from ema_service.averaging import SigmaRel
from ema_service.cluster import Answer, Rewind, RingKept, SnapshotBegun, SnapshotGone, SnapshotTaken, decode
from ema_service.cluster.hosting import shard_snapshots
from ema_service.cluster.reasons import error_of
from ema_service.runs.recipes import Recipe, read, text_of
from ema_service.runs.summing import Summing
from ema_service.storage.store import Store
from tests.service.cluster.town import POINTS, AtOnce, Host, Town
from tests.waiting import wait_until

Model = Callable[[int], dict[str, Tensor]]

SMALL = Posthoc(snapshots=3, sigma_rel=(0.03, 0.25))
HELD = SnapshotBegun("s", 5.0, "k", held=True)
UPDATES = 6
VERSION = f"1.{UPDATES}"


@pytest.fixture
def town(tmp_path: Path, model: Model, ram_dir: Path) -> Iterator[Callable[..., Town]]:
    """Make a town of so many hosts, whose run has a ring that all agree on, and some updates."""
    made: list[Town] = []

    def make(hosts: int = 2) -> Town:
        here = Town(tmp_path / str(len(made)), hosts, model, ram_dir, posthoc=SMALL)
        made.append(here)
        for step in range(UPDATES + 1):
            here.push(step)
            agree(here, f"ring {step}")
        return here

    yield make
    for each in made:
        each.close()


def agree(here: Town, key: str) -> None:
    """Have all hosts agree on the ring that the first one wants."""
    for host in here.hosts:
        wait_until(lambda host=host: ring(host).is_written)
    if wanted := ring(here.hosts[0]).wanted():
        assert here.change(key, RingKept(wanted[0], " ".join(wanted[1]))).committed


def ring(host: Host) -> Any:
    return host.server.registry.ring("r")


def recipe(host: Host, *, created_at: float = 5.0) -> Recipe:
    """How the average is worked out, of the version that a host holds."""
    assert host.shard
    held = host.shard.snapshots.held("s", created_at)
    [found] = host.server.registry.synthesiser("r").recipes([SigmaRel(0.1)], None, 0.9, held)
    return found


def taken(here: Town) -> SnapshotTaken:
    return SnapshotTaken("s", 5.0, recipe=text_of([recipe(here.hosts[0])]))


def ask(here: Town, key: str, change: SnapshotTaken | SnapshotGone) -> Answer:
    """Ask for a change until no host is writing, as whoever takes a snapshot does."""
    for number in range(100):
        answer = here.change(f"{key} {number}", change)
        if answer.committed or error_of(answer.reason).code != "overloaded":
            return answer
    raise AssertionError(answer)


def names(here: Town) -> list[list[str]]:
    return [[info.name for info in host.server.registry.snapshots("r").all()] for host in here.hosts]


def files(here: Town) -> list[list[bytes]]:
    """The bytes of the snapshot's files, by host."""
    return [[path.read_bytes() for path in host.server.data_files("*/snapshots/s/*")] for host in here.hosts]


def sums(here: Town, found: Recipe) -> list[bytes]:
    """What a recipe makes of the version that each host holds, worked out beside."""
    made = []
    for host in here.hosts:
        assert host.shard
        synthesiser, run = host.server.registry.synthesiser("r"), host.server.registry.get("r")
        held = host.shard.snapshots.held("s", 5.0)
        with contextlib.ExitStack() as opened:
            mixture = Summing(run, synthesiser, AtOnce()).opened(
                synthesiser.given(read(text_of([found])), held), opened
            )
            made.append(b"".join(bytes(mixture.read(e.begin, e.end)) for e in run.layout.shadows if e.begin < e.end))
    return made


def written(here: Town) -> list[bytes]:
    """The data of the snapshot, by host."""
    found = []
    for host in here.hosts:
        file, info = host.server.registry.snapshots("r").open("s")
        with contextlib.closing(file):
            found.append(file.read(0, file.header.data_bytes))
        assert (info.average, info.target, info.version, info.snapshot) == ("posthoc", "sigma_rel 0.1", VERSION, "s")
    return found


def test_an_average_is_of_one_version(town: Callable[..., Town]) -> None:
    """Of that which all had at the first change, though updates go on before the recipe is found, and the ring too."""
    here = town(3)
    assert here.change("b", HELD).committed
    here.push(UPDATES + 1)
    agree(here, "one more")
    found = recipe(here.hosts[0])
    assert {source.of is None for source in found.sources} == {True, False}
    expected = sums(here, found)
    here.push(UPDATES + 2)
    assert (names(here), files(here)) == ([[], [], []], [[], [], []])
    assert ask(here, "t", taken(here)).committed
    for _ in range(2):
        assert names(here) == [["s"]] * 3
        assert written(here) == expected
        for host in here.hosts:
            assert host.lines() == [("snapshot", None, None, "snapshot s of sigma_rel 0.1 taken")]
            host.restart()
        here.deliver()
    assert error_of(here.change("r", Rewind("s", 5.0)).reason).code == "invalid_request"
    assert error_of(here.change("b2", HELD._replace(created_at=6.0)).reason).code == "snapshot_exists"
    assert here.change("g", SnapshotGone("s", 5.0)).committed
    assert (names(here), files(here)) == ([[], [], []], [[], [], []])


@pytest.mark.parametrize("point", [each for each in POINTS if POINTS[each][0] not in ("vote", "put")])
@pytest.mark.parametrize(
    ("place", "change"),
    [
        (0, "begun"),
        (1, "taken"),
        *(pytest.param(*each, marks=pytest.mark.soak) for each in [(1, "begun"), (0, "taken")]),
    ],
)
def test_host_is_killed(place: int, point: str, change: str, town: Callable[..., Town]) -> None:
    """A host that is killed at any point of a change comes back with the snapshot that the others have; a version that
    a host held, and holds no more, is nobody's snapshot, and can be begun anew."""
    here = town(2)

    def reached(name: str) -> None:
        if name == change:
            here.hosts[place].kill_at = point
            if point.startswith("term"):
                here.replace_coordinator()

    reached("begun")
    here.change("b", HELD)
    here.say_again()
    try:
        change_to_be = taken(here)
        reached("taken")
        answer = ask(here, "t", change_to_be)
    except VersionGone:
        answer = None
    here.say_again()
    if answer is None or not answer.committed:
        assert change == "begun" or (change, point[:4]) == ("taken", "term"), answer
        assert answer is None or error_of(answer.reason).code == "version_gone"
        assert names(here) == [[], []]
        assert ask(here, "g", SnapshotGone("s", 5.0, begun=True)).committed
        here.say_again()
        assert files(here) == [[], []]
        again = HELD._replace(created_at=6.0)
        assert here.change("b2", again).committed
        found = text_of([recipe(here.hosts[0], created_at=6.0)])
        assert ask(here, "t2", SnapshotTaken("s", 6.0, recipe=found)).committed
        assert names(here) == [["s"], ["s"]]
        return
    assert names(here) == [["s"], ["s"]]
    assert here.hosts[place].kills == 1
    assert [[line[0] for line in host.lines()] for host in here.hosts] == [["snapshot"]] * 2


@pytest.mark.parametrize("messages", range(1, 7))
def test_coordinator_is_killed(messages: int, town: Callable[..., Town]) -> None:
    """At any of its messages of the second change: another one brings the change to all hosts."""
    here = town(2)
    here.change("b", HELD)
    found = recipe(here.hosts[0])
    expected = sums(here, found)
    here.coordinator_dies = messages
    assert ask(here, "t", taken(here)).committed
    here.say_again()
    assert here.deaths == 1
    assert names(here) == [["s"], ["s"]]
    assert written(here) == expected


def test_a_ring_that_moved_on(town: Callable[..., Town]) -> None:
    """A host that lacks a snapshot of the recipe says so, and nothing is left on any host."""
    here = town(2)
    assert here.change("b", HELD).committed
    change = taken(here)
    shelf = ring(here.hosts[1]).shelf
    shelf.drop(next(each for each in shelf.all if each.version == "1.4"))
    answer = ask(here, "t", change)
    assert (error_of(answer.reason).code, "1.4" in answer.reason) == ("version_gone", True), answer
    assert names(here) == [[], []]
    assert ask(here, "g", SnapshotGone("s", 5.0, begun=True)).committed
    assert files(here) == [[], []]


def test_a_recipe_of_another_version(town: Callable[..., Town]) -> None:
    """It is for other weights than those that are held, and nothing is written by it."""
    here = town(2)
    here.change("b", HELD)
    here.push(UPDATES + 1)
    [other] = here.hosts[0].server.registry.synthesiser("r").recipes([SigmaRel(0.1)], None, 0.9)
    answer = ask(here, "t", SnapshotTaken("s", 5.0, recipe=text_of([other])))
    assert (error_of(answer.reason).code, names(here)) == ("version_gone", [[], []])


def test_a_full_disk(town: Callable[..., Town], monkeypatch: pytest.MonkeyPatch) -> None:
    """On one host: nobody finds the snapshot, and nothing is left of it once it is given up."""
    here = town(2)
    full = here.hosts[1].server.store

    def check_room(store: Store, _: int) -> None:
        if store is full:
            raise OSError(28, "No space left on device")

    assert here.change("b", HELD).committed
    with monkeypatch.context() as patch:
        patch.setattr(Store, "check_room", check_room)
        answer = ask(here, "t", taken(here))
    assert error_of(answer.reason).code == "storage_failed"
    assert names(here) == [[], []]
    assert ask(here, "g", SnapshotGone("s", 5.0, begun=True)).committed
    assert files(here) == [[], []]


def test_a_version_is_not_held_for_ever(town: Callable[..., Town], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody brings a recipe, where another one is begun under the name, and where the snapshot is given up."""
    here = town(2)
    monkeypatch.setattr(shard_snapshots, "_HELD_SECONDS", 3600.0)
    held: list[Any] = []

    def hold(key: str, created_at: float) -> None:
        here.change(key, HELD._replace(created_at=created_at))
        states = [host.shard.snapshots.held("s", created_at) for host in here.hosts if host.shard]
        held.extend(weakref.ref(state.arenas[0]) for state in states)
        here.push(UPDATES + len(held) // 2)

    hold("b", 5.0)
    hold("b2", 6.0)
    assert [ref() is None for ref in held] == [True, True, False, False]
    ask(here, "g", SnapshotGone("s", 6.0, begun=True))
    assert [ref() is None for ref in held] == [True] * 4
    monkeypatch.setattr(shard_snapshots, "_HELD_SECONDS", 0.01)
    here.change("b3", HELD._replace(created_at=7.0))
    for host in here.hosts:
        wait_until(lambda host=host: not _holds(host, 7.0), "the end of the holding")
    answer = ask(here, "t", SnapshotTaken("s", 7.0, recipe="x"))
    assert error_of(answer.reason).code == "version_gone"


def _holds(host: Host, created_at: float) -> bool:
    assert host.shard
    try:
        return bool(host.shard.snapshots.held("s", created_at))
    except VersionGone:
        return False


def test_a_run_without_a_ring(tmp_path: Path, model: Model) -> None:
    """No version of it is held for what cannot be worked out."""
    here = Town(tmp_path / "t", 2, model)
    here.push(0)
    assert error_of(here.change("b", HELD).reason).code == "invalid_request"
    here.close()


def test_changes_of_an_earlier_server_are_read() -> None:
    """They stand in records, and said nothing of recipes."""
    assert decode('{"snapshotbegun":{"name":"s","created_at":5.0,"key":"k"}}', SnapshotBegun).held is False
    assert decode('{"snapshottaken":{"name":"s","created_at":5.0,"gone":""}}', SnapshotTaken).recipe == ""
