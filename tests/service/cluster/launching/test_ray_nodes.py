"""Nodes that Ray loses: their hosts go on elsewhere, on storage that every node reaches. Needs Ray, whose nodes are
processes of this machine here.

Knows Ray's own cluster of processes, and what a server promises. Does not know what an agent does.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ema_client import EmaClient
from tests.conftest import LitEmaOracle
from tests.service.cluster.test_launched import assert_is, patient
from tests.waiting import wait_until

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ray>=2.50'")

from ema_client.protocol import RAY_NAMESPACE  # noqa: E402  # after the skip
from ema_service.cluster.launching import ray_launcher  # noqa: E402
from ema_service.cluster.launching.agent import Task  # noqa: E402
from ema_service.cluster.launching.launcher import LaunchFailed  # noqa: E402
from ema_service.cluster.launching.ray_launcher import RayPlan  # noqa: E402

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]

Model = Callable[[int], dict[str, Tensor]]

NAME, DECAY = "nodes", 0.9
#: As OPERATIONS.md advises those who want to know sooner.
_CLOCKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A head, and two nodes for a host each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "object_store_memory": 80 << 20, "_system_config": _CLOCKS}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(cluster.address, namespace=RAY_NAMESPACE, log_to_driver=False)
        for _ in range(2):
            cluster.add_node(num_cpus=1, resources={"ema_host": 1}, object_store_memory=80 << 20)
        yield cluster
        ray_launcher.down(NAME, lambda _: None)
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_node_is_lost(how: signal.Signals, tmp_path: Path, model: Model, litema: type[LitEmaOracle]) -> None:
    """SIGKILL of its raylet, or SIGSTOP, as if its link were gone: the host is on the other node, and bit for bit."""
    task = Task(None, 1, tmp_path / "data", "", "127.0.0.1")
    ray_launcher.up(RayPlan(NAME, task, shared=True, options={"resources": {"ema_host": 1}}), lambda _: None)
    oracle = litema(model(0), decay=DECAY)
    with EmaClient(f"ray://{NAME}") as client:
        client.create_run("r", model(0), decay=DECAY)
        before = ray_launcher.processes_of(NAME, 0)
        raylet = _parent(before[0])
        began = time.monotonic()
        os.kill(raylet, how)
        wait_until(lambda: _moved(before[0]), "the host on another node", 120)
        for step in (1, 2):
            patient(partial(client.push, "r", model(step), step=step))
            oracle.update(model(step))
        print(f"{how.name}: {time.monotonic() - began:.1f} s until updates are applied on the other node")  # noqa: T201
        patient(partial(assert_is, client, "r", oracle))
        wait_until(lambda: all(not Path(f"/proc/{pid}").exists() for pid in before[1:]), "the end of the earlier host")
    with suppress(ProcessLookupError):
        os.kill(raylet, signal.SIGKILL)


def test_all_of_ray_is_lost(tmp_path: Path, model: Model, litema: type[LitEmaOracle]) -> None:
    """A Ray that has never heard of the cluster brings it back, on the data that is there."""
    plan = RayPlan(NAME, Task(None, 2, tmp_path / "data", "", "127.0.0.1"))
    oracle = litema(model(0), decay=DECAY)
    for step in (1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with ray_launcher.local_ray(cpus=4), EmaClient(ray_launcher.up(plan, lambda _: None)) as client:
                if step == 1:
                    client.create_run("r", model(0), decay=DECAY)
                client.push("r", model(step), step=step)
                oracle.update(model(step))
                assert_is(client, "r", oracle)


def _moved(before: int) -> bool:
    try:
        return ray_launcher.processes_of(NAME, 0)[0] != before
    except LaunchFailed:
        return False


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
