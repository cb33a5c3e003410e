"""A cluster that Ray places: up, found by name, a host's actor killed, up again, down. Needs Ray.

Knows Ray's actors, and what a server promises. What the actors run is tried without Ray in test_agent.py and
test_lease.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import ServiceUnreachable
from ema_client.http.place import Place
from ema_client.protocol import RunShards
from tests.conftest import LitEmaOracle
from tests.service.cluster.test_launched import assert_is, patient
from tests.waiting import wait_until

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ray>=2.50'")

from ema_client.protocol import RAY_NAMESPACE, ray_host  # noqa: E402  # after the skip
from ema_service.cluster.launching import ray_launcher  # noqa: E402
from ema_service.cluster.launching.agent import Task  # noqa: E402
from ema_service.cluster.launching.launcher import LaunchFailed  # noqa: E402

Model = Callable[[int], dict[str, Tensor]]

DECAY = 0.9
NAME = "tried"
# Ray's own modules warn of each other, and leave sockets to the garbage collector.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a Ray of this process' own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ray_launcher.local_ray(cpus=8) as found:
            yield found


def command(what: str, address: str, *words: str) -> subprocess.CompletedProcess[str]:
    """``ema-service cluster up`` or ``down``, as a user gives it."""
    words = ("-m", "ema_service", "cluster", what, "--ray", address, "--name", NAME, *words)
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, check=False)


def plan(folder: Path, hosts: int = 2, *, twins: bool = False, **more: Any) -> ray_launcher.RayPlan:
    return ray_launcher.RayPlan(NAME, Task(None, hosts, folder, "", "127.0.0.1", twins=twins), **more)


@pytest.fixture
def folder(address: str, tmp_path: Path) -> Iterator[Path]:
    """Of a cluster that is ended after the test."""
    assert address
    yield tmp_path / "data"
    ray_launcher.down(NAME, lambda _: None)


def actor_pid(place: int) -> int:
    return ray_launcher.processes_of(NAME, place)[0]


def hosts_at(folder: Path) -> list[int]:
    """The processes that have a data dir of the cluster on their command line."""
    found = subprocess.run(["pgrep", "-f", f"data-dir {folder}/host-"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def test_a_cluster_on_ray(address: str, folder: Path, model: Model, litema: type[LitEmaOracle]) -> None:
    """Up by the command, trained through the name, a host's actor killed meanwhile, up once more, down."""
    done = command("up", address, "--shards", "2", "--host", "127.0.0.1", "--dir", str(folder))
    assert done.returncode == 0, done.stderr
    assert "cluster of 2 hosts, listens on http://127.0.0.1:" in done.stdout
    assert f"EMA_SERVICE_URL=ray://{NAME}" in done.stdout
    oracle = litema(model(0), decay=DECAY)
    with EmaClient(f"ray://{NAME}") as client:
        client.create_run("r", model(0), decay=DECAY)
        for step in range(1, 4):
            client.push("r", model(step), step=step)
            oracle.update(model(step))
        killed, before = actor_pid(0), hosts_at(folder)
        os.kill(killed, signal.SIGKILL)
        patient(lambda: client.push("r", model(4), step=4))
        oracle.update(model(4))
        patient(lambda: assert_is(client, "r", oracle))  # what the actor ran goes on for a while, and ends then
        wait_until(lambda: _is_back(killed), "the actor's restart")
        wait_until(lambda: len(set(hosts_at(folder)) & set(before)) == 1, "the end of what the actor ran")

        said: list[str] = []
        url = ray_launcher.up(plan(folder), said.append)
        assert url.startswith("http://127.0.0.1:")
        assert not [line for line in said if " | made" in line]
        with EmaClient(url) as other:
            assert_is(other, "r", oracle)
    with pytest.raises(LaunchFailed, match="is there, of 2 hosts"):
        ray_launcher.up(plan(folder, 3), said.append)
    ended = command("down", address)
    assert ended.returncode == 0, ended.stderr
    wait_until(lambda: not hosts_at(folder), "the end of the hosts")
    with pytest.raises(ServiceUnreachable, match="is not there"):
        Place(f"ray://{NAME}").address()
    assert command("down", address).returncode == 1


