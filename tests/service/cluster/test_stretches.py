"""Stretches at the hosts of a run: each host's slice over several connections, applied on all hosts or on none,
bit-identical to LitEma.

Knows hosts as processes and a trainer of plain HTTP. Does not know our client's lanes, or how stretches are put
together (tests/e2e/test_stretches.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from torch import Tensor

from ema_client.protocol import part_stretch_path
from ema_client.wire import LENGTH_BYTES, parse_header, stretches_of_part
from ema_service.cluster import LayoutMap
from ema_service.memory import Layout
from tests.conftest import LitEmaOracle
from tests.service.cluster.ranks import bodies_of
from tests.service.cluster.servers import Servers, cut
from tests.service.cluster.stretches import BLOCK, Stretched
from tests.service.conftest import specs_of
from tests.service.runs.gatherer import cut as columns
from tests.service.runs.gatherer import part_body
from tests.waiting import wait_until

DECAY = 0.9
#: Rows and columns: three stretches at each of two hosts, of which the last is no whole block.
SHAPE = 2600, 4000


def model(seed: int) -> dict[str, Tensor]:
    """The cut goes through ``w``."""
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(*SHAPE, generator=generator), "b": torch.randn(700, generator=generator)}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Two hosts."""
    found = Servers(tmp_path_factory.mktemp("stretches"), 2)
    try:
        yield found.start()
    finally:
        found.end()


Sender = Callable[..., Stretched]


@pytest.fixture
def sender(servers: Servers, run_name: str) -> Iterator[Sender]:
    """Make the test's run, and a trainer of it."""

    def make(**config: object) -> Stretched:
        assert servers.create(model(0), run=run_name, decay=DECAY, **config).status_code == 201
        assert {each.status_code for each in servers.push("weights", model(0), "first", run_name)} == {200}
        return Stretched(servers, model, run_name)

    yield make
    servers.ask(0, "DELETE", f"/v1/runs/{run_name}")


def assert_same(trainer: Stretched, oracle: LitEmaOracle) -> None:
    """Both hosts have one version, and together what LitEma has."""
    shadows = trainer.servers.shadows(trainer.run)
    for found, expected in zip(shadows, cut(oracle.shadow, trainer.servers.of), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], shadow) for name, shadow in expected.items()), trainer.servers.log()
    assert len({info["version"] for info in trainer.servers.infos(trainer.run)}) == 1


def code(answer: httpx.Response) -> str:
    return str(answer.json()["code"])


def test_lost_answers(sender: Sender, litema: type[LitEmaOracle]) -> None:
    """A set of one host waits for the other's; so does a stretch of it that comes again meanwhile, and all are told
    what was decided. Once it is, a stretch again changes nothing."""
    trainer, oracle = sender(), litema(model(0), decay=DECAY)
    layout = trainer.servers.once(0, "GET", f"/v1/runs/{trainer.run}/layout").json()
    assert (layout["lanes"], layout["block_bytes"]) == (8, BLOCK)
    group, (first, second, last) = trainer.group(), trainer.bounds(0)
    assert [trainer.send(1, 0, each, group).status_code for each in (first, first, second)] == [202, 202, 202]
    waiting = [trainer.begin(1, 0, last, group)]
    wait_until(lambda: voted(trainer, 0), "the vote")
    waiting += [trainer.begin(1, 0, each, group) for each in (last, first)]
    other = trainer.data(1, 0)
    refused = trainer.send(1, 0, second, group, data=other[: second[0]] + b"\0" + other[second[0] + 1 :])
    assert code(refused) == "step_conflict"
    assert [info["step"] for info in trainer.servers.infos(trainer.run)] == [None, None]
    assert not any(each.done() for each in waiting)

    assert [each.status_code for each in trainer.send_all(1, 1, trainer.group())].count(200) == 1
    told = [each.result() for each in waiting]
    assert {(each.status_code, each.json()["step"]) for each in told} == {(200, 1)}
    oracle.update(model(1))
    assert_same(trainer, oracle)
    again = trainer.send_all(1, 0, group)
    assert {(each.status_code, each.json()["applied"]) for each in again} == {(200, False)}
    assert all(each.json()["applied"] for each in trainer.push(2))
    oracle.update(model(2))
    assert_same(trainer, oracle)


