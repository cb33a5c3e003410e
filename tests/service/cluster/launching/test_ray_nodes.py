"""Nodes that Ray loses: their hosts go on elsewhere, on storage that every node reaches. Needs Ray, whose nodes are
processes of this machine here.

Knows Ray's own cluster of processes, and what a server promises. Does not know what an agent does.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
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
def nodes(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A head, and two nodes for a host each; or as many as a test wants, for so many hosts each."""
    count, hosts = getattr(request, "param", (2, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "object_store_memory": 80 << 20, "_system_config": _CLOCKS}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(cluster.address, namespace=RAY_NAMESPACE, log_to_driver=False)
        for number in range(count):
            # An address of its own: to Ray, and to `up`, these are machines.
            at = {"node_ip_address": f"127.0.0.{number + 2}", "resources": {"ema_host": hosts}}
            cluster.add_node(num_cpus=1, object_store_memory=80 << 20, **at)
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


def twins(folder: Path, *, shared: bool) -> RayPlan:
    """Two shards on four hosts."""
    task = Task(None, 4, folder, "", "127.0.0.1", twins=True)
    return RayPlan(NAME, task, shared=shared, options={"num_cpus": 0, "resources": {"ema_host": 1}})


def nodes_of(plan: RayPlan) -> list[str]:
    """The node of each host, by place; one that is not started has none."""

    def node(name: str) -> str:
        try:
            return str(ray.get(ray.get_actor(name, RAY_NAMESPACE).node.remote(), timeout=5))
        except (ray.exceptions.RayError, ValueError):
            return ""

    return [node(name) for name in plan.hosts]


def disks(plan: RayPlan, addresses: list[str]) -> dict[str, set[int]]:
    """What each node has on a disk of its own, where all nodes are this machine: the data of hosts that run there."""
    of = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    found = [of.get(node) for node in nodes_of(plan)]
    return {address: {place for place, node in enumerate(found) if node == address} for address in addresses}


def groups() -> dict[str, str]:
    """Ray's placement groups by name, and how each is placed."""
    found = ray.util.placement_group_table().values()
    return {each["name"]: each["strategy"] for each in found if each["state"] != "REMOVED"}


def apart(plan: RayPlan) -> bool:
    """Whether all hosts are started, and those of a shard on two nodes."""
    found = nodes_of(plan)
    return all(found) and found[0] != found[2] and found[1] != found[3]


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize("nodes", [(3, 2), (5, 1)], indirect=True, ids=["fewer-nodes-than-hosts", "a-node-each"])
def test_twins_are_on_two_nodes(tmp_path: Path, model: Model, litema: type[LitEmaOracle]) -> None:
    """On storage that all nodes reach Ray keeps the two of a shard apart, also where it starts them again for a node
    that is lost; updates go on."""
    plan = twins(tmp_path / "data", shared=True)
    said: list[str] = []
    ray_launcher.up(plan, said.append)
    assert apart(plan)
    shared = [line for line in said if "on one node, and lost with it: updates wait" in line]
    assert bool(shared) == (len(set(nodes_of(plan))) < 4)
    names = [f"{NAME}-shard-0", f"{NAME}-shard-1"] if shared else [f"{NAME}-hosts"]
    assert groups() == dict.fromkeys(names, "STRICT_SPREAD")
    _lose_a_node(plan, model, litema, lambda: None)
    ray_launcher.down(NAME, lambda _: None)
    assert groups() == {}


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize("nodes", [(3, 2)], indirect=True)
def test_twins_of_a_lost_node_are_made_elsewhere(
    tmp_path: Path, model: Model, litema: type[LitEmaOracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of hosts that have data on their nodes `up` makes those of a lost node again, on another than their twins', and
    these fill them; without that command they wait for their node."""
    monkeypatch.setattr(ray_launcher, "_data_at", disks)
    plan = twins(tmp_path / "data", shared=False)
    ray_launcher.up(plan, lambda _: None)
    assert apart(plan)
    lost = nodes_of(plan)[0]
    gone = [place for place, node in enumerate(nodes_of(plan)) if node == lost]
    said: list[str] = []

    def up_again() -> None:
        assert [place for place, node in enumerate(nodes_of(plan)) if not node] == gone
        for place in gone:  # a disk goes with its node
            shutil.rmtree(tmp_path / "data" / f"host-{place}")
        ray_launcher.up(plan, said.append, seconds=120)

    _lose_a_node(plan, model, litema, up_again)
    moved = [line.split(" | ")[0] for line in said if "its node is gone: made anew" in line]
    assert moved == [plan.hosts[place] for place in gone]


def _lose_a_node(plan: RayPlan, model: Model, litema: type[LitEmaOracle], mend: Callable[[], None]) -> None:
    """Train, lose the node of host 0 with all that runs there, mend, and train on."""
    oracle, step = litema(model(0), decay=DECAY), 0
    with EmaClient(f"ray://{NAME}") as client:
        client.create_run("r", model(0), decay=DECAY)

        def train() -> None:
            nonlocal step
            step += 1
            patient(partial(client.push, "r", model(step), step=step))
            oracle.update(model(step))
            patient(partial(assert_is, client, "r", oracle))

        train()
        lost = nodes_of(plan)[0]
        pids = [ray_launcher.processes_of(NAME, place) for place, node in enumerate(nodes_of(plan)) if node == lost]
        for pid in (_parent(pids[0][0]), *(pid for each in pids for pid in each)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: lost not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}, "Ray to see it", 60)
        mend()
        train()
        wait_until(lambda: apart(plan), "all hosts, those of a shard on two nodes", 120)
        wait_until(lambda: not _left_out(plan), "hosts that are filled", 120)
        train()


def _left_out(plan: RayPlan) -> set[int]:
    """The places that the others go on without."""
    found = ray_launcher._found([plan.coordinator, *plan.hosts])
    token = ray.get(found[plan.coordinator].task.remote()).token
    told = ray_launcher._told(replace(plan, task=replace(plan.task, token=token)), found)
    return set().union(*told.get("absent", {}).values())


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
