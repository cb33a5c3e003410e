"""A run over several hosts in one process: bit-identical to LitEma, whoever is killed where; all hosts or none.

Knows hosts with data dirs, their coordinator and trainers (town.py). Does not know HTTP, or processes of their own.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from ema_client.errors import (
    AverageNotFound,
    Conflict,
    Fenced,
    InvalidRequest,
    NonFinite,
    RunDegraded,
    RunExists,
    StaleStep,
    StepConflict,
    StorageFailed,
    Superseded,
)
from ema_client.protocol import AverageConfig, RunConfig
from ema_service.cluster import (
    Adjustment,
    Answer,
    Ask,
    Checkpoint,
    Proposal,
    Record,
    Refusal,
    Report,
    SnapshotBegun,
    SnapshotGone,
    SnapshotTaken,
    Ticket,
    decode,
    encode,
)
from ema_service.cluster.hosting import ShardRun
from ema_service.cluster.reasons import error_of
from ema_service.persistence import ShardMemoryVersions
from ema_service.persistence.releasing import release
from ema_service.runs import Parameters, Run, State, Write
from ema_service.storage import ShardRow, open_store
from ema_service.storage.catalog import Catalog
from tests.service.cluster.town import POINTS, Town, result, slices
from tests.service.conftest import LocalRun, specs_of

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle
    from tests.service.conftest import LocalServer

Model = Callable[[int], dict[str, Tensor]]
MakeTown = Callable[..., Town]


#: Changes that leave the version as it is, as they follow each other.
BESIDE = (SnapshotBegun("s", 5.0, "k"), SnapshotTaken("s", 5.0), SnapshotGone("s", 5.0))
#: Versions of durability ``process`` lie in memory files where there are such, else in slots.
KEPT = pytest.mark.parametrize("kept", ["slots", "memory files"], indirect=True)


@pytest.fixture
def kept(request: pytest.FixtureRequest, ram_dir: Path) -> Path | None:
    """Where versions lie: the folder of memory files; None for slots, as without KEPT."""
    return ram_dir if getattr(request, "param", "slots") == "memory files" else None


@pytest.fixture
def town(tmp_path: Path, model: Model, kept: Path | None) -> Iterator[MakeTown]:
    """Make a town of so many hosts, with its initial weights."""
    made: list[Town] = []

    def make(hosts: int = 2, **config: Any) -> Town:
        made.append(Town(tmp_path / str(len(made)), hosts, model, kept, **config))
        made[-1].push(0)
        return made[-1]

    yield make
    for each in made:
        each.close()


def agree(town: Town) -> None:
    """The oracle of what all hosts must have in common, in memory and in their catalogs."""
    facts, records = [], []
    for host in town.hosts:
        version = host.local.version
        facts.append((str(version), version.lineage, version.step, version.num_updates, version.keys))
        assert host.server.folder
        with closing(sqlite3.connect(host.server.folder / "catalog.db")) as catalog:
            [(text,)] = catalog.execute("SELECT record FROM shards").fetchall()
            rows = catalog.execute("SELECT revision FROM checkpoints").fetchall()
        record = decode(text, Record)
        assert max(revision or 0 for (revision,) in rows) <= record.revision + (1 if record.vote else 0)
        records.append((record.revision, record.made))
    assert len(set(facts)) == 1, facts
    assert len(set(records)) == 1, records


def assert_same(town: Town, oracle: LitEmaOracle) -> None:
    """The hosts agree, and have together, bit for bit, what LitEma has; and so once all were killed."""
    for _ in range(2):
        agree(town)
        found = town.shadows()
        assert found.keys() == oracle.shadow.keys()
        for name, shadow in oracle.shadow.items():
            assert torch.equal(found[name], shadow), name
        for host in town.hosts:
            host.restart()
        town.deliver()


# --- updates --------------------------------------------------------------------------------------------------------


@KEPT
@pytest.mark.parametrize("hosts", [1, 2, 3, 4])
@pytest.mark.parametrize("durability", ["process", "disk"])
def test_updates_are_litemas(
    hosts: int, durability: str, town: MakeTown, model: Model, litema: type[LitEmaOracle]
) -> None:
    """Updates whose slices go to several hosts make what LitEma makes of the whole, with one version on all."""
    here, oracle = town(hosts, durability=durability), litema(model(0))
    for step in range(1, 6):
        answers = [result(answer) for answer in here.push(step)]
        oracle.update(model(step))
        assert {(a.applied, a.step, a.num_updates, a.version) for a in answers} == {(True, step, step, f"1.{step}")}
    assert_same(here, oracle)


def test_several_averages(town: MakeTown, model: Model, litema: type[LitEmaOracle]) -> None:
    """Each average of a run is on all hosts."""
    here = town(2, averages=(AverageConfig("ema"), AverageConfig("fast", decay=0.5)))
    oracles = {"ema": litema(model(0)), "fast": litema(model(0), decay=0.5)}
    for step in range(1, 4):
        here.push(step)
        for oracle in oracles.values():
            oracle.update(model(step))
    for host, place in zip(here.hosts, range(2), strict=True):
        for name, oracle in oracles.items():
            expected = slices(oracle.shadow, 2)[place]
            assert all(torch.equal(host.local.shadows(name)[each], expected[each]) for each in expected)


def test_nothing_counts_before_all_have_it(town: MakeTown) -> None:
    """A vote changes nothing that readers see, holds no lock, and has no answer before the last host's."""
    here = town(3)
    futures = [here.send(1, "u", place) for place in (0, 1)]
    here.deliver()
    for host in here.hosts:
        assert str(host.local.version) == "1.0"
        assert not host.local.run._lock.locked()
    assert [future and future.done() for future in futures] == [False, False]
    last = here.send(1, "u", 2)
    here.deliver()
    assert last
    assert [future and future.result(0).applied for future in (*futures, last)] == [True] * 3
    assert here.versions() == ["1.1"] * 3


