"""Parts of sharded trainers at the hosts of a run: applied on all hosts or on none, bit-identical to LitEma, whoever is
killed, and in the order of steps.

Knows hosts as processes and ranks of plain HTTP. Does not know torch.distributed (test_sharded_trainers.py), or how a
set of parts is put together (tests/service/runs/test_parts.py).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import torch
from torch import Tensor

from ema_client.protocol import DIGEST_FOLLOWS, HEADER_DIGEST
from tests.service.cluster.ranks import Ranks
from tests.service.cluster.servers import Servers, cut
from tests.service.runs.gatherer import part_body

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle

Model = Callable[[int], dict[str, Tensor]]
MakeCluster = Callable[..., Servers]

_SECONDS = 60.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[MakeCluster]:
    """Make a cluster of so many hosts, with a run that has no weights."""
    made: list[Servers] = []

    def make(of: int, tensors: dict[str, Tensor], *arguments: str, kill: str = "") -> Servers:
        """kill: where host 1 ends itself."""
        folder = tmp_path / f"cluster-{len(made)}"
        folder.mkdir()
        servers = Servers(folder, of, *arguments)
        made.append(servers)
        servers.coordinate()
        for place in range(of):
            servers.host(place, kill=kill if place == 1 else "")
        assert servers.create(tensors, decay=0.9).status_code == 201
        return servers

    yield make
    for each in made:
        each.end()


def assert_same(servers: Servers, oracle: LitEmaOracle, parameters: dict[str, Tensor]) -> None:
    """All hosts have one version, and together what LitEma has."""
    for found, expected in zip(servers.shadows(), cut(oracle.shadow, servers.of, parameters), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], shadow) for name, shadow in expected.items()), servers.log()
    assert len({info["version"] for info in servers.infos()}) == 1


def staging(servers: Servers, place: int) -> str:
    lines = servers.once(place, "GET", "/metrics").text.splitlines()
    return next(line for line in lines if line.startswith("ema_staging_bytes"))


@pytest.mark.parametrize("of", [1, pytest.param(2, marks=pytest.mark.soak), 3])
def test_parts_are_one_update(of: int, cluster: MakeCluster, model: Model, litema: type[LitEmaOracle]) -> None:
    """Three ranks, some of which have nothing for some host, give what LitEma makes of the whole; parts that come again
    change nothing, and nothing of them stays."""
    servers, oracle = cluster(of, model(0)), litema(model(0), decay=0.9)
    ranks = Ranks(servers, model, 3)
    answers = ranks.send(0)
    assert {each.status_code for each in answers} == {200, 202}
    for step in range(1, 4):
        answers = ranks.send(step)
        assert {each.status_code for each in answers} <= {200, 202}  # 202 too for what was not applied within a moment
        assert {each.json()["state"] for each in answers if each.status_code == 202} == {"staged"}
        servers.until(lambda step=step: {info["step"] for info in servers.infos()} == {step}, "the update on all")
        oracle.update(model(step))
        assert_same(servers, oracle, model(0))
    again = ranks.send(3)
    assert {(each.status_code, each.json()["applied"]) for each in again} == {(200, False)}
    assert {staging(servers, place) for place in range(of)} == {"ema_staging_bytes 0.0"}


def test_a_set_waits_for_all_hosts(cluster: MakeCluster, model: Model, litema: type[LitEmaOracle]) -> None:
    """A host that has all of its parts votes, and holds no staging; whoever sent the last one is told soon that others
    are awaited, and a part that comes again is known. The step is applied once the other host has its parts."""
    servers, oracle = cluster(2, model(0)), litema(model(0), decay=0.9)
    ranks = Ranks(servers, model, 2)
    ranks.push(0)
    first = [(0, 0), (1, 0), (0, 1)]
    assert {each.status_code for each in ranks.send(1, first)} == {202}
    assert (ranks.state(1, 0), ranks.state(1, 1)) == (("staged", [0, 1]), ("staged", [0]))
    assert staging(servers, 0) == "ema_staging_bytes 0.0"
    assert ranks.once(1, 1, 0).status_code == 202
    other = ranks.once(1, 1, 0, ranks.body(2, 1, 0))
    assert (other.status_code, other.json()["code"]) == (409, "step_conflict")
    assert ranks.once(1, 1, 1).json()["applied"]
    oracle.update(model(1))
    servers.until(lambda: {info["step"] for info in servers.infos()} == {1}, "the update on both")
    assert_same(servers, oracle, model(0))


def test_a_deadline(cluster: MakeCluster, model: Model, litema: type[LitEmaOracle]) -> None:
    """Parts whose others do not come are given up, and come again; a set that is whole keeps its vote."""
    servers, oracle = cluster(2, model(0), "--body-timeout", "1"), litema(model(0), decay=0.9)
    ranks = Ranks(servers, model, 2)
    ranks.push(0)
    ranks.send(1, [(0, 0), (1, 0), (0, 1)])
    servers.until(lambda: ranks.state(1, 1) == ("unknown", []), "the part to be given up")
    assert ranks.state(1, 0) == ("staged", [0, 1])
    ranks.push(1)
    oracle.update(model(1))
    assert_same(servers, oracle, model(0))


def test_steps_stay_in_order(cluster: MakeCluster, model: Model, litema: type[LitEmaOracle]) -> None:
    """A host that has a later step whole does not vote for it while an earlier one waits for another host: to all hosts
    the newer one would take the older one's place."""
    servers, oracle = cluster(2, model(0)), litema(model(0), decay=0.9)
    ranks = Ranks(servers, model, 2)
    ranks.push(0)
    assert {each.status_code for each in ranks.send(1, [(0, 0), (1, 0)])} == {202}
    assert {each.status_code for each in ranks.send(2, [(0, 0), (1, 0)])} == {202}
    assert ranks.once(1, 0, 1).status_code == 202
    assert ranks.once(1, 1, 1).json()["applied"]
    ranks.push(2)
    for step in (1, 2):
        oracle.update(model(step))
    assert_same(servers, oracle, model(0))


