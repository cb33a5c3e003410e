"""Updates that hosts on the trainer's machine read out of its memory: LitEma's bits, next to nothing is sent, and
neither side's end, nor its silence, harms a run.

Knows the cluster's processes, and which of them is stopped or killed. Does not know how memory is shared, or how hosts
decide.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from torch import Tensor, nn

from ema_client import EmaClient, RemoteEma
from ema_client.errors import EmaError
from ema_client.hosts import pushing
from ema_client.http.body import Body
from ema_client.http.connection import Connection, Timeouts
from ema_client.http.place import Place
from ema_client.http.retry import RetryPolicy
from ema_client.tensors.layout import specs_of
from ema_client.training.buffers import UpdateBuffers
from tests.conftest import LitEmaOracle
from tests.e2e.test_shared_crashes import held_by
from tests.service.cluster.launched import Launched
from tests.service.cluster.test_direct import DECAY, model, received, same, stopped
from tests.service.runs.gatherer import cut
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memfd_create on this system")

#: Bytes beyond which something other than a header was sent.
LITTLE = 10_000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """Two hosts."""
    found = Launched(tmp_path_factory.mktemp("shared") / "all", "--local", "2").start()
    yield found
    found.end()


@pytest.fixture
def client(cluster: Launched) -> Iterator[EmaClient]:
    with EmaClient(cluster.url) as client:
        yield client


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of bodies that this process sends."""
    lengths, send = list[int](), Connection._send

    def counted(self: Connection, body: Body, patience: float) -> object:
        lengths.append(body.length)
        return send(self, body, patience)

    monkeypatch.setattr(Connection, "_send", counted)
    return lengths


def lets_go(cluster: Launched) -> bool:
    """Whether no host has memory of a trainer."""
    return not any(held_by(pid) for name, pid in cluster.processes().items() if name.startswith("host"))


