"""A cluster on this machine, all of it processes, reached through its gateway: to our client it is a server,
bit-identical to LitEma, whoever is killed meanwhile.

Knows what a server promises. Does not know messages between the processes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from ema_client import EmaClient, RemoteEma, Weights
from ema_client.errors import (
    AverageExists,
    AverageNotFound,
    AwaitingWeights,
    EmaError,
    LastAverage,
    LayoutMismatch,
    RunExists,
    RunNotFound,
    SnapshotExists,
    SnapshotNotFound,
)
from ema_client.protocol import DIGEST_FOLLOWS, HEADER_DIGEST, HEADER_PUSH, RunShards
from ema_service.averaging.digest import Digest
from ema_service.memory import Layout
from tests.conftest import LitEmaOracle
from tests.service.cluster.launched import Launched, gone
from tests.service.conftest import specs_of
from tests.waiting import wait_until

DECAY = 0.9
Model = Callable[[int], dict[str, Tensor]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """Three hosts, for tests that end nobody."""
    folder = tmp_path_factory.mktemp("cluster")
    found = Launched(folder / "all", "--local", "3").start()
    yield found
    found.end()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Make a cluster of one's own."""
    made: list[Launched] = []

    def make(*flags: str) -> Launched:
        made.append(Launched(tmp_path / f"c{len(made)}", *flags).start())
        return made[-1]

    yield make
    for each in made:
        each.end()


def assert_is(client: EmaClient, run: str, oracle: LitEmaOracle) -> None:
    """What is pulled is what LitEma has, bit for bit."""
    found = client.pull(run)
    assert found.keys() == oracle.shadow.keys()
    for name, tensor in oracle.shadow.items():
        assert torch.equal(found[name], tensor), name


# --- our client ------------------------------------------------------------------------------------------------------


def test_the_life_of_a_run(cluster: Launched, run_name: str, model: Model, litema: type[LitEmaOracle]) -> None:
    """Made, pushed to, changed, read, and deleted, through EmaClient as it is."""
    oracle = litema(model(0), decay=DECAY)
    with EmaClient(cluster.url) as client:
        info = client.create_run(run_name, model(0), decay=DECAY)
        assert (info.run, info.status, info.tensors) == (run_name, "ready", len(model(0)))
        with pytest.raises(RunExists):
            client.create_run(run_name, model(0), decay=DECAY)
        for step in range(1, 4):
            result = client.push(run_name, model(step), step=step)
            oracle.update(model(step))
            assert (result.applied, result.step, result.num_updates) == (True, step, step)
            assert_is(client, run_name, oracle)
        assert not client.push(run_name, model(3), step=3).applied
        client.set_decay(run_name, 0.5)
        oracle.decay = torch.tensor(0.5)
        client.reset_num_updates(run_name)
        oracle.num_updates = torch.tensor(0, dtype=torch.int)
        client.push(run_name, model(4), step=4)
        oracle.update(model(4))
        assert_is(client, run_name, oracle)
        with cluster.http() as http:
            config = http.get(f"/v1/runs/{run_name}/config").raise_for_status().json()
        assert len(config["layout"]) == len(model(0))
        told = client.run(run_name)
        assert (told.step, told.decay, told.num_updates) == (4, 0.5, 1)
        layout = Layout(specs_of(model(0)))
        assert (told.tensors, told.copied, told.parameters) == (len(layout), 0, layout.elements)
        assert told.shadow_dtype == layout.shadow_dtype
        assert told in client.runs()
        client.delete_run(run_name)
        with pytest.raises(RunNotFound):
            client.run(run_name)


def test_runs_are_listed_while_they_move(cluster: Launched, run_name: str, model: Model) -> None:
    """All of them each time, though at any moment some host has heard what became of an update, and another has not."""
    names, over = {f"{run_name}-{number}" for number in range(4)}, threading.Event()

    def train(run: str) -> None:
        with EmaClient(cluster.url) as client:
            for step in itertools.takewhile(lambda _: not over.is_set(), itertools.count(1)):
                client.push(run, model(1), step=step)

    with EmaClient(cluster.url) as client, cluster.http() as http, ThreadPoolExecutor(len(names)) as threads:
        for name in names:
            client.create_run(name, model(0))
        trainers = [threads.submit(train, name) for name in names]
        try:
            for _ in range(60):
                listed = http.get("/v1/runs").raise_for_status().json()["runs"]
                assert names <= {each["run"] for each in listed}
        finally:
            over.set()
        assert [each.result() for each in trainers] == [None] * len(names)
        assert all((client.run(name).step or 0) > 0 for name in names)
        for name in names:
            client.delete_run(name)