@KEPT
def test_slices_again(town: MakeTown) -> None:
    """A slice again is answered by its step, by the vote under way, or as a conflict where its bytes are others; an
    older step is stale, also after all hosts were killed."""
    here = town(2)
    first = here.send(1, "u", 0)
    again = here.send(1, "u", 0)
    assert here.hosts[0].shard
    run = here.hosts[0].local
    with pytest.raises(StepConflict, match="step 1"):
        here.hosts[0].shard.push(run.run.begin(1, run.staged(here.parts(9)[0])), "u")
    here.push(1, "u")
    assert first
    assert again
    assert [each.result(0).applied for each in (first, again)] == [True, True]
    here.push(2)
    for host in here.hosts:
        host.restart()
    here.deliver()
    assert [answer.applied for answer in here.push(2)] == [False, False]
    with pytest.raises(StaleStep):
        here.send(1, "late", 0)
    assert here.versions() == ["1.2", "1.2"]


@KEPT
def test_other_bytes_after_a_restart(town: MakeTown) -> None:
    """Other bytes under the ticket of a vote are a conflict also for a shard that was killed since."""
    here = town(2)
    here.send(1, "u", 0)
    here.hosts[0].restart()
    with pytest.raises(StepConflict, match="step 1"):
        here.send(1, "u", 0, seed=9)


