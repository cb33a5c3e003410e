"""Large weights between our client and the hosts of a run, past the gateway: bit-identical, of one version, and by way
of the gateway where a host is not reached.

Knows the cluster's processes, and which of them is stopped or killed. Does not know how hosts decide.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ema_client import EmaClient, RemoteEma
from ema_client.errors import ConnectionLost, EmaError, LayoutMismatch, RunExists
from ema_client.hosts.finding import HostedRun
from ema_client.http.body import Body
from ema_client.http.retry import RetryPolicy
from ema_client.http.transport import Transport
from ema_client.protocol import RunShards
from ema_client.states import part_body_of
from ema_client.wire import Box
from tests.conftest import LitEmaOracle
from tests.service.cluster.launched import Launched
from tests.service.runs.gatherer import cut

DECAY = 0.9
SHAPE = 900, 1000
#: Bytes of a model.
SIZE = 4 * (900 * 1000 + 700)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """Three hosts."""
    found = Launched(tmp_path_factory.mktemp("cluster") / "all", "--local", "3").start()
    yield found
    found.end()


@pytest.fixture
def client(cluster: Launched) -> Iterator[EmaClient]:
    with client_of(cluster) as client:
        yield client


def client_of(cluster: Launched) -> EmaClient:
    """A client to which a megabyte is as large as many are to others."""
    client = EmaClient(cluster.url)
    client._pushes._stretched_above = client._pulls._pulls._split_above = 1 << 20
    return client


def model(seed: int) -> dict[str, Tensor]:
    """The cuts go through ``w``."""
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(*SHAPE, generator=generator), "b": torch.randn(700, generator=generator)}


@contextlib.contextmanager
def stopped(cluster: Launched, name: str) -> Iterator[None]:
    """Within the block one of the processes stands still."""
    pid = cluster.processes()[name]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def hosted(client: EmaClient, run: str) -> HostedRun:
    """The hosts that a client has found."""
    found = client._hosts.of(run)
    assert found is not None
    return found


def received(cluster: Launched) -> float:
    """Bytes of bodies that the gateway has received."""
    with cluster.http() as http:
        found = re.search(r"^ema_gateway_received_bytes_total (\S+)$", http.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], each) for name, each in expected.items())


def test_the_map(cluster: Launched, client: EmaClient, run_name: str) -> None:
    """Which rows are where, and that each host is reached there."""
    client.create_run(run_name, model(0), decay=DECAY)
    with cluster.http() as http:
        told = http.get(f"/v1/runs/{run_name}/shards").raise_for_status().json()
    assert [each["place"] for each in told["shards"]] == [0, 1, 2]
    rows = {place: host.rows["w"] for place, host in enumerate(hosted(client, run_name).hosts) if "w" in host.rows}
    assert [rows[0][0], rows[0][1], rows[1][1], rows[2][1]] == [0, rows[1][0], rows[2][0], 900]
    assert client._transport.json("GET", f"/v1/runs/{run_name}/shards").parsed(RunShards).run == run_name


def test_nothing_large_goes_through_the_gateway(
    cluster: Launched, client: EmaClient, run_name: str, litema: type[LitEmaOracle]
) -> None:
    """Updates, pulls and a copy to a model work on while the gateway stands still, bit for bit as LitEma does."""
    oracle = litema(model(0), decay=DECAY)
    client.create_run(run_name, model(0), decay=DECAY)
    came: list[int] = []
    for step in (1, 2):
        client.push(run_name, model(step), step=step)
        oracle.update(model(step))
        assert same(client.pull(run_name), oracle.shadow)
    target = nn.ParameterDict({name: nn.Parameter(torch.zeros_like(each)) for name, each in model(0).items()})
    client.copy_to(run_name, target)
    with stopped(cluster, "gateway"):
        for step in (3, 4):
            result = client.push(run_name, model(step), step=step, progress=lambda sent, _: came.append(sent))
            assert result.applied
            oracle.update(model(step))
            out = {name: torch.empty_like(each) for name, each in model(0).items()}
            weights = client.pull(run_name, out=out, progress=lambda sent, _: came.append(-sent))
            assert (weights.info.step, weights["w"] is out["w"]) == (step, True)
            assert same(weights, oracle.shadow)
        info = client.copy_to(run_name, target)
    assert info.step == 4
    assert same({name: each.detach() for name, each in target.items()}, oracle.shadow)
    assert -min(came) == SIZE <= max(came)
    client.delete_run(run_name)


def test_casts(client: EmaClient, run_name: str) -> None:
    """Weights of another dtype come from the hosts as the gateway would have sent them."""
    tensors = {"w": torch.randn(*SHAPE)}
    client.create_run(run_name, tensors, decay=DECAY)
    for _ in range(2):
        found = client.pull(run_name, dtype=torch.float16)
        assert torch.equal(found["w"], tensors["w"].half())
    assert client._pulls._entries
    client.delete_run(run_name)


def test_a_pull_under_updates_is_never_torn(cluster: Launched, client: EmaClient, run_name: str) -> None:
    """Every row of a pull is of one version, while a trainer pushes as fast as it can."""
    state = {"w": torch.zeros(SHAPE)}
    client.create_run(run_name, state, decay=0.0, use_num_updates=False)
    ended, faults = threading.Event(), list[EmaError]()

    def train() -> None:
        with client_of(cluster) as trainer:
            step = 0
            while not ended.is_set():
                step += 1
                try:
                    trainer.push(run_name, {"w": torch.full(SHAPE, float(step))}, step=step)
                except EmaError as fault:
                    faults.append(fault)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        seen = []
        for _ in range(30):
            weights = client.pull(run_name)
            assert weights["w"].min() == weights["w"].max() == float(weights.info.step or 0)
            seen.append(weights.info.step)
    finally:
        ended.set()
        thread.join()
    assert faults == []
    assert len(set(seen)) > 2
    client.delete_run(run_name)


def test_a_host_is_killed(tmp_path: Path, litema: type[LitEmaOracle]) -> None:
    """A host that comes back at another address is found by way of the gateway, and nothing acknowledged is lost."""
    cluster = Launched(tmp_path / "all", "--local", "2").start()
    try:
        oracle = litema(model(0), decay=DECAY)
        with client_of(cluster) as client:
            client.create_run("r", model(0), decay=DECAY)
            for step in range(1, 7):
                if step % 2 == 0:
                    cluster.kill(f"host {step // 2 % 2}")
                client.push("r", model(step), step=step)
                oracle.update(model(step))
                assert same(client.pull("r"), oracle.shadow)
            assert client.run("r").num_updates == 6
    finally:
        cluster.end()


def part_of(tensors: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], dict[str, list[Box]]]:
    """What one of two ranks has: half of the columns of each tensor; and which they are."""
    slices = cut(tensors, -1, rank, 2)
    state = {
        name: tensors[name][tuple(slice(*axis) for axis in boxes[0])].contiguous() for name, boxes in slices.items()
    }
    return state, {name: list(boxes) for name, boxes in slices.items()}


def test_parts_go_past_the_gateway(
    cluster: Launched, client: EmaClient, run_name: str, litema: type[LitEmaOracle]
) -> None:
    """Each host is sent what a rank has of its rows, while the gateway stands still."""
    oracle = litema(model(0), decay=DECAY)
    client.create_run(run_name, model(0), decay=DECAY)
    client.push(run_name, model(1), step=1)
    oracle.update(model(1))
    with stopped(cluster, "gateway"):
        for step in (2, 3):
            for rank in (0, 1):
                state, slices = part_of(model(step), rank)
                last = client.push_part(run_name, state, slices=slices, step=step, part=rank, of=2, group="g")
                assert last is bool(rank)
            oracle.update(model(step))
    assert same(client.pull(run_name), oracle.shadow)
    client.delete_run(run_name)


def test_a_host_loses_parts(tmp_path: Path, litema: type[LitEmaOracle]) -> None:
    """A host that was killed is sent its rows of a part again, and the others nothing; a later step waits until it has
    those of the earlier one."""
    cluster = Launched(tmp_path / "all", "--local", "2").start()
    try:
        oracle = litema(model(0), decay=DECAY)
        with client_of(cluster) as client:
            client.create_run("r", model(0), decay=DECAY)
            client.push("r", model(1), step=1)
            oracle.update(model(1))
            moved: dict[tuple[int, int], int] = {}

            def send(step: int, rank: int, bodies: dict[tuple[int, int], Body]) -> bool:
                if (step, rank) not in bodies:
                    bodies[step, rank] = part_body_of(*part_of(model(step), rank))
                body = replace(bodies[step, rank], moved=lambda sent: moved.update({(step, rank): sent}))
                return client.push_part_once("r", body, step=step, part=rank, of=2, group="g")

            bodies: dict[tuple[int, int], Body] = {}
            assert not send(2, 0, bodies)
            whole = moved[2, 0]
            cluster.kill("host 1")
            with pytest.raises(ConnectionLost, match="lacks parts of step 2"):
                send(3, 0, bodies)
            assert not send(2, 0, bodies)
            assert 0.3 * whole < moved[2, 0] < 0.7 * whole
            assert not send(3, 0, bodies)
            for step in (2, 3):
                assert send(step, 1, bodies)
                oracle.update(model(step))
            assert send(3, 0, bodies), "applied"
            assert same(client.pull("r"), oracle.shadow)
    finally:
        cluster.end()


def test_a_trainer_changes_one_line(cluster: Launched, run_name: str, litema: type[LitEmaOracle]) -> None:
    """RemoteEma at the gateway's address: its updates, from memory of its own, go straight to the hosts."""
    torch.manual_seed(0)
    net = nn.Linear(4000, 4500)
    state = {name: each.detach().clone() for name, each in net.named_parameters()}
    oracle, before = litema(state, decay=DECAY), received(cluster)
    with RemoteEma(net, DECAY, run=run_name, url=cluster.url) as ema:
        for step in range(1, 4):
            if step == 3:
                ema.flush()
                os.kill(cluster.processes()["gateway"], signal.SIGSTOP)
            with torch.no_grad():
                for each in net.parameters():
                    each.add_(0.1)
            ema(net)
            oracle.update({name: each.detach() for name, each in net.named_parameters()})
            ema.flush()
        os.kill(cluster.processes()["gateway"], signal.SIGCONT)
    assert received(cluster) - before < 1 << 20, "the initial weights, or an update, went through the gateway"
    with EmaClient(cluster.url) as client:
        assert same(client.pull(run_name), oracle.shadow)
        client.delete_run(run_name)


