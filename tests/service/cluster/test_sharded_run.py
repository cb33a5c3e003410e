"""A run over two servers with data dirs of their own, and a coordinator, all processes: killed at any time, the run is
bit-identical to LitEma.

Knows processes, and what their data dirs have once all are killed. Does not know messages, or at which point a process
ends (test_shard_run, test_hosts).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from ema_service.cluster import Adjustment, encode
from ema_service.cluster.messages import talk_of
from tests.service.cluster.hosts import Hosts
from tests.service.cluster.processes.holding import RUN
from tests.service.cluster.processes.sharding import DECAY
from tests.service.cluster.town import slices
from tests.service.conftest import LocalServer

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle

_SECONDS = 30.0


@pytest.fixture(params=["slots", "memory files"])
def kept(request: pytest.FixtureRequest, ram_dir: Path) -> Path | None:
    """Where versions lie: the folder of memory files; None for slots."""
    return ram_dir if request.param == "memory files" else None


@pytest.fixture
def hosts(tmp_path: Path, kept: Path | None) -> Iterator[Hosts]:
    started = Hosts(tmp_path, program="sharding.py", words=[str(kept or "")], talk=talk_of(RUN, 0))
    yield started
    started.end()


def kill_some(hosts: Hosts, random: Random) -> None:
    """Kill shards, the coordinator, or nobody, and start them again."""
    time.sleep(random.random() * 0.02)
    for victim in random.choice([(), ("coordinator",), (0,), (1,), (0, 1), ("coordinator", 0, 1)]):
        if isinstance(victim, int):
            hosts.kill(victim)
            hosts.hold(victim)
        else:
            hosts.kill_coordinator()
            hosts.coordinate(hosts.ports[0])


def assert_same(hosts: Hosts, kept: Path | None, oracle: LitEmaOracle) -> None:
    """The data dirs, as the killed shards left them, have together what LitEma has."""
    hosts.end()
    versions = set()
    for place in range(hosts.shards):
        server = LocalServer(hosts.folder / f"data-{place}", ram_dir=kept)
        try:
            found, expected = server.run(RUN).shadows(), slices(oracle.shadow, hosts.shards)[place]
            assert found.keys() == expected.keys()
            for name, shadow in expected.items():
                assert torch.equal(found[name], shadow), f"{name} of shard {place}"
            versions.add((str(server.run(RUN).version), server.run(RUN).version.lineage))
        finally:
            server.end()
    assert len(versions) == 1


@pytest.mark.parametrize("seconds", [4, pytest.param(120, marks=pytest.mark.soak)])
def test_random_kills(
    hosts: Hosts,
    seconds: float,
    kept: Path | None,
    model: Callable[[int], dict[str, Tensor]],
    litema: type[LitEmaOracle],
) -> None:
    """Whoever is killed meanwhile, every update and every decay counts once on both shards, and no slice of a trainer
    that is gone on one."""
    random, step, oracle = Random(11), 0, litema(model(0), decay=DECAY)
    hosts.coordinate()
    for place in range(2):
        hosts.hold(place)
    hosts.push_all(0, "first")
    until = time.monotonic() + seconds
    while step < 10 or time.monotonic() < until:
        step += 2
        if random.random() < 0.3:
            hosts.push(random.randrange(2), step - 1, f"orphan{step}").give_up()
        pushes = [hosts.push(place, step, f"u{step}") for place in range(2)]
        kill_some(hosts, random)
        assert [push.answer() for push in pushes] == [{"committed": True, "reason": ""}] * 2
        oracle.update(model(step))
        if random.random() < 0.3:
            decay = random.choice([0.25, 0.5, 0.75])
            change = encode(Adjustment("decay", decay))
            asking = threading.Thread(target=hosts.change, args=(f"k{step}", change), daemon=True)
            asking.start()
            kill_some(hosts, random)
            asking.join(_SECONDS)
            assert not asking.is_alive(), hosts.log()
            oracle.decay = torch.tensor(decay)
    assert_same(hosts, kept, oracle)