def test_snapshots(cluster: Launched, run_name: str, model: Model, litema: type[LitEmaOracle], tmp_path: Path) -> None:
    """Taken, listed, read whole, and deleted, through EmaClient as it is; of one version, while updates go on."""
    oracle = litema(model(0), decay=DECAY)
    with EmaClient(cluster.url) as client:
        client.create_run(run_name, model(0), decay=DECAY)
        client.push(run_name, model(1), step=1)
        oracle.update(model(1))
        taken = client.snapshot(run_name, "s-1")
        assert (taken.name, taken.step, taken.version) == ("s-1", 1, "1.1")
        assert client.snapshot(run_name, "s-1") == taken
        client.push(run_name, model(2), step=2)
        with pytest.raises(SnapshotExists):
            client.snapshot(run_name, "s-1")
        found = client.pull(run_name, snapshot="s-1")
        assert all(torch.equal(found[name], tensor) for name, tensor in oracle.shadow.items())
        assert (found.info.snapshot, found.info.step) == ("s-1", 1)
        client.download(run_name, tmp_path / "s.safetensors", snapshot="s-1")
        assert all(torch.equal(each, found[name]) for name, each in load_file(tmp_path / "s.safetensors").items())
        assert taken.bytes > sum(tensor.nbytes for tensor in oracle.shadow.values())
        told = client.rewind(run_name, "s-1")
        assert (told.version, told.step, told.status, told.checkpoint_step) == ("2.0", 1, "ready", 1)
        assert_is(client, run_name, oracle)
        client.push(run_name, model(3), step=2)
        oracle.update(model(3))
        assert_is(client, run_name, oracle)
        client.snapshot(run_name, "s-2", keep=1)
        assert [each.name for each in client.snapshots(run_name)] == ["s-2"]
        client.delete_snapshot(run_name, "s-2")
        assert list(client.snapshots(run_name)) == []
        with pytest.raises(SnapshotNotFound):
            client.pull(run_name, snapshot="s-2")
        told = client.timeline(run_name).entries
        assert [(each.kind, each.step, each.text) for each in told] == [
            ("created", None, "created on 3 hosts"),
            ("snapshot", 1, "snapshot s-1 taken of version 1.1"),
            ("rewound", 1, "rewound to snapshot s-1 (version 1.1, step 1)"),
            ("snapshot", 2, "snapshot s-2 taken of version 2.1"),
            ("snapshot_deleted", None, "snapshot s-2 deleted"),
        ]
        assert client.timeline(run_name, since=told[-2].time).entries == told[-1:]


def test_averages_come_and_go(cluster: Launched, run_name: str, model: Model, litema: type[LitEmaOracle]) -> None:
    """Through EmaClient as it is: added, read once it has weights, in a snapshot, and removed."""
    oracle = litema(model(0), decay=DECAY)
    with EmaClient(cluster.url) as client:
        client.create_run(run_name, model(0), decay=DECAY)
        added = client.add_average(run_name, "long", decay=0.5)
        assert [each.name for each in added.averages] == ["ema", "long"]
        assert client.add_average(run_name, "long", decay=0.5).averages == added.averages
        with pytest.raises(AverageExists):
            client.add_average(run_name, "long", decay=0.25)
        with pytest.raises(AwaitingWeights):
            client.pull(run_name, average="long")
        client.push(run_name, model(1), step=1)
        oracle.update(model(1))
        long = litema(model(1), decay=0.5)
        client.push(run_name, model(2), step=2)
        for each in (oracle, long):
            each.update(model(2))
        assert_is(client, run_name, oracle)
        found = client.pull(run_name, average="long")
        assert all(torch.equal(found[name], tensor) for name, tensor in long.shadow.items())
        assert client.snapshot(run_name, "s").averages == ("ema", "long")
        client.remove_average(run_name, "long")
        with pytest.raises(AverageNotFound):
            client.pull(run_name, average="long")
        client.push(run_name, model(3), step=3)
        oracle.update(model(3))
        assert_is(client, run_name, oracle)
        with pytest.raises(LastAverage):
            client.remove_average(run_name, "ema")
        kinds = [each.kind for each in client.timeline(run_name).entries]
        assert kinds == ["created", "average_added", "snapshot", "average_removed"]