def test_answer_is_of_its_version(town: MakeTown, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is late tells the version that its update made, not a later one's."""
    here = town(2)
    late: list[Answer] = []
    shard = here.hosts[0].shard
    assert shard
    answer = shard.answer
    with monkeypatch.context() as patch:
        patch.setattr(shard, "answer", late.append)
        sent = [here.send(1, "u1", place) for place in (0, 1)]
        here.deliver()
        sent += [here.send(2, "u2", place) for place in (0, 1)]
        here.deliver()
    for each in late:
        answer(each)
    assert [future.result(0).version for future in sent if future] == ["1.1", "1.1", "1.2", "1.2"]


def test_answer_of_a_run_that_is_damaged(town: MakeTown, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that is committed while its run is found damaged has the error as answer; it counts all the same."""
    here = town(2)

    def damaged(*_: object, **__: object) -> None:
        raise RunDegraded("found damaged")

    monkeypatch.setattr(here.hosts[0].local.run, "result", damaged)
    sent = [here.send(1, "u", place) for place in (0, 1)]
    here.deliver()
    assert sent[0]
    with pytest.raises(RunDegraded, match="found damaged"):
        sent[0].result(0)
    assert here.versions() == ["1.1", "1.1"]
    agree(here)


def test_initial_weights_again(town: MakeTown) -> None:
    """The same initial weights again change nothing."""
    here = town(2)
    here.push(0, "again")
    assert here.versions() == ["1.0", "1.0"]


def test_refused_on_one_is_refused_on_all(tmp_path: Path, model: Model) -> None:
    """NaN in one host's slice is told to every slice's sender by the name of the tensor, and changes nothing."""

    def spoiled(seed: int) -> dict[str, Tensor]:
        tensors = model(seed)
        if seed == 2:
            tensors["conv.weight"][-1] = float("nan")
        return tensors

    here = Town(tmp_path, 2, spoiled)
    here.push(0)
    here.push(1)
    sent = here.send(2, "u2", 0)
    with pytest.raises(NonFinite, match=r"conv\.weight"):
        here.send(2, "u2", 1)
    here.deliver()
    assert sent
    with pytest.raises(NonFinite, match=r"conv\.weight"):
        sent.result(0)
    assert here.push(3)
    assert here.versions() == ["1.2", "1.2"]
    agree(here)
    here.close()


def test_slices_of_two_trainers(town: MakeTown, model: Model, litema: type[LitEmaOracle]) -> None:
    """Two trainers' slices of one step are never one update: the one that waits long takes the other's place."""
    here, oracle = town(2), litema(model(0))
    ours, theirs = here.send(1, "ours", 0), here.send(1, "theirs", 1, seed=7)
    here.deliver()
    assert ours
    assert theirs
    assert not ours.done()
    waiting = here.send(1, "ours", 1)
    here.deliver()
    assert not ours.done()
    here.overdue()
    assert waiting
    assert [each.result(0).applied for each in (ours, waiting)] == [True, True]
    with pytest.raises(Superseded):
        theirs.result(0)
    oracle.update(model(1))
    assert_same(here, oracle)


# --- changes --------------------------------------------------------------------------------------------------------


@KEPT
def test_changes(town: MakeTown, model: Model, litema: type[LitEmaOracle]) -> None:
    """A decay, a reset and a trainer that takes over come to all hosts, once each, and outlive all of them."""
    here, oracle = town(2, decay=0.9), litema(model(0), decay=0.9)
    here.push(1)
    oracle.update(model(1))
    for _ in range(2):
        here.change("k1", Adjustment("decay", 0.25))
    here.change("k2", Adjustment("reset"))
    oracle.decay, oracle.num_updates = torch.tensor(0.25), torch.tensor(0, dtype=torch.int)
    here.push(2)
    oracle.update(model(2))
    assert_same(here, oracle)

    assert here.change("k3", Adjustment("writer")).committed
    for restarted in (False, True):
        for host in here.hosts:
            if restarted:
                host.restart()
            assert host.local.run.ledger.writer == 1
            assert host.local.run.ledger.next_writer("k3") == 1, "the call that comes again gives the same number"
            with pytest.raises(Fenced):
                here.send(3, "old", host.place)
            assert host.lines() == [
                ("decay_changed", 1, 1, "decay of ema set to 0.25"),
                ("reset", 1, 0, "the warm-up begins anew"),
                ("writer", 2, 1, "trainer 1 took over"),
            ]
    agree(here)


def test_change_that_is_refused(town: MakeTown) -> None:
    """A change that a host refuses is made on none, and its sender gets the reason; so is one that nobody knows."""
    here = town(2)
    for key, change, fault in (
        ("k1", Adjustment("decay", 2.0), InvalidRequest),
        ("k2", Adjustment("decay", 0.5, "other"), AverageNotFound),
        ("k3", Adjustment("decay"), InvalidRequest),
        ("k4", Adjustment("forget"), InvalidRequest),
        ("k5", "no JSON", InvalidRequest),
        ("k6", '{"adjustment":{"kind":"decay","decay":"much","average":null}}', InvalidRequest),
        ("k7", '{"adjustment":{"kind":"reset","decay":null,"average":null,"more":1}}', InvalidRequest),
    ):
        answer = here.change(key, change)
        assert not answer.committed
        assert type(error_of(answer.reason)) is fault
    here.push(1)
    assert here.versions() == ["1.1", "1.1"]
    agree(here)


def test_hosts_that_differ_decide_nothing(town: MakeTown) -> None:
    """Where a host's run is another than the others', by a defect or a mistaken copy, every write ends with an error
    that says so, and nothing is proposed without end."""
    here = town(2, decay=0.9)
    here.push(1)
    run = here.hosts[1].local.run
    state = run.ready_state()
    run.moving_to(State(replace(state.version, num_updates=7), state.arenas), None).put()
    sent = here.hosts[0].sent
    answer = here.change("k", Adjustment("decay", 0.5))
    faults = [error_of(answer.reason), *here.push(2)]
    assert [type(each) for each in faults] == [Conflict] * 3
    assert all("shards 0 against 1" in str(each) for each in faults)
    assert here.versions() == ["1.1", "1.1"]
    assert [host.shard.record.vote for host in here.hosts if host.shard] == [None, None]
    assert here.hosts[0].sent - sent < 20


def test_change_that_is_judged_late(town: MakeTown) -> None:
    """A change for a revision that is over is neither voted for nor refused: it comes again for the next."""
    here = town(2)
    host = here.hosts[0]
    assert host.shard
    sent = host.sent
    host.shard.propose(Proposal(Ticket(0, None, "k"), encode(Adjustment("decay", 2.0))))
    assert host.sent == sent


def test_change_that_is_not_kept_comes_again(town: MakeTown, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vote for a change that cannot be kept is none, and whoever judges changes goes on."""
    here = town(2, decay=0.9)
    shard = here.hosts[0].shard
    assert shard

    def full(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    change = encode(Adjustment("decay", 0.25))
    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "_transaction", full)
        shard.propose(Proposal(Ticket(shard.record.revision, None, "k"), change))
    assert shard.record.vote is None
    assert here.change("k", change).committed
    assert {host.local.version.averages[0].decay for host in here.hosts} == {0.25}


def test_defect_is_answered(town: MakeTown, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the program fails at a change, whoever asked for the change learns so: it would wait for ever."""
    here = town(2)
    shard = here.hosts[0].shard
    assert shard

    def failing(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Run, "prepare_amended", failing)
    with ThreadPoolExecutor(1) as threads:
        monkeypatch.setattr(shard, "_changes", threads)
        shard.propose(Proposal(Ticket(shard.record.revision, None, "k"), encode(Adjustment("reset"))))
    _, refusal = here.queue[-1]
    assert isinstance(refusal, Refusal)
    fault = error_of(refusal.reason)
    assert (fault.code, "ZeroDivisionError" in fault.detail) == ("internal", True)


def test_waiting_for_a_change(town: MakeTown) -> None:
    """Whoever expects a change has the answer once it is made here; who stops waiting is not told."""
    here = town(2, decay=0.9)
    shard, run = here.hosts[0].shard, here.hosts[0].local.run
    assert shard
    with shard.expecting("k1", lambda: run.info().decay) as waiting, shard.expecting("k2", run.info) as other:
        here.change("k1", Adjustment("decay", 0.25))
        assert (waiting.result(0), other.done()) == (0.25, False)
    here.change("k2", Adjustment("decay", 0.5))
    assert not other.done()


@KEPT
def test_change_comes_before_an_update_under_way(town: MakeTown) -> None:
    """An update that is not on all hosts gives way to a change, and is sent again where its version is over."""
    here = town(2, decay=0.9)
    sent = here.send(1, "u1", 0)
    here.deliver()
    assert here.change("k", Adjustment("decay", 0.25)).committed
    assert sent
    with pytest.raises(Superseded):
        sent.result(0)
    here.push(1, "u1")
    assert {host.local.version.averages[0].decay for host in here.hosts} == {0.25}
    agree(here)


@KEPT
def test_changes_beside_an_update_cost_the_update_nothing(
    kept: Path | None, town: MakeTown, model: Model, litema: type[LitEmaOracle]
) -> None:
    """An update that is on some hosts when changes come which leave the version as it is is applied with the bytes that
    were sent once."""
    here, oracle = town(2), litema(model(0))
    sent = [here.send(1, "u1", 0)]
    here.deliver()
    for number, change in enumerate([*BESIDE, *([Checkpoint()] if kept else [])]):
        assert here.change(f"k{number}", change).committed
    sent.append(here.send(1, "u1", 1))
    here.deliver()
    assert [future and future.result(0).version for future in sent] == ["1.1", "1.1"]
    oracle.update(model(1))
    assert_same(here, oracle)


@KEPT
def test_change_that_is_refused_costs_an_update_nothing(town: MakeTown, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that gave way to a change on one host is voted for again once another host refuses the change."""

    def refused(*_: object) -> None:
        raise InvalidRequest("not here")

    here = town(2)
    sent = [here.send(1, "u1", 0)]
    here.deliver()
    first, second = (host.shard for host in here.hosts)
    assert first
    assert second
    with monkeypatch.context() as patch:
        patch.setattr(second.snapshots, "check", refused)
        assert not here.change("k", SnapshotGone("s", 1.0)).committed
    assert first.record.vote
    assert first.record.vote.ticket.key == "u1"
    sent.append(here.send(1, "u1", 1))
    here.deliver()
    assert [future and future.result(0).version for future in sent] == ["1.1", "1.1"]
    agree(here)


def test_update_of_a_trainer_that_was_replaced(town: MakeTown) -> None:
    """An update of which a trainer that is gone sent one slice is fenced by the one that takes over, which waits for
    nobody at the same step."""
    here = town(2)
    sent = here.send(1, "u1", 0)
    here.deliver()
    assert here.change("k", Adjustment("writer")).committed
    assert sent
    with pytest.raises(Fenced):
        sent.result(0)
    assert [host.shard and host.shard.record.vote for host in here.hosts] == [None, None]
    for host, part in zip(here.hosts, here.parts(1), strict=True):
        assert host.shard
        host.shard.push(host.local.run.begin(1, host.local.staged(part), 1), "u2")
    here.deliver()
    assert here.versions() == ["1.1", "1.1"]


# --- who is killed --------------------------------------------------------------------------------------------------


def life(here: Town, place: int, arm: Callable[[], None]) -> None:
    """What happens to a run while somebody is killed: updates, one of a trainer that is gone, which a newer one takes
    the place of, a change that this one gives way to, another coordinator. arm: called once the run goes well."""
    here.push(1)
    arm()
    here.push(2, "orphan", only=[place])
    here.push(3, "u3", only=[(place + 1) % here.hosts_count])
    here.change("k", Adjustment("decay", 0.25))
    here.replace_coordinator()
    here.say_again()
    for step in (3, 4):
        here.push(step)


def lived(oracle: LitEmaOracle, model: Model) -> LitEmaOracle:
    """What LitEma has after the same."""
    oracle.update(model(1))
    oracle.decay = torch.tensor(0.25)
    for step in (3, 4):
        oracle.update(model(step))
    return oracle


@KEPT
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(("hosts", "place"), [(2, 0), (2, 1), (3, 1)])
def test_host_is_killed(
    point: str, hosts: int, place: int, town: MakeTown, model: Model, litema: type[LitEmaOracle]
) -> None:
    """A host that is killed at any point comes back, and the run goes on as if nobody had been."""
    here = town(hosts, decay=0.9)

    def arm() -> None:
        here.hosts[place].kill_at = point

    life(here, place, arm)
    assert here.hosts[place].kills == 1
    assert_same(here, lived(litema(model(0), decay=0.9), model))
    assert [host.lines() for host in here.hosts] == [[("decay_changed", 1, 1, "decay of ema set to 0.25")]] * hosts


@pytest.mark.parametrize(
    "message", [pytest.param(each, marks=[pytest.mark.soak] if each % 2 else []) for each in range(20)]
)
def test_coordinator_is_killed(message: int, town: MakeTown, model: Model, litema: type[LitEmaOracle]) -> None:
    """A coordinator that ends between any two messages is followed by one that goes on."""
    here = town(3, decay=0.9)

    def arm() -> None:
        here.coordinator_dies = message

    life(here, 1, arm)
    assert here.deaths == 1
    assert_same(here, lived(litema(model(0), decay=0.9), model))


@pytest.mark.parametrize(
    "point", ["bytes written, no row", "vote in the row, report not sent", "commit in the row, not assigned"]
)
def test_initial_weights_are_killed(point: str, tmp_path: Path, model: Model, litema: type[LitEmaOracle]) -> None:
    """Killed over the initial weights, too."""
    here = Town(tmp_path, 2, model)
    here.hosts[1].kill_at = point
    here.push(0)
    here.push(1)
    oracle = litema(model(0))
    oracle.update(model(1))
    assert here.hosts[1].kills == 1
    assert_same(here, oracle)
    here.close()


def play(here: Town, dice: random.Random, model: Model, oracle: LitEmaOracle) -> None:
    """Updates and changes, and trainers that are gone, while messages are lost and hosts and coordinators end."""
    for step in range(2, 12, 2):
        here.dice = dice
        before = here.hosts[0].local.version.n
        if dice.random() < 0.4:
            here.hosts[dice.randrange(3)].kill_at = dice.choice([*POINTS])
        if dice.random() < 0.3:
            here.coordinator_dies = dice.randrange(12)
        if dice.random() < 0.2:
            here.replace_coordinator()
        if dice.random() < 0.6:
            here.push(step - 1, f"o{step}", only=[place for place in range(3) if dice.random() < 0.8])
        here.push(step)
        here.calm()
        agree(here)
        # The update of the trainer that is gone came before, on all hosts or on none.
        for each in range(step - (here.hosts[0].local.version.n - before) + 1, step + 1):
            oracle.update(model(each))
        if dice.random() < 0.5:
            here.dice = dice
            oracle.decay = torch.tensor(dice.choice((0.25, 0.5, 0.75)))
            here.change(f"k{step}", Adjustment("decay", oracle.decay.item()))
            here.calm()
    assert_same(here, oracle)


@KEPT
@pytest.mark.parametrize("seed", range(6))
def test_lives(seed: int, town: MakeTown, model: Model, litema: type[LitEmaOracle]) -> None:
    """Whatever is lost, comes late, twice or out of order, and whoever ends meanwhile: bit-identical to LitEma."""
    play(town(3, decay=0.9), random.Random(seed), model, litema(model(0), decay=0.9))


@KEPT
@pytest.mark.soak
@pytest.mark.parametrize("first", range(6, 306, 60))
def test_many_lives(first: int, town: MakeTown, model: Model, litema: type[LitEmaOracle]) -> None:
    """The same for many more."""
    for seed in range(first, first + 60):
        here = town(3, decay=0.9)
        try:
            play(here, random.Random(seed), model, litema(model(0), decay=0.9))
        except AssertionError as broken:
            broken.add_note(f"life {seed}")
            raise
        here.close()


# --- trainers that are gone -----------------------------------------------------------------------------------------


def torn(here: Town) -> bool:
    """Whether hosts have different updates."""
    return len({(str(h.local.version), h.local.version.step, h.local.version.num_updates) for h in here.hosts}) > 1


def orphans(here: Town, seed: int, model: Model, oracle: LitEmaOracle) -> None:
    """Updates of which some slices come, whose trainers are gone, and hosts that are killed, all at random; then an
    update that is whole. After each the hosts are at one version."""
    dice = random.Random(seed)
    for step in range(1, 7):
        some = [place for place in range(3) if dice.random() < 0.7]
        here.push(step, f"o{step}", only=some)
        for host in here.hosts:
            if dice.random() < 0.2:
                host.restart()
        here.say_again()
        assert not torn(here), f"after slices {some} of step {step}"
        if len(some) == 3:
            oracle.update(model(step))
    here.push(9)
    oracle.update(model(9))
    assert_same(here, oracle)


@KEPT
@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(each, marks=pytest.mark.soak) for each in range(4, 10))])
def test_orphans_are_on_all_or_none(seed: int, town: MakeTown, model: Model, litema: type[LitEmaOracle]) -> None:
    """An update whose trainer is gone is applied on all hosts or on none, and what follows goes on from there."""
    orphans(town(3), seed, model, litema(model(0)))


