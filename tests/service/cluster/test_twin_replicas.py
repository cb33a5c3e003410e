"""Replicas of shards that lie on two hosts each, all of them processes: they follow whichever host has everything, and
are read beside both.

Knows the cluster's processes. Does not know how a host is left behind (test_twins), or a replica follows.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load

from ema_client import EmaClient
from ema_client.protocol import RunShards
from tests.conftest import LitEmaOracle
from tests.service.cluster.launched import Launched
from tests.service.cluster.test_replicas import DECAY, addresses, caught_up, model, reader, same, sent
from tests.waiting import wait_until

_SECONDS = 60.0


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_a_replica_follows_the_twin(tmp_path: Path, litema: type[LitEmaOracle]) -> None:
    """While its host stands still it has what the twin has; it is listed, and read by our client and the gateway, bit
    for bit as LitEma has it."""
    cluster = Launched(tmp_path / "all", "--local", "2", "--twins", "--replicas", "1").start()
    try:
        _follow(cluster, litema(model(0), decay=DECAY))
    finally:
        cluster.end()


def _follow(cluster: Launched, oracle: LitEmaOracle) -> None:
    wait_until(lambda: len(addresses(cluster)) == 2, "the replicas", _SECONDS)
    stopped = cluster.processes()["host 0"]
    with EmaClient(cluster.url) as trainer:
        trainer.create_run("r", model(0), decay=DECAY)
        wait_until(lambda: caught_up(cluster, "r", "1.0"), "the replicas", _SECONDS)
        os.kill(stopped, signal.SIGSTOP)
        try:
            trainer.push("r", model(1), step=1)
            oracle.update(model(1))
            cluster.kill("replica 0 of host 0")  # its stream from the host would end by itself after a while
            wait_until(lambda: _listed(cluster) and caught_up(cluster, "r", "1.1"), "the replicas", _SECONDS)
            told = trainer._transport.json("GET", "/v1/runs/r/shards").parsed(RunShards)
            assert [len(each.replicas) for each in told.shards] == [1, 1]
            before = [sent(each) for each in _listed(cluster)]
            with reader(cluster, "r") as client:
                for _ in range(4):
                    assert same(client.pull("r"), oracle.shadow)
            middle = [sent(each) for each in _listed(cluster)]
            assert all(after > first for first, after in zip(before, middle, strict=True))
            with cluster.http() as http:
                for _ in range(4):
                    assert same(load(http.get("/v1/runs/r/weights").content), oracle.shadow)
            assert all(after > first for first, after in zip(middle, map(sent, _listed(cluster)), strict=True))
        finally:
            os.kill(stopped, signal.SIGCONT)
        trainer.push("r", model(2), step=2)
        wait_until(lambda: caught_up(cluster, "r", "1.2"), "the replicas", _SECONDS)


def _listed(cluster: Launched) -> list[str]:
    """Where the replicas are by now, once both answer."""
    found = addresses(cluster)
    return found if len(found) == 2 and all(httpx.get(f"{each}/healthz").is_success for each in found) else []