def test_initial_weights_go_past_the_gateway(cluster: Launched, client: EmaClient, run_name: str) -> None:
    """Those that a run is made with, also where a host is killed in the middle; and those that a model was loaded with
    since. A run that is made again under its name has hosts of its own."""
    before, halves = received(cluster), list[int]()

    def kill_once(sent: int, size: int) -> None:
        if sent > size // 2 and not halves:
            halves.append(sent)
            cluster.kill("host 1", wait=False)

    info = client.create_run(run_name, model(0), decay=DECAY, progress=kill_once)
    assert (info.status, len(halves)) == ("ready", 1)
    assert same(client.pull(run_name), model(0))
    assert client.begin_anew(run_name, model(1)).num_updates == 0
    assert same(client.pull(run_name), model(1))
    client.delete_run(run_name)
    client.create_run(run_name, {"w": model(2)["w"]}, decay=DECAY)
    assert same(client.pull(run_name), {"w": model(2)["w"]})  # and nothing of what the name had before
    with pytest.raises(RunExists):
        client.create_run(run_name, {"w": model(2)["w"]}, decay=DECAY)
    client.delete_run(run_name)
    wider = {"w": model(3)["w"], "b": model(3)["b"].double()}
    client.create_run(run_name, wider, decay=DECAY)
    for _ in range(2):  # the second one from the hosts, by what the first one was told
        assert same(client.pull(run_name), wider)
    client.delete_run(run_name)
    client.create_run(run_name, model(4), decay=DECAY)
    assert same(client.pull(run_name), model(4))
    client.delete_run(run_name)
    assert received(cluster) - before < 1 << 20


