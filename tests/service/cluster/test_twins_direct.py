"""Large weights between our client and both hosts of each shard, past the gateway: any host is lost, or stands still,
in the middle of it, and a run goes on bit for bit as LitEma does.

Knows the cluster's processes, and which of them is stopped or killed. Does not know how hosts decide.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import ConnectionLost, EmaError
from ema_client.http import uploads
from ema_client.states import part_body_of
from tests.conftest import LitEmaOracle
from tests.service.cluster.test_direct import part_of
from tests.service.cluster.test_twins import BOUND, Twins
from tests.waiting import wait_until

DECAY = 0.9
SHAPE = 300, 400
#: Bytes of a model.
SIZE = 4 * 300 * 400


class DirectTwins(Twins):
    """As Twins, with a client to which kilobytes are as large as many megabytes are to others."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.client.close()
        self.client = direct(self.cluster.url)
        self.runs = 0

    def hosts(self) -> list[dict[str, Any]]:
        """As Twins.hosts(), of a gateway that may have been killed just now."""
        found = list[dict[str, Any]]()

        def asked() -> bool:
            with contextlib.suppress(httpx.TransportError):
                found[:] = super(DirectTwins, self).hosts()
            return bool(found)

        wait_until(asked, "the gateway")
        return found

    def received(self) -> int:
        """Bytes of requests that the gateway has received."""
        with self.cluster.http() as http:
            told = http.get("/metrics").raise_for_status().text
        found = re.search(r"^ema_gateway_received_bytes_total (\S+)", told, re.MULTILINE)
        assert found
        return int(float(found[1]))


class Trainer(threading.Thread):
    """Pushes the updates of a run of its own one after another, each until it is applied, LitEma beside it.

    shared: from memory that the hosts read.
    """

    def __init__(self, twins: DirectTwins, *, shared: bool = False) -> None:
        super().__init__()
        twins.runs += 1
        self.run_name, self.step = f"trained-{twins.runs}", 0
        self.oracle = LitEmaOracle(model(0), decay=DECAY)
        self.client = direct(twins.cluster.url)
        self.client.create_run(self.run_name, model(0), decay=DECAY)
        self._shared = self.client.shared_state(model(0)) if shared else None
        self.slowest = 0.0
        #: By step: what a reader finds.
        self.sums = {0: summed(self.oracle.shadow)}
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            self.step += 1
            self.oracle.update(model(self.step))
            self.sums[self.step] = summed(self.oracle.shadow)
            if self._shared:
                self._shared.fill(model(self.step))
            began = time.monotonic()
            while not self._pushed():
                pass
            self.slowest = max(self.slowest, time.monotonic() - began)

    def _pushed(self) -> bool:
        try:
            state = self._shared or model(self.step)
            return self.client.push(self.run_name, state, step=self.step).step == self.step
        except EmaError as fault:
            if not fault.retryable:
                raise
            return False

    def goes_on(self, updates: int = 3) -> None:
        """Wait until so many more updates are applied."""
        enough = self.step + updates + 1
        wait_until(lambda: self.step >= enough or not self.is_alive(), "the trainer")

    def end(self) -> None:
        """Let the trainer end, and compare all there is."""
        self._ended.set()
        self.join()
        info = self.client.run(self.run_name)
        assert (info.step, info.num_updates) == (self.step, self.step)
        found = self.client.pull(self.run_name)
        assert all(torch.equal(found[name], each) for name, each in self.oracle.shadow.items())
        self.client.close()


def direct(url: str) -> EmaClient:
    client = EmaClient(url)
    client._pushes._stretched_above = client._pulls._pulls._split_above = 1 << 16
    return client


def model(seed: int) -> dict[str, Tensor]:
    """Parameters whose rows lie on both shards."""
    return {"w": torch.randn(*SHAPE, generator=torch.Generator().manual_seed(seed))}


def summed(tensors: dict[str, Tensor]) -> float:
    return float(tensors["w"].double().sum())


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DirectTwins]:
    """One cluster, of which each test leaves all hosts in step."""
    found = DirectTwins(tmp_path_factory.mktemp("twins"))
    yield found
    found.client.close()
    found.cluster.end()


def test_nothing_large_goes_through_the_gateway(twins: DirectTwins, run_name: str) -> None:
    """Updates and pulls go on while the gateway stands still, and both hosts of each shard have all of them."""
    oracle, client = LitEmaOracle(model(0), decay=DECAY), twins.client
    client.create_run(run_name, model(0), decay=DECAY)
    client.push(run_name, model(1), step=1)
    client.pull(run_name)
    gateway = twins.cluster.processes()["gateway"]
    os.kill(gateway, signal.SIGSTOP)
    try:
        assert client.push(run_name, model(2), step=2).applied
        for step in (1, 2):
            oracle.update(model(step))
        for _ in range(4):
            assert torch.equal(client.pull(run_name)["w"], oracle.shadow["w"])
    finally:
        os.kill(gateway, signal.SIGCONT)
    hosts = client._hosts.known(run_name)
    assert hosts is not None
    assert [len(host.both) for host in hosts.hosts] == [2, 2]
    client.delete_run(run_name)