def test_orphans_tear_a_run_without_two_phases(
    town: MakeTown, model: Model, litema: type[LitEmaOracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with shards that do not wait for a verdict, but apply what comes: the test above sees it."""

    def apply(shard: ShardRun, _: Ticket, prepare: Callable[[], Write | None], answer: Callable[[bool], Any]) -> Any:
        done: Future[Any] = Future()
        with shard._run.deciding():
            write = prepare()
            if write:
                write.keep()
                write.put()
        done.set_result(answer(write is not None))
        return done

    monkeypatch.setattr(ShardRun, "_vote", apply)
    with pytest.raises(AssertionError, match="after slices"):
        orphans(town(3), 0, model, litema(model(0)))


# --- threads --------------------------------------------------------------------------------------------------------


def train(here: Town, steps: range, name: str) -> None:
    """A trainer that pushes these steps, the slices of each until it is applied or another trainer is further."""
    with ThreadPoolExecutor(here.hosts_count) as senders:
        for step in steps:
            list(senders.map(partial(send_slice, here, step, f"{name} {step}"), range(here.hosts_count)))


def send_slice(here: Town, step: int, key: str, place: int) -> None:
    """Send one slice until its host gives a final answer: a host may let go of a slice that others hold votes for, and
    they wait until that slice comes again."""
    while True:
        try:
            if sent := here.send(step, key, place):
                sent.result(30)
                return
        except (StaleStep, StepConflict):
            return
        except Superseded:
            time.sleep(0.001)


@contextlib.contextmanager
def network(here: Town) -> Iterator[None]:
    """Within the block messages are handed over by threads: one of the coordinator, and one of each host."""
    ending = threading.Event()
    hosts = [ThreadPoolExecutor(1) for _ in here.hosts]

    def carry() -> None:
        for turn in itertools.count():
            if ending.wait(0.0005):
                return
            if turn % 20 == 0:
                for host, thread in zip(here.hosts, hosts, strict=True):
                    thread.submit(host.shard.reporting.insist)  # type: ignore[union-attr]
            while here.queue:
                to, message = here.queue.popleft()
                if isinstance(to, str):
                    here._say(here.coordinator.receive(message))
                else:
                    hosts[to].submit(here.hosts[to].shard.reporting.hear, message)  # type: ignore[union-attr]

    carrier = threading.Thread(target=carry)
    carrier.start()
    yield
    ending.set()
    carrier.join()
    for thread in hosts:
        thread.shutdown()


@pytest.mark.parametrize("says", ["asked", "insists"])
def test_report_waits_for_the_row(says: str, town: MakeTown, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a shard says of itself on another thread never has a vote whose row is still being written."""
    here = town(2)
    host = here.hosts[0]
    versions, speaking = host.server.registry.shard("r"), ThreadPoolExecutor(1)
    vote = versions.vote
    assert host.shard
    talk = host.shard.reporting
    talking = (talk.hear, Ask(0, talk.record.term)) if says == "asked" else (talk.insist,)

    def slowly(*args: Any) -> None:
        said = speaking.submit(*talking)
        with contextlib.suppress(TimeoutError):
            said.result(0.2)
        assert [each for _, each in here.queue if isinstance(each, Report) and each.record.vote] == []
        vote(*args)

    monkeypatch.setattr(versions, "vote", slowly)
    assert here.send(1, "u1", 0)
    speaking.shutdown()
    assert [each for _, each in here.queue if isinstance(each, Report) and each.record.vote]


@KEPT
def test_trainers_race(town: MakeTown, model: Model, litema: type[LitEmaOracle]) -> None:
    """Two trainers push at once to three hosts, on threads: each update is on all hosts or none, in one order."""
    here, oracle = town(3), litema(model(0))
    seen: list[list[int | None]] = [[], [], []]
    for host, steps in zip(here.hosts, seen, strict=True):
        run = host.local.run
        run.changes.tell_always(lambda run=run, steps=steps: steps.append(run.ready_state().version.step))
    with network(here), ThreadPoolExecutor(2) as trainers:
        racing = [trainers.submit(train, here, range(first, 40, 2), f"t{first}") for first in (1, 2)]
        for each in racing:
            each.result(60)
    here.calm()
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) >= 20
    for step in seen[0]:
        assert step
        oracle.update(model(step))
    assert_same(here, oracle)


# --- memory files ---------------------------------------------------------------------------------------------------


def memory_files(ram_dir: Path) -> list[Path]:
    return [path for path in ram_dir.glob("*/*") if path.name != "owner"]


@pytest.mark.parametrize("kept", ["memory files"], indirect=True)
def test_clean_stop(kept: Path, town: MakeTown, model: Model, litema: type[LitEmaOracle]) -> None:
    """A clean stop gives memory back, and the run goes on from its checkpoints; memory that was voted for stays, and
    comes back, also where the current version lies on disk alone."""
    here, oracle = town(2, decay=0.9), litema(model(0), decay=0.9)
    here.push(1)
    for host in here.hosts:
        host.server.stop()
    assert memory_files(kept) == []
    for host in here.hosts:
        host.server.start()
        host.start()
    here.deliver()
    sent = here.send(2, "u2", 0)
    for _ in range(2):
        assert here.hosts[0].shard
        assert here.hosts[0].shard.record.vote
        here.hosts[0].server.stop()
        assert memory_files(kept)
        here.hosts[0].server.start()
        here.hosts[0].start()
    assert sent
    here.send(2, "u2", 1)
    here.deliver()
    here.change("k", Adjustment("decay", 0.25))
    here.push(3)
    oracle.update(model(1))
    oracle.update(model(2))
    oracle.decay = torch.tensor(0.25)
    oracle.update(model(3))
    assert_same(here, oracle)


@pytest.mark.parametrize("kept", ["memory files"], indirect=True)
def test_decay_after_a_clean_stop(town: MakeTown, model: Model, litema: type[LitEmaOracle]) -> None:
    """A change that is the first thing after a clean stop, when no version lies in memory files, outlives a kill."""
    here, oracle = town(2, decay=0.9), litema(model(0), decay=0.9)
    for host in here.hosts:
        host.server.stop()
        host.server.start()
        host.start()
    here.deliver()
    here.change("k", Adjustment("decay", 0.25))
    oracle.decay = torch.tensor(0.25)
    assert_same(here, oracle)
    here.push(1)
    oracle.update(model(1))
    assert_same(here, oracle)


@KEPT
def test_kill_over_a_decay(town: MakeTown, model: Model, litema: type[LitEmaOracle]) -> None:
    """A vote for another decay has the current version's bytes, also after a kill: nobody writes over them."""
    here, oracle = town(2, decay=0.9), litema(model(0), decay=0.9)
    here.hosts[1].kill_at = "vote in the row, report not sent"
    here.change("k", Adjustment("decay", 0.25))
    oracle.decay = torch.tensor(0.25)
    assert here.hosts[1].kills == 1
    for step in range(1, 6):
        gc.collect()
        here.push(step)
        oracle.update(model(step))
    assert_same(here, oracle)


@pytest.mark.parametrize("kept", ["memory files"], indirect=True)
def test_release(kept: Path, town: MakeTown, model: Model, litema: type[LitEmaOracle]) -> None:
    """What a killed shard left in memory is brought to its disk and freed; what it has voted for stays."""
    here, oracle = town(2), litema(model(0))
    here.push(1)
    here.send(2, "u2", 0)
    for host, released in zip(here.hosts, ([], [("r", 1)]), strict=True):
        host.stop()
        assert host.server.folder
        store = open_store(host.server.folder, kept)
        assert list(release(store)) == released
        store.close()
    for host in here.hosts:
        host.server.start()
        host.start()
    here.push(2, "u2")
    for step in (1, 2):
        oracle.update(model(step))
    assert_same(here, oracle)


@pytest.mark.parametrize("kept", ["memory files"], indirect=True)
def test_steps_are_remembered(town: MakeTown) -> None:
    """A shard that was killed knows its latest steps, however often a decay was changed since."""
    here = town(2)
    for step in (1, 2, 3):
        here.push(step)
    for k in range(17):
        here.change(f"k{k}", Adjustment("decay", k / 100))
    here.hosts[0].restart()
    ledger = here.hosts[0].local.run.ledger
    assert [ledger.status_of(step).state for step in (1, 2, 3, 4)] == ["applied"] * 3 + ["unknown"]


@pytest.mark.parametrize("kept", ["memory files"], indirect=True)
def test_damaged_memory_that_was_voted_for(kept: Path, town: MakeTown) -> None:
    """Bytes of a vote that are not those that were written are found after a restart, whoever has committed them."""
    here = town(2)
    before = {path: path.read_bytes() for path in memory_files(kept)}
    here.send(1, "u1", 1)
    here.hosts[1].stop()
    for path in memory_files(kept):
        if before.get(path) != path.read_bytes():
            path.write_bytes(bytes(len(before[path])))
    here.hosts[1].server.start()
    here.hosts[1].start()
    assert "in memory are not those" in str(here.hosts[1].local.info.reason)


@pytest.mark.parametrize("kept", ["memory files"], indirect=True)
def test_memory_files_come_and_go(kept: Path, town: MakeTown, model: Model, litema: type[LitEmaOracle]) -> None:
    """A vote in a slot is committed by a server that has memory files since; a vote in memory files by none that has
    no such: that shard says so."""
    here, oracle = town(2), litema(model(0))
    host = here.hosts[0]
    host.server.stop()
    host.server.ram_dir = None
    host.server.start()
    host.start()
    here.deliver()
    here.send(1, "u1", 0)
    host.stop()
    host.server.ram_dir = kept
    host.server.start()
    host.start()
    for _ in range(2):
        here.replace_coordinator()
        assert host.shard
        assert host.shard.record.vote
        assert host.server.registry.shard("r").voted
        host.restart()
    here.push(1, "u1")
    assert host.local.info.durable_step == 1
    versions = host.server.registry.shard("r")
    assert isinstance(versions, ShardMemoryVersions)
    assert (versions.voted, versions.checkpoints.voted) == (None, None)  # type: ignore[attr-defined]
    host.restart()
    here.push(2)
    for step in (1, 2):
        oracle.update(model(step))
    assert_same(here, oracle)

    here.send(3, "u3", 0)
    host.server.registry.checkpoint()
    host.stop()
    host.server.ram_dir = None
    host.server.start()
    host.start()
    assert host.local.info.status == "degraded"


# --- disks, and what is no shard ------------------------------------------------------------------------------------


def test_vote_that_is_not_kept_is_not_told(town: MakeTown, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a host cannot keep its vote no other host commits: it may be killed, and would know nothing of it."""
    here = town(2)
    store = here.hosts[1].server.store
    assert store

    def full(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(store._catalog, "_transaction", full)
        for place in (0, 1):
            here.send(1, "u1", place)
        here.deliver()
        here.say_again()
        assert here.versions() == ["1.0", "1.0"]
        assert here.hosts[1].shard
        assert here.hosts[1].shard.record.vote is None
    here.push(1, "u1")
    agree(here)


def test_what_gave_way_lets_go(town: MakeTown) -> None:
    """Updates that gave way to others keep neither memory nor slots: a host has as many slots as it votes and waits
    with, whatever number of trainers is gone."""
    here = town(2, durability="disk")
    for step in range(1, 12):
        here.push(step, f"o{step}", only=[0])
        assert here.change(f"k{step}", SnapshotBegun(f"s{step}", float(step), "k")).committed
    for host in here.hosts:
        assert len(host.server.data_files("*/slots/*")) <= 4
    here.push(20)
    assert here.hosts[0].shard
    assert (list(here.hosts[0].shard._held.items()), here.hosts[0].shard._cast) == ([], {})


@KEPT
@pytest.mark.parametrize("act", ["vote", "verdict"])
def test_disk_that_fails(
    act: str, town: MakeTown, model: Model, litema: type[LitEmaOracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vote that cannot be kept is told to the slice's sender, who sends again; a verdict that cannot be comes again,
    and its senders wait on."""
    here, oracle = town(2), litema(model(0))
    here.push(1)
    oracle.update(model(1))

    def full(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    futures = []
    if act == "verdict":
        futures = [here.send(2, "u2", place) for place in (0, 1)]
    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "_transaction", full)
        if act == "vote":
            futures = [here.send(2, "u2", place) for place in (0, 1)]
        here.deliver()
        assert "full" in str(here.hosts[0].local.info.reason)
    assert all(futures)
    if act == "vote":
        assert ["full" in str(future.exception(0)) for future in futures if future] == [True, True]
        assert {type(future.exception(0)) for future in futures if future} == {StorageFailed}
    else:
        assert [future.done() for future in futures if future] == [False, False]
        here.say_again()
        assert [future.result(0).applied for future in futures if future] == [True, True]
    here.push(2, "u2")
    oracle.update(model(2))
    assert here.hosts[0].local.info.status == "ready"
    assert_same(here, oracle)


def test_nothing_is_decided_with_a_damaged_shard(town: MakeTown) -> None:
    """A shard whose version cannot be read says so, and nothing is decided; the others stay readable."""
    here = town(2, durability="disk")
    here.push(1)
    host = here.hosts[1]
    host.stop()
    assert host.server.folder
    for path in (host.server.folder / "runs").glob("*/slots/*/*.safetensors"):
        path.write_bytes(b"")
    host.restart()
    assert host.local.info.status == "degraded"
    sent = here.send(2, "u2", 0)
    here.deliver()
    here.say_again()
    assert sent
    assert not sent.done()
    assert "the versions of shard 1 are damaged" in str(here.coordinator.fault)
    assert str(here.hosts[0].local.version) == "1.1"


def test_shard_decides_nothing_alone(town: MakeTown, model: Model) -> None:
    """What decides alone is refused by a shard, and changes nothing; and a run that is none is no shard."""
    here = town(2)
    here.push(1)
    host = here.hosts[0]
    run, registry = host.local, host.server.registry
    for act in (
        lambda: run.push(2, here.parts(2)[0]),
        lambda: run.run.apply(2, Parameters(run.staged(here.parts(2)[0]))),
        lambda: run.set_decay(0.5),
        lambda: registry.attach("r"),
        lambda: registry.delete("r"),
        lambda: registry.add_average("r", AverageConfig("more")),
        lambda: registry.create(run.run.config),
    ):
        with pytest.raises((InvalidRequest, RunExists), match="shard"):
            act()
    assert (str(run.version), run.run.ledger.writer, len(run.run.config.averages)) == ("1.1", 0, 1)
    registry.create(RunConfig("alone", specs_of(model(0))))
    with pytest.raises(InvalidRequest, match="no shard"):
        registry.shard("alone")
    here.push(2)
    agree(here)


@pytest.mark.parametrize(
    ("shard", "config", "fault"),
    [
        (ShardRow(2, 2), {}, "from 0 to 1"),
        (ShardRow(-1, 2), {}, "from 0 to 1"),
        (ShardRow(0, 2), {"durability": "memory"}, "outlive the server"),
    ],
)
def test_shard_that_cannot_be(
    shard: ShardRow, config: dict[str, Any], fault: str, local_server: Callable[..., LocalServer], model: Model
) -> None:
    """A place that there is not, and a vote that would not be kept, are refused."""
    server = local_server()
    with pytest.raises(InvalidRequest, match=fault):
        server.registry.create(RunConfig("r", specs_of(model(0)), **config), shard)
    assert server.registry.runs() == []


def test_shard_is_one_of_its_run(local_server: Callable[..., LocalServer], model: Model) -> None:
    """The same shard again is the one that is there, also after a restart; another shard, or none, is refused."""
    server = local_server()
    config = RunConfig("r", specs_of(model(0)))
    assert server.registry.create(config, ShardRow(1, 3))[1]
    for _ in range(2):
        assert not server.registry.create(config, ShardRow(1, 3))[1]
        for other in (ShardRow(0, 3), ShardRow(1, 4), None):
            with pytest.raises(RunExists, match="shard 1 of 3"):
                server.registry.create(config, other)
        server.crash()
        server.start()
    server.registry.create(RunConfig("alone", specs_of(model(0))))
    with pytest.raises(RunExists, match="no shard"):
        server.registry.create(RunConfig("alone", specs_of(model(0))), ShardRow(0, 2))
    assert isinstance(server.run("r"), LocalRun)
