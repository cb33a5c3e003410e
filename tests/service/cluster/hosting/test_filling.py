"""A host that is filled from its twin, with whichever averages that one has by then: bit for bit, and for good.

Knows two hosts of one process (town.py), of which one lends by calls. Does not know HTTP (test_lending), or when a host
is left behind (test_twin_decisions).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ema_client.errors import Overloaded, RunDegraded, Superseded
from ema_client.protocol import AverageConfig, to_json
from ema_service.cluster import (
    Ask,
    AverageAdded,
    AverageRemoved,
    Proposal,
    Propose,
    Resolve,
    Seating,
    Term,
    Ticket,
    encode,
)
from ema_service.cluster.hosting import shard_run
from ema_service.cluster.hosting.borrowing import Copied
from ema_service.memory import Arena
from ema_service.persistence.rows import dump, dump_setup, read_setup, version_of
from ema_service.runs import Run, Setup, State
from ema_service.runs.room import Needs
from tests.service.cluster.town import Host, Killed, Town

Model = Callable[[int], dict[str, Tensor]]

TERM = Term(9, "c9")
LONG = AverageAdded(json.dumps(to_json(AverageConfig("long", decay=0.5))), "l1")
OTHER = AverageAdded(json.dumps(to_json(AverageConfig("other", schedule="power", gamma=6.0))), "l2")
LONG_AGAIN = AverageAdded(LONG.config, "l3")
#: What became of the averages of the twin meanwhile, each change before one more update.
STORIES: dict[str, list[AverageAdded | AverageRemoved]] = {
    "none": [],
    "added": [LONG, OTHER],
    "removed": [LONG, AverageRemoved("ema")],
    "added again": [LONG, AverageRemoved("long"), LONG_AGAIN],
}


class Lending:
    """A twin that lends what a host has, by calls. fault: raised in place of the next copy, once."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.fault: BaseException | None = None

    def snapshots(self, _: str) -> list[dict[str, Any]]:
        return []

    def averages(self, run: Run, _: str) -> Setup:
        return read_setup(run.ledger.setup.created, dump_setup(self._host.local.run.ledger.setup))

    def copy(self, run: Run, _: str) -> Copied:
        fault, self.fault = self.fault, None
        if fault:
            raise fault
        state = self._host.local.state
        version = version_of(dump(state, final=False), run.ledger.setup)
        arenas = []
        for arena in state.arenas:
            landing = run.memory.landing(run.layout.shadow_bytes)
            landing.data[:] = self._host.local.run.memory.to_host(arena.data).data
            arenas.append(Arena(run.layout, run.memory.to_device(landing)))
        return Copied(self._host.local.run.ledger.outcome(), State(version, tuple(arenas)))


class Pair:
    """A host that was left behind, and its twin, which goes on."""

    def __init__(self, folder: Path, model: Model, ram_dir: Path | None) -> None:
        durability = "disk" if ram_dir is None else "process"
        self.towns = [Town(folder / name, 1, model, ram_dir, durability=durability) for name in ("twin", "behind")]
        self.twin, self.behind = (town.hosts[0] for town in self.towns)
        self.lending = self.behind.twin = Lending(self.twin)
        self._seatings = 0
        for town in self.towns:
            town.push(0)
            town.push(1)
        self.behind.restart()

    def go_on(self, changes: list[AverageAdded | AverageRemoved]) -> None:
        """The twin makes each change, and an update after it."""
        for number, change in enumerate(changes):
            assert self.towns[0].change(f"k{number}", change).committed
            self.towns[0].push(2 + number)

    def leave_behind(self) -> None:
        """The host is told that the others go on without it."""
        self._seatings += 1
        with self.behind.living():
            self._hear(Ask(0, TERM, Seating(TERM, self._seatings, "0")))

    def fill(self) -> None:
        """The host returns, as often as it takes."""
        self.leave_behind()
        for _ in range(4):
            with self.behind.living():
                self._return()
            if not self.record.seating.absent:
                return
        pytest.fail(f"the host is not filled: {self.record}")

    def _return(self) -> None:
        """Propose the return of the host, unless it has voted for that, and commit it."""
        if self.record.vote is None or self.record.vote.proposal.seating is None:
            self._seatings += 1
            key = f"return-{self._seatings}"
            proposal = Proposal(Ticket(self.twin_revision, None, key), "", seating=Seating(TERM, self._seatings))
            self._hear(Propose(0, TERM, proposal))
        self._hear(Resolve(0, TERM, self.record.edition, committed=True))

    def update(self, step: int) -> None:
        """An update of both, which are in step."""
        self.towns[0].push(step)
        assert self.behind.shard
        self.towns[1].send(step, f"u{step}", 0)
        self._hear(Resolve(0, TERM, self.record.edition, committed=True))

    def propose(self, key: str, change: AverageAdded) -> None:
        """Have the host that is to be left behind vote for a change."""
        self._hear(Ask(0, TERM))
        self._hear(Propose(0, TERM, Proposal(Ticket(self.record.revision, None, key), encode(change))))
        assert self.record.vote

    def assert_same(self) -> None:
        """Both have the same averages, to be and by now, of the same bytes."""
        setups = [dump_setup(host.local.run.ledger.setup) for host in (self.twin, self.behind)]
        assert setups[1] == setups[0]
        assert self.behind.local.run.ledger.outcome() == self.twin.local.run.ledger.outcome()
        assert self.behind.local.bytes() == self.twin.local.bytes()

    @property
    def record(self) -> Any:
        assert self.behind.shard
        return self.behind.shard.record

    @property
    def twin_revision(self) -> int:
        assert self.twin.shard
        return self.twin.shard.record.revision

    def _hear(self, message: Ask | Propose | Resolve) -> None:
        assert self.behind.shard
        self.behind.shard.reporting.hear(message)