@pytest.mark.soak
@pytest.mark.timeout(180)
def test_any_host_is_lost_under_load(twins: DirectTwins, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL, data dir and memory removed, of a host and then its twin, while a trainer pushes and a reader pulls, and
    another trainer has the hosts read its memory."""
    monkeypatch.setattr(uploads, "SHARE_ABOVE", 1 << 16)
    trainer, sharing = Trainer(twins), Trainer(twins, shared=True)
    before = twins.received()
    trainer.start()
    sharing.start()
    try:
        for place in (0, 2):
            trainer.goes_on()
            twins.lose(place)
            until = trainer.step + 4
            while trainer.step < until:
                found = twins.client.pull(trainer.run_name)
                assert summed(dict(found)) == trainer.sums[found.info.step or 0]
            assert f"goes on without host {place}" in twins.cluster.log
            twins.wait_whole()
        trainer.goes_on()
        sharing.goes_on()
        link = sharing.client.link
    finally:
        trainer.end()
        sharing.end()
    assert max(trainer.slowest, sharing.slowest) < BOUND
    assert twins.received() - before < SIZE, "the bytes of no update went through the gateway"
    assert "shared memory with 4 hosts on this machine" in link
    hosts = trainer.client._hosts.known(trainer.run_name)
    assert hosts is not None
    assert [len(host.both) for host in hosts.hosts] == [2, 2]


@pytest.mark.timeout(180)
def test_a_host_that_comes_back_is_sent_its_parts_again(
    twins: DirectTwins, run_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host is lost with the part of a rank, and filled; it waits for the part, and every host counts both."""
    # As of large bodies, whose senders wait for the word of a host that has them.
    monkeypatch.setattr("ema_client.http.connection.EXPECT_ABOVE", 1 << 10)
    oracle, client, moved = LitEmaOracle(model(0), decay=DECAY), twins.client, list[int]()
    client.create_run(run_name, model(0), decay=DECAY)
    client.push(run_name, model(1), step=1)
    oracle.update(model(1))
    bodies = {(step, rank): part_body_of(*part_of(model(step), rank)) for step in (2, 3) for rank in (0, 1)}

    def send(step: int, rank: int) -> bool:
        body = replace(bodies[step, rank], moved=moved.append)
        return client.push_part_once(run_name, body, step=step, part=rank, of=2, group="g")

    assert not send(2, 0)
    whole = max(moved)
    twins.lose(3)
    wait_until(lambda: twins.left_behind() == {3}, "the loss to be told")
    twins.wait_whole()
    assert not send(2, 1), "a host lacks the other part"
    with pytest.raises(ConnectionLost, match="lacks parts of step 2"):
        send(3, 0)
    moved.clear()
    send(2, 0)
    assert 0.3 * whole < max(moved) < 0.7 * whole, "one host alone is sent its rows again"
    wait_until(lambda: client.run(run_name).step == 2, "the parts")
    send(3, 0)
    send(3, 1)
    wait_until(lambda: client.run(run_name).step == 3, "the parts")
    for step in (2, 3):
        oracle.update(model(step))
    assert torch.equal(client.pull(run_name)["w"], oracle.shadow["w"])
    client.delete_run(run_name)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_host_stands_still_under_load(twins: DirectTwins) -> None:
    """It keeps its connections, takes nothing and says nothing; once it goes on it is filled, and its twin is lost."""
    trainer = Trainer(twins)
    trainer.start()
    try:
        for place, twin in ((1, 3), (2, 0)):
            trainer.goes_on()
            stopped = twins.cluster.processes()[f"host {place}"]
            os.kill(stopped, signal.SIGSTOP)
            try:
                trainer.goes_on()
                assert place in twins.left_behind()
            finally:
                os.kill(stopped, signal.SIGCONT)
            twins.wait_whole()
            trainer.goes_on()
            twins.lose(twin)
            trainer.goes_on()
            twins.wait_whole()
    finally:
        trainer.end()
    assert trainer.slowest < 2 * BOUND


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_random_losses_under_load(twins: DirectTwins, monkeypatch: pytest.MonkeyPatch) -> None:
    """For two minutes any host is lost, or the coordinator, the gateway or another host is killed, at any moment at
    which all hosts are in step, while two trainers push."""
    monkeypatch.setattr(uploads, "SHARE_ABOVE", 1 << 16)
    random, until = Random(11), time.monotonic() + 120.0
    trainers = [Trainer(twins), Trainer(twins, shared=True)]
    for each in trainers:
        each.start()
    try:
        while time.monotonic() < until:
            time.sleep(random.random())
            if random.random() < 0.5:
                others = ["coordinator", "gateway", *(f"host {place}" for place in range(4))]
                twins.cluster.kill(random.choice(others), wait=False)
                trainers[0].goes_on()
                twins.wait_whole()
            twins.lose(random.randrange(4))
            for each in trainers:
                each.goes_on()
            twins.wait_whole()
    finally:
        for each in trainers:
            each.end()