@pytest.mark.soak
def test_what_is_missing_is_made(folder: Path, model: Model) -> None:
    """An actor that was ended for good is made again, on its data, with the token of those that are there."""
    ray_launcher.up(plan(folder), lambda _: None)
    with EmaClient(f"ray://{NAME}") as client:
        client.create_run("r", model(0), durability="disk")
        client.push("r", model(1), step=1)
        for name in (f"{NAME}-coordinator", ray_host(NAME, 1)):
            ray.kill(ray.get_actor(name, RAY_NAMESPACE), no_restart=True)
        said: list[str] = []
        wait_until(lambda: len(ray_launcher._found([f"{NAME}-coordinator", ray_host(NAME, 1)])) == 0, "their ends")
        ray_launcher.up(plan(folder), said.append)
        made = [line.split(" | ")[0] for line in said if " | made" in line]
        assert made == [f"{NAME}-coordinator", ray_host(NAME, 1)]
        patient(lambda: client.push("r", model(2), step=2))
        assert client.run("r").step == 2


def test_no_node_has_what_is_asked_for(folder: Path) -> None:
    """Said at once, with what to do; nothing waits for a node that nobody brings."""
    with pytest.raises(LaunchFailed, match=r"no node has GPU 1.*--shared-dir"):
        ray_launcher.up(plan(folder, options={"num_gpus": 1}), lambda _: None)


@pytest.mark.soak
def test_a_constructor_raises_nothing(folder: Path, model: Model) -> None:
    """A data dir that is not there, at a restart too, is waited for; the actor lives on."""
    folder.mkdir()
    (folder / "host-0").write_text("")
    said: list[str] = []
    with pytest.raises(LaunchFailed, match="FileExistsError"):
        ray_launcher.up(plan(folder), said.append, seconds=10)
    before = actor_pid(0)
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: _is_back(before), "the actor's restart")
    (folder / "host-0").unlink()
    ray_launcher.up(plan(folder), said.append)
    with EmaClient(f"ray://{NAME}") as client:
        client.create_run("r", model(0))


@pytest.mark.soak
def test_replicas_on_ray(address: str, folder: Path, model: Model, litema: type[LitEmaOracle]) -> None:
    """Made beside hosts that are there, listed for the clients, bit for bit as their hosts, and back after SIGKILL."""
    ray_launcher.up(plan(folder), lambda _: None)
    done = command("up", address, "--shards", "2", "--replicas", "1", "--host", "127.0.0.1", "--dir", str(folder))
    assert done.returncode == 0, done.stderr
    names = [f"{NAME}-replica-{place}-0" for place in range(2)]
    assert [line for line in done.stderr.splitlines() if line.endswith(" | made")] == [
        f"{name} | made" for name in names
    ]
    oracle = litema(model(0), decay=DECAY)
    with EmaClient(f"ray://{NAME}") as client:
        client.create_run("r", model(0), decay=DECAY)
        client.push("r", model(1), step=1)
        oracle.update(model(1))
        for place, name in enumerate(names):
            replica = ray.get_actor(name, RAY_NAMESPACE)
            wait_until(lambda place=place, replica=replica: _listed(client, place) == [_url(replica)], "a replica")
            assert _holds(_url(replica), oracle)
            before = ray.get(replica.state.remote()).pids
            for pid in before:
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda replica=replica, before=before: _ready(replica, before), "the replica's restart")
            wait_until(lambda place=place, replica=replica: _listed(client, place) == [_url(replica)], "the replica")
    ray_launcher.down(NAME, lambda _: None)
    assert not ray_launcher._found(names)


def test_replicas_are_of_shards(tmp_path: Path) -> None:
    """Of each host, or of each two that have one shard."""
    hosts, twins = (plan(tmp_path, 4, twins=twins, replicas=1).followers for twins in (False, True))

    assert [place for place, _ in hosts.values()] == [0, 1, 2, 3]
    assert twins == {f"{NAME}-replica-0-0": (0, 0), f"{NAME}-replica-1-0": (1, 0)}


def _listed(client: EmaClient, place: int) -> list[str]:
    """Where a host's replicas are, as clients are told."""
    told = client._transport.json("GET", "/v1/runs/r/shards").parsed(RunShards)
    return list(told.shards[place].replicas)


def _url(actor: Any) -> str:
    try:
        return str(ray.get(actor.url.remote(), timeout=5.0))
    except ray.exceptions.RayError:
        return "being started again"


def _ready(actor: Any, before: tuple[int, ...]) -> bool:
    try:
        state = ray.get(actor.state.remote(), timeout=5.0)
    except ray.exceptions.RayError:
        return False
    return bool(state.ready) and state.pids != before