def test_distances_are_those_of_the_whole(cluster: Launched, run_name: str) -> None:
    """Of tensors that were cut, and of groups that lie on several hosts, as of float64; a copied tensor has none."""
    shapes = {f"block.{at}.w": (40 + at, 3) for at in range(30)} | {"head.w": (7, 5), "steps": (4,)}
    drawn = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2)]
    with EmaClient(cluster.url) as client:
        client.create_run(run_name, drawn[0], decay=DECAY, copied=["steps"])
        steps = itertools.count(1)

        def measured() -> bool:
            step = next(steps)
            client.push(run_name, drawn[step % 2], step=step)
            return client.distances(run_name).step == step

        wait_until(measured)
        shadow, told, history = client.pull(run_name), client.distances(run_name), client.history(run_name)
        given = drawn[history.columns.step[-1] % 2]

    def distance(*names: str) -> float:
        apart = torch.cat([(shadow[name] - given[name]).double().flatten() for name in names])
        return float(apart.norm() / torch.cat([given[name].double().flatten() for name in names]).norm())

    assert told.tensors.pop("steps") is None
    assert told.tensors == {name: pytest.approx(distance(name), rel=2e-6) for name in told.tensors}
    assert told.tensors.keys() == given.keys() - {"steps"}
    blocks = [name for name in given if name.startswith("block")]
    assert {name: each[-1] for name, each in history.groups.items()} == {
        "block": pytest.approx(distance(*blocks), rel=2e-6),
        "head": pytest.approx(distance("head.w"), rel=2e-6),
    }


def test_a_run_branches_from_another(
    cluster: Launched, run_name: str, model: Model, litema: type[LitEmaOracle]
) -> None:
    """A new run begins with another's snapshot, and one with weights goes there, on all hosts; each goes on alone."""
    oracle, other = litema(model(0), decay=DECAY), f"{run_name}-b"
    with EmaClient(cluster.url) as client:
        client.create_run(run_name, model(0), decay=DECAY)
        client.push(run_name, model(1), step=1)
        oracle.update(model(1))
        client.snapshot(run_name, "s")
        client.push(run_name, model(2), step=2)
        made = client.create_run(other, model(9), decay=DECAY, from_snapshot=(run_name, "s"))
        assert (made.status, made.step, made.num_updates, made.checkpoint_step) == ("ready", 1, 1, 1)
        assert_is(client, other, oracle)
        client.push(other, model(3), step=2)
        assert client.run(run_name).version == "1.2"
        assert client.rewind(other, "s", from_run=run_name).step == 1
        assert_is(client, other, oracle)
        client.push(other, model(4), step=2)
        oracle.update(model(4))
        assert_is(client, other, oracle)
        with pytest.raises(RunNotFound):
            client.rewind(other, "s", from_run="never")
        client.create_run(f"{run_name}-c", {"w": torch.zeros(9, 2)})
        with pytest.raises(LayoutMismatch):
            client.rewind(f"{run_name}-c", "s", from_run=run_name)
        texts = [each.text for each in client.timeline(other).entries]
        assert texts[1:] == [f"rewound to snapshot s of run {run_name} (version 1.1, step 1)"] * 2


def test_a_name_is_used_again(cluster: Launched, run_name: str) -> None:
    """With other tensors: nothing of the earlier run is remembered."""
    with EmaClient(cluster.url) as client:
        for rows in (30, 7, 300):
            tensors = {"w": torch.randn(rows, 5), "v": torch.randn(rows)}
            client.create_run(run_name, tensors, decay=DECAY)
            assert all(torch.equal(client.pull(run_name)[name], tensor) for name, tensor in tensors.items())
            assert client.layout(run_name).layout[-1].shape == (rows, 5)
            client.delete_run(run_name)


def test_a_run_that_is_there_is_joined(cluster: Launched, run_name: str, model: Model) -> None:
    """Whoever leaves the durability out takes that of the run, and whoever names another is refused."""
    with EmaClient(cluster.url) as client:
        client.create_run(run_name, model(0), decay=DECAY, durability="disk")
        assert client.create_run(run_name, model(1), decay=DECAY, exist_ok=True).durability == "disk"
        with pytest.raises(RunExists):
            client.create_run(run_name, model(1), decay=DECAY, durability="process", exist_ok=True)