def test_other_bytes_than_the_run_has(client: EmaClient, run_name: str) -> None:
    """An update that is too short is refused before anything is sent; the gateway says what is wrong."""
    client.create_run(run_name, model(0), decay=DECAY)
    client.push(run_name, model(1), step=1)
    with pytest.raises(LayoutMismatch):
        client.push(run_name, {"w": torch.zeros(800, 1000), "b": torch.zeros(700)}, step=2)
    assert client.run(run_name).step == 1
    client.delete_run(run_name)


@pytest.mark.parametrize("elsewhere", ["nobody", "the gateway"])
def test_hosts_that_are_not_reached(
    cluster: Launched,
    client: EmaClient,
    run_name: str,
    litema: type[LitEmaOracle],
    monkeypatch: pytest.MonkeyPatch,
    elsewhere: str,
) -> None:
    """Where nobody listens at a host's address, or another server does, the gateway sends and receives all, and the
    hosts are not tried again with each body."""
    asked: list[str] = []
    beside = Transport.beside

    def astray(self: Transport, url: str, retry: RetryPolicy) -> Transport:
        asked.append(url)
        return beside(self, "http://127.0.0.1:1" if elsewhere == "nobody" else cluster.url, retry)

    monkeypatch.setattr(Transport, "beside", astray)
    oracle = litema(model(0), decay=DECAY)
    client.create_run(run_name, model(0), decay=DECAY)
    for step in (1, 2, 3):
        assert client.push(run_name, model(step), step=step).applied
        oracle.update(model(step))
        assert same(client.pull(run_name), oracle.shadow)
    assert len(asked) == 3
    client.delete_run(run_name)