def _holds(url: str, oracle: LitEmaOracle, step: int = 1) -> bool:
    """Whether a replica's slices are those of LitEma's tensors, once it has the newest version."""
    with EmaClient(url) as reader:
        wait_until(lambda: [each.step for each in reader.runs()] == [step], "the newest version")
        found = reader.pull("r")
        rows = {name: oracle.shadow[name] for name in found}
        return bool(found) and all(_is_slice(found[name], rows[name]) for name in found)


def _is_slice(part: Tensor, whole: Tensor) -> bool:
    if part.shape == whole.shape:
        return torch.equal(part, whole)
    starts = range(whole.shape[0] - part.shape[0] + 1)
    return any(torch.equal(part, whole[start : start + part.shape[0]]) for start in starts)


@pytest.mark.soak
def test_twins_on_ray(folder: Path, model: Model, litema: type[LitEmaOracle]) -> None:
    """Two hosts for each shard, said to be on one node where there is one; a host that loses all it had is back with
    its shard, and updates go on meanwhile, bit for bit. A replica has what they have, whichever of them is lost."""
    said: list[str] = []
    ray_launcher.up(plan(folder, 4, twins=True, replicas=1), said.append)
    names = ", ".join(f"{NAME}-host-{place}" for place in range(4))
    assert f"{names} | on one node, and lost with it: no other has what {NAME}-host-0 has" in said
    oracle = litema(model(0), decay=DECAY)
    with EmaClient(f"ray://{NAME}") as client:
        client.create_run("r", model(0), decay=DECAY)
        for step, place in ((1, 0), (2, 2)):  # a host, then its twin
            before = ray_launcher.processes_of(NAME, place)
            for pid in before:
                os.kill(pid, signal.SIGKILL)
            shutil.rmtree(folder / f"host-{place}")
            patient(partial(client.push, "r", model(step), step=step))
            oracle.update(model(step))
            wait_until(partial(_is_back, before[0], place), "the actor's restart")
            wait_until(partial(_counts, plan(folder, 4, twins=True), place), f"host {place} to be filled", 90)
        patient(partial(assert_is, client, "r", oracle))
        for place in range(2):
            url = _url(ray.get_actor(f"{NAME}-replica-{place}-0", RAY_NAMESPACE))
            assert _listed(client, place) == [url]
            assert _holds(url, oracle, step=2)
    with pytest.raises(LaunchFailed, match="is there, of 4 hosts, twins among them"):
        ray_launcher.up(plan(folder, 4), said.append)


def _counts(asked: ray_launcher.RayPlan, place: int) -> bool:
    """Whether no talk goes on without a host."""
    found = ray_launcher._found([asked.coordinator, *asked.hosts])
    token = ray_launcher._token(asked, found)
    asked = replace(asked, task=replace(asked.task, token=token))
    absent = ray_launcher._told(asked, found).get("absent", {})
    return not any(place in places for places in absent.values())


def _is_back(before: int, place: int = 0) -> bool:
    try:
        return actor_pid(place) != before
    except LaunchFailed:
        return False


def test_no_other_cluster_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose name begins alike, or that another program has made; replicas are."""
    ours, theirs = {"namespace": RAY_NAMESPACE}, {"namespace": "theirs"}
    names = ["ema-host-0", "ema-host-11", "ema-host-host-0", "ema-2-host-0", "ema-coordinator", "ema-replica-0-1"]
    known = [{"name": name, **ours} for name in names] + [{"name": "ema-host-1", **theirs}]
    monkeypatch.setattr("ray.util.list_named_actors", lambda _: known)
    assert ray_launcher._named("ema") == ["ema-host-0", "ema-host-11", "ema-replica-0-1"]


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_random_kills_on_ray(folder: Path, model: Model, litema: type[LitEmaOracle]) -> None:
    """Actors and what they run, at any time, for two minutes: bit for bit LitEma's at the end."""
    ray_launcher.up(plan(folder, 3), lambda _: None)
    random, oracle, step, until = Random(7), litema(model(0), decay=DECAY), 0, time.monotonic() + 120
    with EmaClient(f"ray://{NAME}") as client:
        client.create_run("r", model(0), decay=DECAY)
        while time.monotonic() < until:
            with contextlib.suppress(LaunchFailed, ProcessLookupError):
                os.kill(random.choice(ray_launcher.processes_of(NAME, random.randrange(3))), signal.SIGKILL)
            for _ in range(random.randrange(1, 6)):
                step += 1
                patient(partial(client.push, "r", model(step), step=step))
                oracle.update(model(step))
        patient(partial(assert_is, client, "r", oracle))
        assert client.run("r").step == step