def voted(trainer: Stretched, place: int) -> bool:
    """Whether a host holds a vote: its staging is given back then, and no stretch is on its way."""
    lines = trainer.servers.once(place, "GET", "/metrics").text.splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    names = ("ema_staging_bytes", "ema_lanes", "ema_partial_updates")
    return [float(found[each]) for each in names] == [0, 0, 1]


def test_what_will_never_be_right(sender: Sender, litema: type[LitEmaOracle]) -> None:
    """A NaN at one host takes the update back on both, and every stretch that comes late is told so; what does not say
    of which push it is, of which layout, or has no such bounds, is refused alone."""
    trainer, oracle = sender(), litema(model(0), decay=DECAY)
    first, second, last = trainer.bounds(1)
    waiting = [trainer.begin(1, 0, each, "host-0") for each in trainer.bounds(0)]
    wait_until(lambda: voted(trainer, 0), "the vote")
    bad = trainer.data(1, 1)[:-4] + b"\x00\x00\xc0\x7f"
    group = trainer.group()
    assert [trainer.send(1, 1, each, group, data=bad).status_code for each in (first, second)] == [202, 202]
    assert [code(trainer.send(1, 1, each, group, data=bad)) for each in (last, last)] == ["non_finite"] * 2
    assert "non_finite" in {each.result().json().get("code") for each in waiting}

    path = f"/v1/runs/{trainer.run}/updates/1/stretches/{first[0]}-{first[1]}?group=g"
    unnamed = trainer.servers.once(1, "PUT", path, content=b"")
    assert (unnamed.status_code, "Ema-Push" in unnamed.text) == (422, True)
    group = trainer.group()
    assert code(trainer.send(2, 1, (0, 4), group)) == "invalid_request"
    assert trainer.send(2, 1, first, group).status_code == 202
    assert code(trainer.send(2, 1, second, group, key="another")) == "step_conflict"
    assert all(each.json()["applied"] for each in trainer.push(2))
    oracle.update(model(2))
    assert_same(trainer, oracle)


def test_what_takes_the_place_of_a_try(sender: Sender, litema: type[LitEmaOracle]) -> None:
    """A newer try of the same push, half way or once the older one is voted for; a decay that is changed; and a
    trainer that takes over. The same push again, under its key, counts once."""
    trainer, oracle = sender(use_num_updates=False), litema(model(0), decay=DECAY, use_num_updates=False)
    older, newer = trainer.group(), trainer.group()
    first, second, last = trainer.bounds(0)
    assert trainer.send(1, 0, first, older).status_code == 202
    assert trainer.send(1, 0, first, newer).status_code == 202
    assert code(trainer.send(1, 0, second, older)) == "superseded"
    assert trainer.send(1, 0, second, newer).status_code == 202
    voted_for = trainer.begin(1, 0, last, newer)
    wait_until(lambda: voted(trainer, 0), "the vote")
    newest = trainer.group()
    assert [trainer.send(1, 0, each, newest).status_code for each in (first, second)] == [202, 202]
    also = trainer.begin(1, 0, last, newest)
    trainer.send_all(1, 1, trainer.group())
    assert {voted_for.result().status_code, also.result().status_code} == {200}
    oracle.update(model(1))
    assert_same(trainer, oracle)

    group = trainer.group()
    assert [trainer.send(2, 0, each, group).status_code for each in (first, second)] == [202, 202]
    waiting = trainer.begin(2, 0, last, group)
    wait_until(lambda: voted(trainer, 0), "the vote")
    changed = trainer.servers.ask(1, "PATCH", f"/v1/runs/{trainer.run}", json={"decay": 0.5})
    assert changed.json()["decay"] == 0.5
    oracle.decay = torch.tensor(0.5)
    assert [code(each) for each in (waiting.result(), trainer.send(2, 0, first, group))] == ["superseded"] * 2
    assert all(each.json()["applied"] for each in trainer.push(2))
    oracle.update(model(2))
    assert_same(trainer, oracle)

    group = trainer.group()
    assert trainer.send(3, 0, first, group).status_code == 202
    assert trainer.servers.ask(0, "POST", f"/v1/runs/{trainer.run}/writers").status_code == 201
    assert code(trainer.send(3, 0, second, group)) == "fenced"
    assert_same(trainer, oracle)


