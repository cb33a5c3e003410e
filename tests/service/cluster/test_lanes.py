"""Our client's lanes to the hosts of a run: each host's slice over several connections, past the gateway, bit-identical
to LitEma, whichever connection, host or coordinator ends.

Knows the cluster's processes and relays on the way to hosts. Does not know how hosts put stretches together
(test_stretches.py), or how many lanes pay.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from torch import Tensor

from ema_client import EmaClient
from ema_client.cli.runs import show_run
from ema_client.http.connection import Timeouts
from ema_client.http.pace import Pace, Paces
from ema_client.http.retry import RetryPolicy
from ema_client.http.transport import Transport
from ema_client.wire import Box
from tests.conftest import LitEmaOracle
from tests.relays import Breaking, Relay, Stalling
from tests.service.cluster.launched import Launched
from tests.service.runs.gatherer import cut
from tests.waiting import wait_until

DECAY = 0.9
LANES = 3
#: Rows and columns: three stretches at each of two hosts, and two of a rank's part.
SHAPE = 2600, 4000
#: Seconds that a test's connections may be silent.
SILENCE = 20.0


def model(seed: int) -> dict[str, Tensor]:
    """The cut goes through ``w``."""
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(*SHAPE, generator=generator), "b": torch.randn(700, generator=generator)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """Two hosts."""
    found = Launched(tmp_path_factory.mktemp("lanes") / "all", "--local", "2").start()
    yield found
    found.end()


class Lives:
    """A run of a cluster, its trainer's client, and LitEma beside it. A megabyte is as large to the client as many are
    to others."""

    def __init__(self, cluster: Launched, run: str, lanes: int | None = LANES) -> None:
        self.cluster, self.run = cluster, run
        self.oracle = LitEmaOracle(model(0), decay=DECAY)
        self.client = EmaClient(cluster.url, lanes=lanes)
        self.client._pushes._stretched_above = 1 << 20
        self.client.create_run(run, model(0), decay=DECAY)

    def push(self, step: int, at_half: Callable[[], None] | None = None) -> None:
        """An update. at_half: called once half of it has gone out."""
        waiting = [at_half] if at_half else []

        def progress(sent: int, size: int) -> None:
            if 2 * sent > size and waiting:
                waiting.pop()()

        self.client.push(self.run, model(step), step=step, progress=progress)
        assert not waiting
        self.oracle.update(model(step))

    def push_parts(self, step: int) -> None:
        """An update in the parts of two ranks, half of the columns each."""
        for rank in (0, 1):
            slices: dict[str, list[Box]] = {n: [*boxes] for n, boxes in cut(model(step), -1, rank, 2).items()}
            state = {
                name: model(step)[name][tuple(slice(*axis) for axis in boxes[0])].contiguous()
                for name, boxes in slices.items()
            }
            last = self.client.push_part(self.run, state, slices=slices, step=step, part=rank, of=2, group="g")
            assert last is bool(rank)
        self.oracle.update(model(step))

    def assert_alike(self) -> None:
        found = self.client.pull(self.run)
        assert all(torch.equal(found[name], each) for name, each in self.oracle.shadow.items()), self.cluster.log
        steps = self.client.run(self.run)
        assert found.info.num_updates == steps.num_updates

    def stretches(self) -> list[Counter[str]]:
        """How many stretches each host has counted, by their result."""
        hosts = self.client._hosts.of(self.run)
        assert hosts is not None
        return [counted(host.transport.url) for host in hosts.hosts]

    def close(self) -> None:
        self.client.delete_run(self.run)
        self.client.close()


def counted(url: str) -> Counter[str]:
    told = httpx.get(f"{url}/metrics", timeout=SILENCE).text
    found = re.findall(r'^ema_stretches_total{result="(.*)"} (\S+)$', told, re.MULTILINE)
    return Counter({result: int(float(count)) for result, count in found})


@pytest.fixture
def lives(cluster: Launched, run_name: str) -> Iterator[Lives]:
    with contextlib.closing(Lives(cluster, run_name)) as made:
        yield made


def test_bit_for_bit(lives: Lives) -> None:
    """Updates, whole and in ranks' parts, go to each host in stretches, and are what LitEma makes of them."""
    lives.push(1)
    before = lives.stretches()
    lives.push(2)
    whole = lives.stretches()
    assert [now["staged"] - then["staged"] for now, then in zip(whole, before, strict=True)] == [2, 2]
    assert [now["applied"] - then["applied"] for now, then in zip(whole, before, strict=True)] == [1, 1]
    lives.push_parts(3)
    parts = lives.stretches()
    assert [now["staged"] - then["staged"] for now, then in zip(parts, whole, strict=True)] == [3, 3]
    lives.client.lanes = 1
    lives.push(4)
    assert lives.stretches() == parts
    lives.assert_alike()