def test_a_rewind_whose_answer_was_lost(cluster: Launched, run_name: str, model: Model) -> None:
    """Asked for again it is answered, and made once, also where its snapshot is gone by then."""
    with EmaClient(cluster.url) as client, cluster.http() as http:
        client.create_run(run_name, model(0), decay=DECAY)
        client.snapshot(run_name, "good")
        key, body = {"Idempotency-Key": "of-the-rewind"}, {"snapshot": "good"}
        first = http.post(f"/v1/runs/{run_name}/rewind", json=body, headers=key).raise_for_status().json()
        client.delete_snapshot(run_name, "good")
        again = http.post(f"/v1/runs/{run_name}/rewind", json=body, headers=key).raise_for_status().json()
        assert again["version"] == first["version"] == client.run(run_name).version


@pytest.mark.parametrize("shapes", [{"w": (1, 5)}, {"scale": (), "w": (1,)}, {"none": (0, 3), "w": (1, 2)}])
def test_a_run_of_fewer_rows_than_hosts(
    cluster: Launched, run_name: str, shapes: dict[str, tuple[int, ...]], litema: type[LitEmaOracle]
) -> None:
    """A head of one row is averaged as any other run, by our client and by plain HTTP."""

    def drawn() -> dict[str, Tensor]:
        return {name: torch.randn(shape) for name, shape in shapes.items()}

    first = drawn()
    oracle = litema(first, decay=DECAY)
    with EmaClient(cluster.url) as client, cluster.http() as http:
        client.create_run(run_name, first, decay=DECAY)
        for step in range(1, 4):
            now = drawn()
            if step == 2:
                http.put(f"/v1/runs/{run_name}/updates/2", content=save(now)).raise_for_status()
            else:
                client.push(run_name, now, step=step)
            oracle.update(now)
        assert_is(client, run_name, oracle)
        sent = load(http.get(f"/v1/runs/{run_name}/weights").content)
        assert all(torch.equal(sent[name], tensor) for name, tensor in oracle.shadow.items())


