"""Replicas of a cluster's hosts, all of them processes: listed in the map, read in the hosts' place by our client and
by the gateway, and never missed when they are killed.

Knows the cluster's processes, and how much each has sent. Does not know how a replica follows its host.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import EmaError
from ema_client.protocol import RunShards
from ema_service.cluster.conversation import Seat
from ema_service.cluster.encoding import encode
from ema_service.cluster.messages import Arrival
from ema_service.cluster.replicas import Replicas, original_of
from ema_service.tokens import create_token
from tests.conftest import LitEmaOracle
from tests.service.cluster.launched import Launched
from tests.waiting import wait_until

_SECONDS = 60.0
DECAY = 0.9
#: A shard is three stretches of the smallest size there is.
SHAPE = 10000, 1000
#: Bytes above which this test's client parts a host's weights.
_LARGE = 1 << 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """Two hosts with a replica each."""
    found = Launched(tmp_path_factory.mktemp("cluster") / "all", "--local", "2", "--replicas", "1").start()
    wait_until(lambda: len(addresses(found)) == 2, "the replicas", _SECONDS)
    yield found
    found.end()


def addresses(cluster: Launched) -> list[str]:
    """Where replicas are, as the page of hosts has it."""
    with cluster.http() as http:
        told = http.get("/v1/hosts").raise_for_status().json()
    return [replica["address"] for host in told["hosts"] for replica in host["replicas"] if replica["fault"] is None]


def model(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(*SHAPE, generator=generator), "b": torch.randn(700, generator=generator)}


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], each) for name, each in expected.items())


def reader(cluster: Launched, run: str) -> EmaClient:
    """A client that knows the hosts of a run, to which a megabyte is as large as many are to others."""
    client = EmaClient(cluster.url)
    client._pulls._pulls._split_above = _LARGE
    client._hosts.forget(run)
    found = client._hosts.of(run)
    assert found is not None
    for host in found.hosts:
        host.pulls._split_above = _LARGE
    return client


def sent(address: str) -> float:
    """Bytes of weights that a server has sent."""
    text = httpx.get(f"{address}/metrics").text
    return float(re.findall(r"^ema_sent_bytes_total (\S+)$", text, re.MULTILINE)[0])


def caught_up(cluster: Launched, run: str, version: str) -> bool:
    """Whether all replicas hold a version."""
    found = [httpx.get(f"{each}/v1/runs/{run}") for each in addresses(cluster)]
    return len(found) == 2 and all(each.status_code == 200 and each.json()["version"] == version for each in found)


def test_they_are_listed(cluster: Launched, run_name: str) -> None:
    """In the map of each run by shard, on the page of hosts with how far behind they are, and in the metrics."""
    with EmaClient(cluster.url) as client:
        client.create_run(run_name, model(0), decay=DECAY)
        wait_until(lambda: caught_up(cluster, run_name, "1.0"), "the replicas", _SECONDS)
        told = client._transport.json("GET", f"/v1/runs/{run_name}/shards").parsed(RunShards)
        assert [list(each.replicas) for each in told.shards] == [[each] for each in addresses(cluster)]
        with cluster.http() as http:
            hosts = http.get("/v1/hosts").json()["hosts"]
        replicas = [host["replicas"][0] for host in hosts]
        assert [each["server"]["replica"]["of"] for each in replicas] == [host["address"] for host in hosts]
        client.delete_run(run_name)


def test_weights_come_from_them(cluster: Launched, run_name: str, litema: type[LitEmaOracle]) -> None:
    """Our client and the gateway read stretches from hosts and replicas alike, bit for bit as LitEma has them."""
    oracle = litema(model(0), decay=DECAY)
    with EmaClient(cluster.url) as trainer:
        trainer.create_run(run_name, model(0), decay=DECAY)
        for step in (1, 2):
            trainer.push(run_name, model(step), step=step)
            oracle.update(model(step))
        wait_until(lambda: caught_up(cluster, run_name, "1.2"), "the replicas", _SECONDS)
        before = [sent(each) for each in addresses(cluster)]
        with reader(cluster, run_name) as client:
            for _ in range(4):
                client.pull(run_name)
                assert same(client.pull(run_name), oracle.shadow)
        middle = [sent(each) for each in addresses(cluster)]
        assert all(after > first for first, after in zip(before, middle, strict=True))
        with cluster.http() as http:
            for _ in range(4):
                assert same(load(http.get(f"/v1/runs/{run_name}/weights").content), oracle.shadow)
        assert all(after > first for first, after in zip(middle, map(sent, addresses(cluster)), strict=True))
        trainer.delete_run(run_name)


@contextlib.contextmanager
def trained(cluster: Launched, run: str) -> Iterator[None]:
    """Within the block updates go on; every element of an update is its step."""
    ended = threading.Event()

    def train() -> None:
        with EmaClient(cluster.url) as trainer:
            step = 0
            while not ended.is_set():
                step += 1
                with contextlib.suppress(EmaError):
                    trainer.push(run, {"w": torch.full(SHAPE, float(step))}, step=step)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _kills(cluster: Launched, run: str, seconds: float) -> int:
    """Pull while updates go on and replicas are killed, and check each pull. Returns how many different steps came."""
    with EmaClient(cluster.url) as client:
        client.create_run(run, {"w": torch.zeros(SHAPE)}, decay=0.0, use_num_updates=False)
    ended, seen = threading.Event(), set()

    def kill() -> None:
        number = 0
        while not ended.wait(0.7):
            cluster.kill(f"replica 0 of host {number % 2}", wait=False)
            number += 1

    killer = threading.Thread(target=kill)
    with trained(cluster, run):
        killer.start()
        try:
            until = time.monotonic() + seconds
            while time.monotonic() < until or len(seen) < 3:
                with reader(cluster, run) as client:
                    for _ in range(3):
                        weights = client.pull(run)
                        assert weights["w"].min() == weights["w"].max() == float(weights.info.step or 0)
                        seen.add(weights.info.step)
                with cluster.http() as http:
                    answer = http.get(f"/v1/runs/{run}/weights").raise_for_status()
                body = load(answer.content)["w"]
                assert body.min() == body.max() == float(answer.headers["ema-step"])
        finally:
            ended.set()
            killer.join()
    with EmaClient(cluster.url) as client:
        client.delete_run(run)
    return len(seen)


@pytest.mark.parametrize("seconds", [3, pytest.param(120, marks=pytest.mark.soak)])
def test_no_pull_is_torn_while_replicas_are_killed(cluster: Launched, run_name: str, seconds: float) -> None:
    """SIGKILL of replicas while pulls and updates go on: each pull is answered, and of one version."""
    assert _kills(cluster, run_name, seconds) > 2


def test_a_replica_is_listed_while_it_is_heard() -> None:
    """From its first address on, for some seconds after its last word."""
    replicas = Replicas()
    replicas.hear(Arrival(0, 2, ""), 10.0)
    assert replicas.now(10.0) == ()
    replicas.hear(Arrival(0, 2, "http://a"), 11.0)
    replicas.hear(Arrival(1, 2, "http://b"), 14.0)
    replicas.hear(Arrival(0, 2, "http://a"), 15.0)
    assert [(each.place, each.address, each.since) for each in replicas.now(16.0)] == [
        (0, "http://a", 11.0),
        (1, "http://b", 14.0),
    ]
    assert [each.address for each in replicas.now(19.5)] == ["http://a"]


def test_which_host_a_replica_follows() -> None:
    """Its own; of twins the other one where its own is away, or lacks what the others have, and its own where both
    are."""
    seats = {
        place: Seat(place, f"http://h{place}", 0, 0, listens=True, since=None, revision=None) for place in range(4)
    }
    away = seats | {0: replace(seats[0], listens=False)}

    assert original_of(0, away, (), twins=False) == "http://h0"
    assert [original_of(place, seats, (), twins=True) for place in range(4)] == [
        f"http://h{place}" for place in range(4)
    ]
    assert original_of(0, away, (), twins=True) == "http://h2"
    assert original_of(0, seats, (0,), twins=True) == "http://h2"
    assert original_of(2, seats, (2,), twins=True) == "http://h0"
    assert original_of(0, seats, (0, 2), twins=True) == "http://h0"
    assert original_of(0, away, (2,), twins=True) == "http://h2"


def test_places_that_there_are_not(cluster: Launched) -> None:
    """A coordinator lists no replica of a host that there is not, and answers nobody without the token."""
    url = re.findall(r"^coordinator \| .* listens on (http://\S+)", cluster.log, re.MULTILINE)[0]
    headers = {"Authorization": f"Bearer {(cluster.folder / 'cluster-token').read_text().strip()}"}
    for place, of in ((2, 2), (0, 3)):
        body = encode(Arrival(place, of, "http://x"))
        answer = httpx.post(f"{url}/v1/replicas", content=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        assert "there are 2 hosts" in answer.json()["detail"]
    assert httpx.post(f"{url}/v1/replicas", content=encode(Arrival(0, 2, "http://x"))).status_code == 401
    assert "http://x" not in addresses(cluster)


def test_hosts_that_ask_for_tokens(tmp_path: Path, run_name: str) -> None:
    """Replicas read with a token of their own, and ask their readers for one."""
    tokens, reading = tmp_path / "tokens", tmp_path / "reader"
    trainer = create_token(tokens, ["train", "admin"], "*")
    reading.write_text(create_token(tokens, ["pull"], "*"))
    flags = "--local", "1", "--replicas", "1", "--replica-token-file", str(reading)
    cluster = Launched(tmp_path / "all", *flags, "--", "--token-file", str(tokens)).start()
    try:
        with EmaClient(cluster.url, token=trainer) as client:
            client.create_run(run_name, {"w": torch.ones(3)})

            def replicas() -> tuple[str, ...]:
                path = f"/v1/runs/{run_name}/shards"
                return client._transport.json("GET", path).parsed(RunShards).shards[0].replicas

            wait_until(replicas, "the replica", _SECONDS)
            [address] = replicas()
            assert httpx.get(f"{address}/v1/runs/{run_name}/weights").status_code == 401
            with EmaClient(address, token=trainer) as reader:
                wait_until(lambda: [each.version for each in reader.runs()] == ["1.0"], "the run", _SECONDS)
                assert torch.equal(reader.pull(run_name)["w"], torch.ones(3))
    finally:
        cluster.end()