def test_tensors_of_another_run_are_refused(cluster: Launched, client: EmaClient, run_name: str) -> None:
    """Of as many bytes as the run's, by the first push of a client as by a later one, and as initial weights: hosts are
    sent rows without the names that the sender has for them."""
    client.create_run(run_name, model(0), decay=0.0, use_num_updates=False)
    renamed = {"x" + name: each for name, each in model(1).items()}
    turned = {name: each.reshape(-1) for name, each in model(1).items()}
    with client_of(cluster) as fresh:
        for pushing in (fresh, client):
            for others in (renamed, turned):
                with pytest.raises(LayoutMismatch):
                    pushing.push(run_name, others, step=1)
                with pytest.raises(LayoutMismatch):
                    pushing.begin_anew(run_name, others)
            assert same(client.pull(run_name), model(0))
    assert client.push(run_name, model(1), step=1).applied
    assert torch.allclose(client.pull(run_name)["w"], model(1)["w"], atol=1e-5)
    client.delete_run(run_name)


def test_a_run_made_anew(cluster: Launched, client: EmaClient, run_name: str) -> None:
    """A client that knows the hosts of a run finds those of the run that came in its place, of other tensors."""
    other = {"w": torch.randn(1200, 900), "v": torch.randn(500, 900)}
    client.create_run(run_name, model(0), decay=DECAY)
    client.push(run_name, model(1), step=1)
    assert same(client.pull(run_name), client.pull(run_name))
    with client_of(cluster) as second:
        second.delete_run(run_name)
        second.create_run(run_name, other, decay=0.0, use_num_updates=False)
    assert same(client.pull(run_name), other)
    later = {name: each + 1 for name, each in other.items()}
    assert client.push(run_name, later, step=1).applied
    assert same(client.pull(run_name), later)
    client.delete_run(run_name)