def test_a_trainer_behind_its_run_is_warned(cluster: Launched, run_name: str) -> None:
    """By the digests of all hosts' slices; one that is where the run is goes on in silence."""
    torch.manual_seed(0)
    there, older = nn.Linear(4, 6), nn.Linear(4, 6)
    with EmaClient(cluster.url) as client:
        client.create_run(run_name, older.state_dict(), decay=DECAY)
        client.push(run_name, there.state_dict(), step=1)
    for model, expected in ((there, 0), (older, 1)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with RemoteEma(model, run=run_name, url=cluster.url, resume=True) as ema:
                ema(model)
        assert len([each for each in said if "count twice" in str(each.message)]) == expected


def test_remote_ema(cluster: Launched, run_name: str, litema: type[LitEmaOracle]) -> None:
    """The drop-in for LitEma trains, is read, swapped in and out, and goes on after a restart of its trainer."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(7, 13), nn.Linear(13, 5))
    oracle = litema(dict(net.named_parameters()), decay=DECAY)

    def train(ema: RemoteEma) -> None:
        for _ in range(3):
            with torch.no_grad():
                for each in net.parameters():
                    each.add_(torch.randn_like(each))
            ema(net)
            oracle.update({name: each.detach() for name, each in net.named_parameters()})
        ema.flush()

    def same(ema: RemoteEma) -> None:
        kept = {name: each.detach().clone() for name, each in net.named_parameters()}
        with ema.scope(net):
            assert all(torch.equal(each, oracle.shadow[name]) for name, each in net.named_parameters())
        assert all(torch.equal(each, kept[name]) for name, each in net.named_parameters())

    with RemoteEma(net, DECAY, run=run_name, url=cluster.url) as ema:
        train(ema)
        same(ema)
        assert int(ema.num_updates) == 3
    with EmaClient(cluster.url) as client:
        assert client.run(run_name).ended_at is not None
    with RemoteEma(net, DECAY, run=run_name, url=cluster.url, resume=True) as ema:
        train(ema)
        same(ema)


@pytest.mark.parametrize("parameter", [0, 2])
def test_weights_that_are_loaded_before_the_first_step(cluster: Launched, run_name: str, parameter: int) -> None:
    """As often as that happens, also where the parameters that changed are one host's: what is read has them all."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(7, 13), nn.Linear(13, 5))
    with RemoteEma(net, DECAY, run=run_name, url=cluster.url) as ema:
        for _ in range(3):
            with torch.no_grad():
                list(net.parameters())[parameter].add_(1.0)
            now = [each.detach().clone() for each in net.parameters()]
            for _ in range(2):
                with ema.scope(net):
                    assert all(map(torch.equal, net.parameters(), now))


def test_shared_state_is_given_again(cluster: Launched, run_name: str, model: Model) -> None:
    """The same memory with other values is another push, time after time."""
    with EmaClient(cluster.url) as client:
        shared = client.shared_state(model(0))
        client.create_run(run_name, shared, decay=DECAY)
        for seed in range(1, 4):
            shared.fill(model(seed))
            client.begin_anew(run_name, shared)
            pulled = client.pull(run_name)
            assert all(torch.equal(pulled[name], tensor) for name, tensor in model(seed).items())


def test_a_trainer_that_was_replaced_is_fenced_off(cluster: Launched, run_name: str, model: Model) -> None:
    """By one number on all hosts."""
    with EmaClient(cluster.url) as client:
        client.create_run(run_name, model(0))
        first, second = client.attach(run_name), client.attach(run_name)
        assert first < second
        client.push(run_name, model(1), step=1, writer=second)
        with cluster.http() as http:
            headers = {"Ema-Writer": str(first)}
            answer = http.put(f"/v1/runs/{run_name}/updates/2", content=save(model(2)), headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (409, "fenced")


def test_a_push_that_is_damaged_on_its_way(cluster: Launched, run_name: str, litema: type[LitEmaOracle]) -> None:
    """Large enough that the first host would have its slice long before the damage is found: it comes again, under the
    same key, and counts."""
    torch.manual_seed(5)
    first, then = ({"w": torch.randn(100_000, 64)} for _ in range(2))
    body, digest = save(then), Digest()
    digest.update(memoryview(body)[8 + int.from_bytes(body[:8], "little") :])
    damaged = bytearray(body)
    damaged[1000] ^= 1
    oracle, path = litema(first, decay=DECAY), f"/v1/runs/{run_name}/updates/1"
    head = {HEADER_DIGEST: DIGEST_FOLLOWS, HEADER_PUSH: "0" * 32}
    with EmaClient(cluster.url) as client, cluster.http() as http:
        client.create_run(run_name, first, decay=DECAY)
        for _ in range(2):
            refused = http.put(path, content=bytes(damaged) + digest.digest(), headers=head)
            assert (refused.status_code, refused.json()["code"]) == (422, "digest_mismatch")
        assert http.put(path, content=body + digest.digest(), headers=head).json()["applied"]
        oracle.update(then)
        assert_is(client, run_name, oracle)


def test_what_one_host_refuses_none_applies(cluster: Launched, run_name: str, model: Model) -> None:
    """A NaN that only the last host sees leaves all as they were."""
    with EmaClient(cluster.url) as client, cluster.http() as http:
        client.create_run(run_name, model(0))
        body = http.get(f"/v1/runs/{run_name}/weights").content
        for name in model(1):
            bad = {**model(1), name: torch.full_like(model(1)[name], float("nan"))}
            if bad[name].numel():
                answer = http.put(f"/v1/runs/{run_name}/updates/1", content=save(bad))
                assert (answer.status_code, answer.json()["code"]) == (422, "non_finite"), name
        assert http.get(f"/v1/runs/{run_name}/weights").content == body
        assert client.push(run_name, model(1), step=1).applied


# --- who is killed ---------------------------------------------------------------------------------------------------


class Reader(threading.Thread):
    """Pulls for as long as it is let, and compares. versions: weights by step. torn: what was read, and never was."""

    def __init__(self, url: str, versions: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.url, self.versions = url, versions
        self.torn: list[str] = []
        self.steps: set[int] = set()
        self.ended = threading.Event()

    def run(self) -> None:
        with EmaClient(self.url) as client:
            while not self.ended.is_set():
                with contextlib.suppress(EmaError):  # somebody was killed
                    self.look(client.pull("r"))

    def look(self, found: Weights) -> None:
        step = found.info.step or 0
        self.steps.add(step)
        expected = self.versions[step]
        self.torn += [f"{name} of {step}" for name in expected if not torch.equal(found[name], expected[name])]


class Killer(threading.Thread):
    """Kills processes of a cluster for as long as it is let, once something was written since the time before.

    versions: grows with what was written.
    """

    def __init__(self, cluster: Launched, versions: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.cluster, self.versions, self.ended = cluster, versions, threading.Event()

    def run(self) -> None:
        random = Random(5)
        while not self.ended.wait(random.random()):
            for name in random.choice([("host 0",), ("host 1",), ("coordinator",), ("gateway",), ("host 0", "host 1")]):
                self.cluster.kill(name)
            written = len(self.versions)
            while not self.ended.is_set() and len(self.versions) < written + 2:
                time.sleep(0.05)


@pytest.mark.timeout(300)
@pytest.mark.soak
@pytest.mark.parametrize("seconds", [6, 120])
def test_random_kills(own: Callable[..., Launched], seconds: float, model: Model, litema: type[LitEmaOracle]) -> None:
    """Hosts, coordinator and gateway are killed while a trainer pushes and a reader reads: every update counts once,
    and whatever is read is a version that there was."""
    cluster, oracle, versions, step = own("--local", "2"), litema(model(0), decay=DECAY), list[dict[str, Tensor]](), 0
    versions.append({name: tensor.clone() for name, tensor in oracle.shadow.items()})
    with EmaClient(cluster.url) as client:
        client.create_run("r", model(0), decay=DECAY)
        threads = Reader(cluster.url, versions), Killer(cluster, versions)
        for thread in threads:
            thread.start()
        until = time.monotonic() + seconds
        try:
            while time.monotonic() < until:
                step += 1
                oracle.update(model(step))
                versions.append({name: tensor.clone() for name, tensor in oracle.shadow.items()})
                patient(partial(client.push, "r", model(step), step=step))
        finally:
            for thread in threads:
                thread.ended.set()
                thread.join()
        patient(partial(assert_is, client, "r", oracle))
        assert (client.run("r").step, client.run("r").num_updates) == (step, step)
    assert threads[0].torn == []
    assert len(threads[0].steps) > 1


def patient(work: Callable[[], object]) -> None:
    """Do it again for as long as its errors may pass, and a minute at the most."""
    until = time.monotonic() + 60
    while True:
        try:
            work()
        except EmaError as fault:
            if not fault.retryable or time.monotonic() > until:
                raise
        else:
            return


# --- the launcher ----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_the_launchers_life(own: Callable[..., Launched], model: Model, litema: type[LitEmaOracle]) -> None:
    """A second one says that it runs; what is killed comes back; an end in order leaves nobody; a start over the same
    folder has everything; one that is killed leaves nobody either."""
    cluster = own("--local", "2")
    oracle = litema(model(0), decay=DECAY)
    second = subprocess.run(cluster.command(), capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 0
    assert "runs already" in second.stdout
    assert cluster.url in second.stdout
    token = cluster.folder / "cluster-token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    secret = token.read_text().strip()
    assert secret not in cluster.log
    assert not any(secret in " ".join(_command_line(pid)) for pid in cluster.processes().values())
    with EmaClient(cluster.url) as client:
        client.create_run("r", model(0), decay=DECAY)
        client.push("r", model(1), step=1)
        oracle.update(model(1))
        for name in ("host 0", "coordinator", "gateway"):
            cluster.kill(name)
            wait_until(lambda name=name: name in cluster.processes(), f"{name} to be started again")
        patient(lambda: client.push("r", model(2), step=2))
        oracle.update(model(2))
    pids = list(cluster.processes().values())
    assert len(pids) == 4
    assert cluster.stop() == 0
    assert all(gone(pid) for pid in pids)
    cluster.start()
    with EmaClient(cluster.url) as client:
        assert_is(client, "r", oracle)
    pids = list(cluster.processes().values())
    os.kill(cluster.process.pid, signal.SIGKILL)
    wait_until(lambda: all(gone(pid) for pid in pids), "all to end with the launcher", 60)


def _command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


@pytest.mark.timeout(240)
def test_hosts_of_other_machines(tmp_path: Path, model: Model) -> None:
    """Started through whatever reaches them, here a shell; they end with it. A host's replica is on the other one's
    machine, and is found by clients."""
    reach, command = tmp_path / "reach", tmp_path / "bin" / "ema-service"
    command.parent.mkdir()
    reach.write_text('#!/bin/sh\necho "reached $1"\nshift\nexec sh -c "$*"\n')
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m ema_service "$@"\n')
    for each in (reach, command):
        each.chmod(0o700)
    flags = ["--hosts", "left,right", "--replicas", "1", "--through", str(reach), "--announce", "127.0.0.1"]
    cluster = Launched(tmp_path / "c", *flags, "--", "--host", "127.0.0.1", programs=command.parent)
    cluster.start()
    try:
        assert "host 0 | reached left" in cluster.log
        assert "host 1 | reached right" in cluster.log
        assert "replica 0 of host 0 | reached right" in cluster.log
        assert "replica 0 of host 1 | reached left" in cluster.log
        pids = list(cluster.processes().values())
        with EmaClient(cluster.url) as client:
            client.create_run("r", model(0))
            assert client.push("r", model(1), step=1).applied
            shards = partial(client._transport.json, "GET", "/v1/runs/r/shards")
            wait_until(lambda: all(each.replicas for each in shards().parsed(RunShards).shards), "replicas", 60)
        assert cluster.stop() == 0
        assert all(gone(pid) for pid in pids)
    finally:
        cluster.end()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ([], "--local 3"),
        (["--local", "2", "--hosts", "a"], "--local 3"),
        (["--hosts", "a,-oProxyCommand=x"], "no list of machines"),
        (["--local", "0"], "--local"),
    ],
)
def test_flags_that_cannot_be_meant(tmp_path: Path, flags: list[str], word: str) -> None:
    """Are refused before anything is started."""
    cluster = Launched(tmp_path / "c", *flags)
    found = subprocess.run(cluster.command(), capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 2
    assert word in found.stderr


def test_a_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """With what to do."""
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "cluster-token").write_text("a-token-of-the-tests")
    (folder / "cluster-token").chmod(0o644)
    cluster = Launched(folder, "--local", "1")
    found = subprocess.run(cluster.command(), capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 1
    assert f"chmod 600 {folder / 'cluster-token'}" in found.stderr


def test_a_host_that_cannot_start_ends_all(tmp_path: Path) -> None:
    """With its own words, and nobody left."""
    cluster = Launched(tmp_path / "c", "--local", "2", "--", "--device", "no-such-device")
    found = subprocess.run(cluster.command(), capture_output=True, text=True, timeout=100, check=False)
    assert found.returncode == 1
    assert "no-such-device" in found.stderr
    assert "ended with status" in found.stderr


@pytest.mark.soak
def test_a_watcher_outlasts_its_hosts(own: Callable[..., Launched], run_name: str, model: Model) -> None:
    """Who watches at the gateway is told of the next version although a host was killed meanwhile, and of the end."""
    cluster = own("--local", "2")
    told: list[tuple[str, int | None]] = []

    # Two, for the end of one ends what waits there, also where the test fails.
    with EmaClient(cluster.url) as client, EmaClient(cluster.url) as watching:

        def watch() -> None:
            events = watching.watch(run_name, kinds=("version", "run_deleted"))
            told.extend((event.kind, event.step) for event in events)

        def pushed(step: int) -> bool:
            """Whether an update was taken, by hosts that may still be coming back."""
            with contextlib.suppress(EmaError):
                return client.push(run_name, model(step), step=step).step == step
            return False

        client.create_run(run_name, model(0), decay=DECAY)
        watcher = threading.Thread(target=watch)
        watcher.start()
        wait_until(lambda: told, "the version as it is")
        for step, name in ((1, "host 0"), (2, "host 1")):
            cluster.kill(name)
            wait_until(partial(pushed, step), f"step {step}")
        wait_until(lambda: ("version", 2) in told, "the version that both hosts have")
        client.delete_run(run_name)
        watcher.join(60)
    assert told[-1][0] == "run_deleted"


def test_watchers_are_told_of_snapshots(cluster: Launched, run_name: str, model: Model) -> None:
    """Once every host has one, so that it can be read at once, with the bytes of all hosts; and of a going back."""
    with EmaClient(cluster.url) as client:
        client.create_run(run_name, model(0), decay=DECAY)
        events = client.watch(run_name, kinds=("version", "snapshot_created"), timeout=30)
        first = next(events)
        taken = client.snapshot(run_name, "best")
        told = next(events)
        assert (told.kind, told.snapshot and told.snapshot.bytes) == ("snapshot_created", taken.bytes)
        client.push(run_name, model(1), step=1)
        assert next(events).step == 1
        client.rewind(run_name, "best")
        back = next(events)
        assert (back.step, back.version != first.version) == (first.step, True)
        events.close()