def test_a_change_takes_the_place_of_a_set(cluster: MakeCluster, model: Model, litema: type[LitEmaOracle]) -> None:
    """A decay that is changed while a set waits comes first; the ranks find their parts gone, and send them again: the
    later step that is whole meanwhile, on both hosts, waits for the earlier one."""
    servers, oracle = cluster(2, model(0)), litema(model(0), decay=0.9)
    ranks = Ranks(servers, model, 2)
    ranks.push(0)
    ranks.send(1, [(0, 0), (1, 0), (0, 1)])
    assert servers.ask(1, "PATCH", "/v1/runs/r", json={"decay": 0.5}).json()["decay"] == 0.5
    oracle.decay = torch.tensor(0.5)
    servers.until(lambda: ranks.state(1, 0) == ("unknown", []), "the set to be given up")
    for step, only in [(2, [(0, 0), (0, 1)]), (1, [(1, 1)]), (2, [(1, 0), (1, 1)])]:
        assert {each.status_code for each in ranks.send(step, only)} == {202}
    ranks.push(1)
    ranks.push(2)
    for step in (1, 2):
        oracle.update(model(step))
    assert_same(servers, oracle, model(0))


@pytest.mark.parametrize("fault", ["non_finite", "layout_mismatch"])
def test_what_will_never_be_right(fault: str, cluster: MakeCluster, model: Model, litema: type[LitEmaOracle]) -> None:
    """NaN, or slices that overlap, at one host take the whole step back on all, and whoever sends again is told why."""
    servers, oracle = cluster(2, model(0)), litema(model(0), decay=0.9)
    ranks = Ranks(servers, model, 2)
    ranks.push(0)
    assert {each.status_code for each in ranks.send(1, [(0, 0), (1, 0), (0, 1)])} == {202}
    broken = {name: torch.full_like(each, float("nan")) for name, each in model(1).items()}
    bad = Ranks(servers, lambda _: broken, 2).body(1, 1, 1) if fault == "non_finite" else ranks.body(1, 0, 1)
    answer = ranks.once(1, 1, 1, bad)
    assert (answer.status_code, answer.json()["code"]) == (422, fault)
    servers.until(lambda: ranks.state(1, 0) == ("unknown", []), "the set to be given up")
    if fault == "non_finite":
        told = ranks.send(1, [(0, 0), (0, 0)])
        assert {each.json().get("code") for each in told} & {fault}
    ranks.push(2)
    oracle.update(model(2))
    assert_same(servers, oracle, model(0))