@pytest.fixture(params=["slots", "memory files"])
def pair(request: pytest.FixtureRequest, tmp_path: Path, model: Model, ram_dir: Path) -> Iterator[Pair]:
    """Two hosts in step."""
    made = Pair(tmp_path, model, ram_dir if request.param == "memory files" else None)
    yield made
    for town in made.towns:
        town.close()


def test_a_damaged_host_is_filled(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it cannot read its twin has, and it takes updates again. Before that it tells senders to come again, and
    that an operator is needed only where it was not left behind for long."""
    pair.behind.damage()
    assert pair.behind.local.info.status == "degraded"
    with pytest.raises(Overloaded, match="run 'r'"):
        pair.towns[1].send(2, "u2", 0)
    with monkeypatch.context() as patch:
        patch.setattr(shard_run, "_LEFT_BEHIND_SECONDS", 0.0)
        with pytest.raises(RunDegraded):
            pair.towns[1].send(2, "u2", 0)
    pair.fill()
    assert pair.behind.local.info.status == "ready"
    pair.assert_same()
    pair.behind.restart()
    pair.update(8)
    pair.assert_same()


def test_an_update_that_a_return_came_before_is_sent_again(pair: Pair) -> None:
    """Its slice has to come to the host that counts again, too: nobody but its sender has it."""
    shard, town = pair.twin.shard, pair.towns[0]
    assert shard
    shard.reporting.hear(Ask(0, TERM, Seating(TERM, 1, "1")))
    sent = town.send(2, "u2", 0)
    returning = Proposal(Ticket(pair.twin_revision, None, "return-1"), "", seating=Seating(TERM, 2))
    shard.reporting.hear(Propose(0, TERM, returning))
    for committed in (False, True):
        shard.reporting.hear(Resolve(0, TERM, shard.record.edition, committed=committed))
    assert sent
    with pytest.raises(Superseded):
        sent.result(0)


def files(host: Host, average: str) -> int:
    """How many files of an average a host has."""
    return len([*host.server.folder.rglob(f"*{average}*")]) if host.server.folder else 0


@pytest.mark.parametrize("story", STORIES)
def test_a_host_has_the_averages_of_its_twin(story: str, pair: Pair) -> None:
    """Whichever it had: those that the twin has, their weights, and room for them; after restarts too, and from update
    to update. None of the others' files is left."""
    pair.go_on(STORIES[story])
    pair.fill()
    pair.assert_same()
    for step in (8, 9):
        pair.behind.restart()
        pair.assert_same()
        pair.update(step)
        pair.assert_same()
    for name in ("ema", "long", "other"):
        assert bool(files(pair.behind, name)) == bool(files(pair.twin, name)), name


@pytest.mark.parametrize(
    "story", [pytest.param(story, marks=[] if story == "removed" else pytest.mark.soak) for story in STORIES]
)
@pytest.mark.parametrize(
    "point",
    [
        "bytes written, no row",
        "vote in the row, report not sent",
        "verdict read, no row",
        "commit in the row, not assigned",
        "assigned, not answered",
        "nothing copied",
    ],
)
def test_a_host_is_killed_while_it_is_filled(point: str, story: str, pair: Pair) -> None:
    """At any point; it is filled then, or has been."""
    pair.go_on(STORIES[story])
    pair.leave_behind()
    if point == "nothing copied":
        pair.lending.fault = Killed()
    else:
        pair.behind.kill_at = point
    pair.fill()
    assert pair.behind.kills == 1
    pair.assert_same()
    pair.behind.restart()
    pair.update(8)
    pair.assert_same()


@pytest.mark.parametrize("made", [True, False])
def test_a_host_had_voted_for_an_average(made: bool, pair: Pair) -> None:
    """Which its twin has by now, or never will: it has what its twin has, and gives back the room that it took, also
    where there is no memory for that room twice."""
    pair.propose("k0", LONG)
    in_files = pair.behind.server.ram_dir is not None
    needs = Needs.of(pair.behind.local.run.layout, 2, on_host=True, in_files=in_files, measured=True)
    pair.behind.server.memory.budget.limit = needs.resident + needs.push
    pair.go_on([LONG] if made else [])
    pair.fill()
    pair.assert_same()
    assert bool(files(pair.behind, "long")) == made
    pair.behind.restart()
    pair.update(8)
    pair.assert_same()


def test_a_copy_that_fails_is_made_again(pair: Pair) -> None:
    """Although the host has the twin's averages by then, and nothing else."""
    pair.go_on(STORIES["removed"])
    pair.lending.fault = Overloaded("the twin lends nothing", retry_after=1.0)
    pair.fill()
    assert pair.lending.fault is None
    pair.assert_same()