def test_lanes_of_each_host_are_told(cluster: Launched, run_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the host's URL, in the words for a server; not where no other number was found, or somebody says how many."""
    with contextlib.closing(Lives(cluster, run_name, lanes=None)) as lives:
        hosts = lives.client._hosts.of(run_name)
        assert hosts is not None
        first, second = (host.transport for host in hosts.hosts)
        wide, found = Paces.of(first.url, same_host=first.same_host), {"push": "4 (more bring no more)"}
        monkeypatch.setattr(Paces, "told", property(lambda paces: found if paces is wide else {}))
        lives.push(1)
        assert lives.client.link.endswith(f"; {first.url}: lanes of a push: 4 (more bring no more)")
        assert second.url not in lives.client.link
        lives.client.lanes = first.lanes = LANES
        assert lives.client.link == "TCP; lanes: 3, as was asked for; TCP with 2 hosts on this machine"


def test_each_host_has_lanes_of_its_own(cluster: Launched, run_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two lanes pay to one host, and one to the other, the former alone is sent stretches."""
    with contextlib.closing(Lives(cluster, run_name, lanes=None)) as lives:
        hosts = lives.client._hosts.of(run_name)
        assert hosts is not None
        wide = hosts.hosts[0].transport.url
        monkeypatch.setattr(Transport, "pace", lambda to, _: Pace.fixed(2 if to.url == wide else 1))
        before = lives.stretches()
        lives.push(1)
        assert [(now - then)["applied"] for now, then in zip(lives.stretches(), before, strict=True)] == [1, 0]
        assert "1, at most, of a push by the gateway" in str(show_run(lives.client, run_name).shown)
        lives.assert_alike()


def test_ends_in_the_middle(lives: Lives) -> None:
    """A host is killed with some of its stretches, the coordinator at another step: each update counts once."""
    lives.push(1)
    lives.push(2, lambda: lives.cluster.kill("host 1", wait=False))
    lives.push(3, lambda: lives.cluster.kill("coordinator", wait=False))
    lives.push(4)
    lives.assert_alike()
    assert lives.client.run(lives.run).num_updates == 4


Relays = dict[str, Relay]


@pytest.fixture
def relayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str], Relay]], Relays]]:
    """Have clients that are made from now on reach each host by a relay; the relays, by the host's address."""
    made: Relays = {}
    beside = Transport.beside

    def through(relay: Callable[[str], Relay]) -> Relays:
        def astray(self: Transport, url: str, retry: RetryPolicy) -> Transport:
            found = made[url] if url in made else made.setdefault(url, relay(url))
            self._timeouts = Timeouts(transfer=SILENCE, kept=SILENCE)
            return beside(self, found.url, retry)

        monkeypatch.setattr(Transport, "beside", astray)
        return made

    yield through
    for each in made.values():
        each.close()


def test_a_lane_stands_still(cluster: Launched, run_name: str, relayed: Callable[..., Relays]) -> None:
    """One connection to a host takes nothing more, alive: another one carries what it had."""
    relays = relayed(Stalling)
    with contextlib.closing(Lives(cluster, run_name)) as lives:
        lives.push(1)
        for each in relays.values():
            each.stall(1 << 20)
        lives.push(2)
        assert [each.silenced for each in relays.values()] == [1, 1]
        for each in relays.values():
            each.wake()
        lives.push(3)
        lives.assert_alike()


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 21))
def test_lanes_that_break(seed: int, cluster: Launched, run_name: str, relayed: Callable[..., Relays]) -> None:
    """Connections to hosts are cut, or fall silent, at random: each update counts once, whole or in parts."""
    relays = relayed(lambda url: Breaking(url, random.Random(f"{seed} {url}"), troubles=0))
    with contextlib.closing(Lives(cluster, run_name)) as lives:
        lives.push(0)
        for each in relays.values():
            each.begin(troubles=4)
        for step in (1, 2):
            lives.push(step)
        lives.push_parts(3)
        lives.push(4)
        lives.assert_alike()
        assert lives.client.run(run_name).num_updates == 5
        assert any(each.troubles < 4 for each in relays.values())


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_twins(tmp_path: Path) -> None:
    """Both hosts of a shard get its stretches; one that is lost in the middle costs no update, and is sent them again
    once it is filled."""
    cluster = Launched(tmp_path / "all", "--local", "2", "--twins").start()
    try:
        with contextlib.closing(Lives(cluster, "r")) as lives:
            lives.push(1)
            for step in range(2, 8):
                lives.push(step, lambda step=step: cluster.kill(f"host {step % 4}", wait=False))
                lives.assert_alike()
            wait_until(lambda: all(len(host.both) == 2 for host in hosts_of(lives)), "all hosts to be back")
            before = sum(each["applied"] for each in all_counted(lives))
            lives.push(8)
            assert sum(each["applied"] for each in all_counted(lives)) - before == 4
            lives.assert_alike()
    finally:
        cluster.end()


def hosts_of(lives: Lives) -> tuple[object, ...]:
    hosts = lives.client._hosts
    hosts.forget(lives.run)
    found = hosts.of(lives.run)
    return found.hosts if found else ()


def all_counted(lives: Lives) -> list[Counter[str]]:
    found = lives.client._hosts.of(lives.run)
    assert found is not None
    return [counted(each.url) for host in found.hosts for each in host.both]