def test_parts_in_stretches(sender: Sender, servers: Servers, litema: type[LitEmaOracle]) -> None:
    """What a rank has for a host comes in stretches, too, each a part by itself; a set waits for the other host's."""
    trainer, oracle = sender(), litema(model(0), decay=DECAY)
    shards = LayoutMap(Layout(specs_of(model(0))), servers.of)
    for step in (1, 2):
        for place, rank in ((0, 0), (0, 1), (1, 0), (1, 1)):
            body = bodies_of(part_body(model(step), columns(model(step), -1, rank, 2)), shards)[place]
            answers = [send_part(trainer, step, place, rank, *each) for each in stretches_in(body)]
            assert len(answers) > 1
            assert {each.status_code for each in answers[:-1]} == {202}
            assert answers[-1].status_code == (200 if (place, rank) == (1, 1) else 202), answers[-1].text
        oracle.update(model(step))
        wait_until(lambda step=step: {i["step"] for i in servers.infos(trainer.run)} == {step}, "the update on both")
        assert_same(trainer, oracle)
    ungrouped = send_part(trainer, 3, 0, 0, 0, 8, 8, b"", group="")
    assert (ungrouped.status_code, "group" in ungrouped.text) == (422, True)


def stretches_in(body: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """The stretches of a part: bounds, bytes of the whole part's data, and the body of each."""
    begin = LENGTH_BYTES + int.from_bytes(body[:LENGTH_BYTES], "little")
    start = 0
    for each in stretches_of_part(parse_header(body[LENGTH_BYTES:begin]), BLOCK):
        content = each.header + b"".join(body[begin:][first:last] for first, last in each.spans)
        yield start, start + each.nbytes, len(body) - begin, content
        start += each.nbytes


def send_part(
    trainer: Stretched,
    step: int,
    place: int,
    rank: int,
    start: int,
    stop: int,
    size: int,
    body: bytes,
    group: str = "g",
) -> httpx.Response:
    path = part_stretch_path(trainer.run, step, rank, start, stop)
    query = {"of": 2, "size": size, "group": group}
    return trainer.servers.once(place, "PUT", path, params=query, content=body)


def test_ends_between_stretches(sender: Sender, servers: Servers, litema: type[LitEmaOracle]) -> None:
    """A host that is killed with some of its stretches has lost them, and no answer says that the update was applied;
    the other host keeps its vote, and so it does while a coordinator is killed. The slice anew completes the update."""
    trainer, oracle = sender(durability="process"), litema(model(0), decay=DECAY)
    first, second, last = trainer.bounds(1)
    waiting = trainer.begin_asking(1, 0, "host-0")
    assert [trainer.send(1, 1, each, "lost").status_code for each in (first, second)] == [202, 202]
    servers.kill(1)
    servers.host(1)
    assert trainer.ask(1, 1, last, "lost").status_code == 202, "what it takes for the first one"
    servers.coordinators.end()
    anew = trainer.begin_asking(1, 1, "anew")
    wait_until(lambda: voted(trainer, 1), "the vote")
    servers.coordinate()
    assert [each.result().status_code for each in anew].count(200) >= 1
    assert [each.result().status_code for each in waiting].count(200) >= 1
    oracle.update(model(1))
    assert_same(trainer, oracle)


@pytest.mark.parametrize("point", ["before vote", "after vote", "before commit", "after commit"])
@pytest.mark.soak
def test_a_host_is_killed(point: str, tmp_path: Path, litema: type[LitEmaOracle]) -> None:
    """With its vote, or as it commits: the slice is sent again to that host alone, and the update counts once."""
    servers, oracle = Servers(tmp_path, 2), litema(model(0), decay=DECAY)
    try:
        servers.coordinate()
        servers.host(0)
        servers.host(1, kill=f"{point} of a run 2")  # the second vote of a run is that for its first update
        assert servers.create(model(0), decay=DECAY).status_code == 201
        servers.push("weights", model(0), "first")
        trainer = Stretched(servers, model, "r")
        waiting = trainer.begin_asking(1, 0, "host-0")
        trainer.send_all(1, 1, "killed", trainer.bounds(1)[:-1])
        with pytest.raises(httpx.TransportError):
            trainer.send(1, 1, trainer.bounds(1)[-1], "killed")
        servers.wait_for_end(1)
        servers.host(1)
        group = trainer.group()
        assert 200 in {trainer.ask(1, 1, each, group).status_code for each in trainer.bounds(1)}
        assert 200 in {each.result().status_code for each in waiting}
        oracle.update(model(1))
        assert_same(trainer, oracle)
        assert all(each.json()["applied"] for each in trainer.push(2))
        oracle.update(model(2))
        assert_same(trainer, oracle)
    finally:
        servers.end()


@pytest.mark.soak
def test_a_late_stretch_of_a_try_that_was_given_up(tmp_path: Path, litema: type[LitEmaOracle]) -> None:
    """It is told so, and is no vote against the push: the next try counts."""
    servers, oracle = Servers(tmp_path, 2, "--body-timeout", "1").start(), litema(model(0), decay=DECAY)
    try:
        assert servers.create(model(0), decay=DECAY).status_code == 201
        servers.push("weights", model(0), "first")
        trainer = Stretched(servers, model, "r")
        assert trainer.send(1, 0, trainer.bounds(0)[0], "earlier").status_code == 202
        wait_until(lambda: state_of(trainer, 1, 0) == "unknown", "the try to be given up")
        waiting = [trainer.begin(1, 1, each, "other") for each in trainer.bounds(1)]
        wait_until(lambda: voted(trainer, 1), "the vote")
        assert code(trainer.send(1, 0, trainer.bounds(0)[1], "earlier")) == "stale_step"
        assert [each.status_code for each in trainer.send_all(1, 0, "next")].count(200) == 1
        assert [each.result().status_code for each in waiting].count(200) == 1
        oracle.update(model(1))
        assert_same(trainer, oracle)
    finally:
        servers.end()


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_orphans(sender: Sender, servers: Servers, litema: type[LitEmaOracle]) -> None:
    """What trainers leave that are gone with some of their stretches sent is on no host, and what they sent whole on
    both. A host that is killed over it is sent its slice again, and the update counts once."""
    trainer, oracle, dice = sender(durability="process"), litema(model(0), decay=DECAY), random.Random(40)
    everything = [(place, bounds) for place in range(servers.of) for bounds in trainer.bounds(place)]
    for step in range(1, 41):
        some = dice.sample(everything, len(everything) - dice.choice([0, 0, 1, 2]))
        sent = {each: trainer.begin(step, *each, f"orphan-{step}") for each in some}
        if dice.random() < 0.2:
            servers.kill(victim := dice.randrange(servers.of))
            servers.host(victim)
            again = {each: f"again-{step}" if each[0] == victim else f"orphan-{step}" for each in everything}
            theirs = [future for (place, _), future in sent.items() if place == victim]
            wait_until(lambda theirs=theirs: all(each.done() for each in theirs), "what was sent to the host")
            for (place, bounds), group in again.items():
                if place == victim or (place, bounds) not in sent:
                    sent[place, bounds] = trainer.begin(step, place, bounds, group)
        if len(sent) == len(everything):
            wait_until(lambda step=step: fates(trainer, step) == {True}, f"step {step} to be on both hosts")
            oracle.update(model(step))
        assert fates(trainer, step) == {len(sent) == len(everything)}, f"step {step}\n{servers.log()}"
    assert all(each.json()["applied"] for each in trainer.push(41))
    oracle.update(model(41))
    assert_same(trainer, oracle)


def fates(trainer: Stretched, step: int) -> set[bool]:
    """Whether a step is applied: what the hosts say."""
    return {state_of(trainer, step, place) == "applied" for place in range(trainer.servers.of)}


def state_of(trainer: Stretched, step: int, place: int) -> str:
    return str(trainer.servers.ask(place, "GET", f"/v1/runs/{trainer.run}/updates/{step}").json()["state"])