def test_a_part_that_is_damaged(cluster: MakeCluster, model: Model, litema: type[LitEmaOracle]) -> None:
    """A flipped bit is told by the digest, and costs that part alone, which comes again."""
    servers, oracle = cluster(2, model(0)), litema(model(0), decay=0.9)
    ranks = Ranks(servers, model, 2)
    ranks.push(0)
    ranks.send(1, [(0, 0), (1, 0), (0, 1)])
    body = ranks.body(1, 1, 1)
    path = "/v1/runs/r/updates/1/parts/1?of=2&group=g"
    flipped = servers.once(1, "PUT", path, content=body + bytes(16), headers={HEADER_DIGEST: DIGEST_FOLLOWS})
    assert (flipped.status_code, flipped.json()["code"]) == (422, "digest_mismatch")
    ranks.push(1)
    oracle.update(model(1))
    assert_same(servers, oracle, model(0))


@pytest.mark.parametrize(
    "point",
    [
        "gathered",
        pytest.param("before vote", marks=pytest.mark.soak),
        "after vote",
        "before commit",
        pytest.param("after commit", marks=pytest.mark.soak),
    ],
)
def test_a_host_is_killed(point: str, cluster: MakeCluster, model: Model, litema: type[LitEmaOracle]) -> None:
    """With parts that it had, with its vote, or as it commits: parts that are gone are sent again, to that host alone,
    and the update counts once."""
    # The second vote of a run is that for its first update.
    servers = cluster(2, model(0), kill="" if point == "gathered" else f"{point} of a run 2")
    oracle, ranks = litema(model(0), decay=0.9), Ranks(servers, model, 2)
    ranks.push(0)
    assert {each.status_code for each in ranks.send(1, [(0, 0), (1, 0), (0, 1)])} == {202}
    if point == "gathered":
        servers.kill(1)
    else:
        with pytest.raises(httpx.TransportError):
            ranks.once(1, 1, 1)
        servers.wait_for_end(1)
    servers.host(1)
    for step in (1, 2):
        ranks.push(step)
        oracle.update(model(step))
    assert_same(servers, oracle, model(0))


def test_the_coordinator_is_killed(cluster: MakeCluster, model: Model, litema: type[LitEmaOracle]) -> None:
    """Complete sets on all hosts wait for a coordinator, and are decided by the next one."""
    servers, oracle = cluster(2, model(0)), litema(model(0), decay=0.9)
    ranks = Ranks(servers, model, 2)
    ranks.push(0)
    servers.coordinators.end()
    assert {each.status_code for each in ranks.send(1)} == {202}
    assert {ranks.state(1, place)[0] for place in range(2)} == {"staged"}
    servers.coordinate()
    ranks.push(1)
    oracle.update(model(1))
    assert_same(servers, oracle, model(0))