def taken(client: EmaClient, run: str) -> float:
    """How many pushes the first host has read out of shared memory, and voted for."""
    hosted = client._hosts.of(run)
    assert hosted is not None
    text = httpx.get(f"{hosted.hosts[0].transport.url}/metrics").raise_for_status().text
    found = re.search(r'^ema_pushes_total\{link="shared memory"\} (\S+)$', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_an_update_is_read_where_it_lies(
    cluster: Launched, client: EmaClient, run_name: str, sent: list[int], litema: type[LitEmaOracle]
) -> None:
    """Initial weights and updates; the cut between the hosts goes through a tensor, at an odd element."""
    oracle, before, came = litema(model(0), decay=DECAY), received(cluster), list[int]()
    shared = client.shared_state(model(0))
    client.create_run(run_name, shared, decay=DECAY)
    for step in (1, 2, 3):
        shared.fill(model(step))
        assert client.push(run_name, shared, step=step, progress=lambda moved, _: came.append(moved)).applied
        oracle.update(model(step))
        assert same(client.pull(run_name), oracle.shadow)
    assert (sum(sent), received(cluster) - before) < (LITTLE, LITTLE)
    assert max(came) == shared.body.length
    assert client.link == "TCP; shared memory with 2 hosts on this machine"
    assert not client.push(run_name, model(3), step=3).applied, "the same bytes, sent"
    assert sum(sent) > shared.body.length
    wait_until(lambda: lets_go(cluster), "the hosts to let go of a trainer's memory")
    client.delete_run(run_name)


def test_a_host_elsewhere_is_sent_its_slice(
    client: EmaClient, run_name: str, sent: list[int], monkeypatch: pytest.MonkeyPatch, litema: type[LitEmaOracle]
) -> None:
    """And nobody tells of that, who is where being no fault."""
    oracle = litema(model(0), decay=DECAY)
    client.create_run(run_name, model(0), decay=DECAY)
    hosted = client._hosts.of(run_name)
    assert hosted is not None
    far, near = hosted.hosts[1].transport.url, Place.may_be_here.fget
    monkeypatch.setattr(Place, "may_be_here", property(lambda self: self.url != far and near(self)))
    shared = client.shared_state(model(1))
    sent.clear()
    assert client.push(run_name, shared, step=1).applied
    oracle.update(model(1))
    assert 0 <= sum(sent) - hosted.hosts[1].nbytes < LITTLE
    assert same(client.pull(run_name), oracle.shadow)
    client.delete_run(run_name)


def test_a_host_that_cannot_read_is_sent_bytes(
    client: EmaClient,
    run_name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    litema: type[LitEmaOracle],
) -> None:
    """As in containers with processes of their own numbers. The update is no worse for that: no host votes against
    it, and what is told once for each host names the host."""
    oracle = litema(model(0), decay=DECAY)
    client.create_run(run_name, model(0), decay=DECAY)
    monkeypatch.setattr(os, "getpid", lambda: 1 << 30)
    shared = client.shared_state(model(1))
    with caplog.at_level(logging.WARNING, "ema_client"):
        for step in (1, 2):
            shared.fill(model(step))
            assert client.push(run_name, shared, step=step).applied
            oracle.update(model(step))
    assert same(client.pull(run_name), oracle.shadow)
    told = [record.getMessage() for record in caplog.records if record.name == "ema_client"]
    hosted = client._hosts.of(run_name)
    assert hosted is not None
    assert len(told) == 2
    assert all(any(host.transport.url in each for each in told) for host in hosted.hosts)
    client.delete_run(run_name)


def test_what_goes_by_the_gateway_is_not_offered(
    client: EmaClient, run_name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where hosts are not reached a gateway is sent the bytes, and nobody is told of shared memory that no gateway
    has."""
    monkeypatch.setattr(client._hosts, "of", lambda _: None)
    with caplog.at_level(logging.WARNING, "ema_client"):
        client.create_run(run_name, client.shared_state(model(0)), decay=DECAY)
        client.push(run_name, client.shared_state(model(1)), step=1)
    assert caplog.text == ""
    client.delete_run(run_name)


def test_parts_are_read_where_they_lie(
    client: EmaClient, run_name: str, sent: list[int], litema: type[LitEmaOracle]
) -> None:
    """Two ranks with half of the rows each, as FSDP has them: a host reads what it has of each."""
    oracle = litema(model(0), decay=DECAY)
    client.create_run(run_name, model(0), decay=DECAY)
    buffers = [_rank_buffers(rank) for rank in (0, 1)]
    sent.clear()
    for step in (1, 2):
        for rank in (0, 1):
            body = buffers[rank].copied(step, _rank_tensors(step, rank), hooked=False).body
            assert client.push_part_once(run_name, body, step=step, part=rank, of=2, group="g") is bool(rank)
        oracle.update(model(step))
    assert same(client.pull(run_name), oracle.shadow)
    assert sum(sent) < LITTLE
    client.delete_run(run_name)


def _rank_tensors(step: int, rank: int) -> list[Tensor]:
    tensors, slices = model(step), cut(model(0), 0, rank, 2)
    return [tensors[name][tuple(slice(*axis) for axis in slices[name][0])] for name in sorted(tensors)]


def _rank_buffers(rank: int) -> UpdateBuffers:
    slices = cut(model(0), 0, rank, 2)
    tensors = dict(zip(sorted(slices), _rank_tensors(0, rank), strict=True))
    return UpdateBuffers(specs_of(tensors), pinned=False, slices=slices, shared=lambda: True)


def test_a_trainer_changes_one_line(
    cluster: Launched, run_name: str, sent: list[int], monkeypatch: pytest.MonkeyPatch, litema: type[LitEmaOracle]
) -> None:
    """RemoteEma's copies lie in shared memory; also where its gateway is elsewhere and hosts alone are on its machine,
    once the first update has found them."""
    gateway, near = cluster.url, Place.may_be_here.fget
    monkeypatch.setattr(Place, "may_be_here", property(lambda self: self.url != gateway and near(self)))
    net = nn.Linear(900, 1000)
    oracle = litema({name: each.detach().clone() for name, each in net.named_parameters()}, decay=DECAY)
    counted = []
    with RemoteEma(net, DECAY, run=run_name, url=gateway) as ema:
        ema._client._pushes._stretched_above = 1 << 20
        for _ in range(4):
            with torch.no_grad():
                for each in net.parameters():
                    each.add_(0.1)
            sent.clear()
            ema(net)
            ema.flush()
            counted.append(sum(sent))
            oracle.update({name: each.detach() for name, each in net.named_parameters()})
    assert max(counted[1:]) < LITTLE < counted[0]
    with EmaClient(gateway) as client:
        assert same(client.pull(run_name), oracle.shadow)
        client.delete_run(run_name)


# --- ends and silences ----------------------------------------------------------------------------------------------


def test_a_host_is_killed(
    cluster: Launched, client: EmaClient, run_name: str, sent: list[int], litema: type[LitEmaOracle]
) -> None:
    """While the others have voted: the one that comes back reads its slice where the first one would have."""
    oracle, shared = litema(model(0), decay=DECAY), client.shared_state(model(0))
    client.create_run(run_name, shared, decay=DECAY)
    sent.clear()
    shared.fill(model(1))
    oracle.update(model(1))
    before = taken(client, run_name)
    with ThreadPoolExecutor(1) as threads:
        os.kill(cluster.processes()["host 1"], signal.SIGSTOP)
        pushed = threads.submit(client.push, run_name, shared, step=1)
        wait_until(lambda: taken(client, run_name) > before, "the vote of the other host")
        cluster.kill("host 1", wait=False)
    assert pushed.result().applied
    assert same(client.pull(run_name), oracle.shadow)
    assert sum(sent) < LITTLE
    wait_until(lambda: lets_go(cluster), "the hosts to let go of a trainer's memory")
    client.delete_run(run_name)


@pytest.mark.soak
def test_a_push_is_given_up(
    cluster: Launched, run_name: str, monkeypatch: pytest.MonkeyPatch, litema: type[LitEmaOracle]
) -> None:
    """A host that stands still reads nothing of the memory once the trainer was told that it may be filled anew: what
    counts is what is pushed then."""
    monkeypatch.setattr(pushing, "_DECISION_SECONDS", 0.0)
    oracle = litema(model(0), decay=DECAY)
    with EmaClient(cluster.url, retry=RetryPolicy(attempts=1)) as client:
        client._transport._timeouts = Timeouts(transfer=1.0, kept=1.0)
        shared = client.shared_state(model(0))
        client.create_run(run_name, shared, decay=DECAY)
        shared.fill(model(7))
        with stopped(cluster, "host 1"), pytest.raises(EmaError):
            client.push(run_name, shared, step=1)
        shared.fill(model(1))
    with EmaClient(cluster.url) as client:
        assert client.push(run_name, shared, step=1).applied
        oracle.update(model(1))
        assert same(client.pull(run_name), oracle.shadow)
        client.delete_run(run_name)


#: Makes a run of zeros and pushes ones, from shared memory.
TRAINER = """
import sys, torch
from ema_client import EmaClient
client = EmaClient(sys.argv[1])
shared = client.shared_state({"w": torch.zeros(900, 1000)})
client.create_run(sys.argv[2], shared, decay=0.0, use_num_updates=False)
print("made", flush=True)
sys.stdin.readline()
shared["w"].fill_(1.0)
client.push(sys.argv[2], shared, step=1)
"""


def test_a_trainer_is_killed(cluster: Launched, client: EmaClient, run_name: str, soak_seconds: float) -> None:
    """After one host has voted and before the other has looked: nothing of the update counts, nobody keeps the memory;
    and with --soak, the next trainer's update at the same step does count, once the vote is superseded."""
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, cluster.url, run_name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as trainer:
        assert trainer.stdout
        assert trainer.stdin
        assert trainer.stdout.readline() == "made\n"
        before = taken(client, run_name)
        with stopped(cluster, "host 1"):
            trainer.stdin.write("\n")
            trainer.stdin.flush()
            wait_until(lambda: taken(client, run_name) > before, "the vote of the other host")
            trainer.kill()
            trainer.wait(60)
        wait_until(lambda: lets_go(cluster), "the hosts to let go of a dead trainer's memory")
    assert client.run(run_name).step is None
    if not soak_seconds:
        return
    after = client.shared_state({"w": torch.full((900, 1000), 2.0)})
    assert client.push(run_name, after, step=1).applied
    assert torch.equal(client.pull(run_name)["w"], torch.full((900, 1000), 2.0))
    client.delete_run(run_name)