@pytest.mark.parametrize("attached", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_a_trainer_that_is_started_again(
    attached: bool, cluster: MakeCluster, model: Model, litema: type[LitEmaOracle]
) -> None:
    """Parts of a start that died half way, voted for on one host, are never put together with those of the next start,
    which has other values and another number of ranks, and takes their place: at once where it attaches to the run."""
    servers, oracle = cluster(2, model(0)), litema(model(0), decay=0.9)
    dead = Ranks(servers, lambda step: model(step and step + 50), 2, "dead")
    dead.push(0)
    assert {each.status_code for each in dead.send(1, [(0, 0), (1, 0), (0, 1)])} == {202}
    writer = servers.ask(0, "POST", "/v1/runs/r/writers").json()["writer"] if attached else None
    if attached:
        fenced = dead.once(1, 1, 1)
        assert (fenced.status_code, fenced.json()["code"]) == (409, "fenced")
    ranks = Ranks(servers, model, 2, "next", writer)
    ranks.send(1, [(0, 1), (1, 1)])
    for step in (1, 2):
        ranks.push(step)
        oracle.update(model(step))
    assert_same(servers, oracle, model(0))


def test_weights_that_are_loaded_later(cluster: MakeCluster, model: Model, litema: type[LitEmaOracle]) -> None:
    """Initial weights in parts anew take the place of the first ones on all hosts, also where they differ on one host
    alone, and count once under their group, also at a host that was killed since; after an update they do not."""
    servers = cluster(2, model(0))
    Ranks(servers, model, 2).push(0)
    loaded = {name: each.clone() for name, each in model(0).items()}
    alone = next(name for name in cut(loaded, 2)[1] if name not in cut(loaded, 2)[0])
    loaded[alone] += 1
    anew = Ranks(servers, lambda step: model(step) if step else loaded, 2, "anew", replaces="1.0")
    for again in (False, True):
        if again:
            servers.kill(1)
            servers.host(1)
        answers = anew.send(0)
        assert {each.status_code for each in answers} <= {200, 202}, [each.text for each in answers]
        servers.until(lambda: {info["version"] for info in servers.infos()} == {"2.0"}, "the weights on both")
    oracle = litema(loaded, decay=0.9)
    assert_same(servers, oracle, model(0))
    late = Ranks(servers, model, 1, "late", replaces="1.0")
    assert {each.json()["code"] for each in late.send(0)} == {"weights_exist"}
    anew.push(1)
    oracle.update(model(1))
    assert_same(servers, oracle, model(0))


def test_what_a_host_needs_of_parts(cluster: MakeCluster, model: Model) -> None:
    """Without a group nobody could tell two starts apart."""
    servers = cluster(2, model(0))
    body = Ranks(servers, model, 1).body(0, 0, 0)
    answer = servers.once(0, "PUT", "/v1/runs/r/weights/parts/0?of=1", content=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    foreign = servers.once(0, "PUT", "/v1/runs/r/updates/1/parts/0?of=1&group=g", content=part_body(model(0), {}))
    assert (foreign.status_code, foreign.json()["code"]) == (409, "awaiting_weights")


def orphans(servers: Servers, model: Model, oracle: LitEmaOracle, seed: int, count: int) -> tuple[int, int]:
    """Trainers that are gone with some of their parts sent, again and again; how many steps were applied, and were
    not."""
    dice = random.Random(seed)
    applied = step = 0
    for number in range(count):
        step += 1
        ranks = Ranks(servers, model, dice.choice([1, 2, 3]), f"orphan-{number}")
        some = dice.sample(ranks.all, dice.randint(0, len(ranks.all)))
        ranks.send(step, some)
        if dice.random() < 0.05:
            servers.kill(victim := dice.randrange(servers.of))
            servers.host(victim)
        if len(some) == len(ranks.all):
            servers.until(lambda ranks=ranks, step=step: _decided(ranks, step), "a decision on a step that is whole")
        time.sleep(0.02)
        states = {ranks.state(step, place)[0] == "applied" for place in range(servers.of)}
        assert len(states) == 1, f"seed {seed}, trainer {number}: step {step} is on some hosts only\n{servers.log()}"
        if states == {True}:
            applied += 1
            oracle.update(model(step))
    last = Ranks(servers, model, 2, "last")
    last.push(step + 1)
    oracle.update(model(step + 1))
    assert_same(servers, oracle, model(0))
    return applied, count - applied


def _decided(ranks: Ranks, step: int) -> bool:
    """Whether a step is applied on all hosts, or lost with a host that was killed."""
    states = {ranks.state(step, place)[0] for place in range(ranks.servers.of)}
    return states == {"applied"} or "unknown" in states


@pytest.mark.parametrize("count", [8, pytest.param(120, marks=pytest.mark.soak)])
def test_orphans(count: int, cluster: MakeCluster, model: Model, litema: type[LitEmaOracle]) -> None:
    """What trainers leave that are gone half way is on all hosts or on none, also where a host is killed over it; the
    next trainer goes on from there, bit for bit."""
    servers, oracle = cluster(2, model(0)), litema(model(0), decay=0.9)
    Ranks(servers, model, 1).push(0)
    applied, dropped = orphans(servers, model, oracle, seed=count, count=count)
    assert applied, "some trainer sent all"
    assert dropped, "some trainer did not"
