"""Sharded trainers whose run lies on several hosts: real ranks that talk gloo, a real cluster, RemoteEma unchanged; bit
for bit the EMA of the same model unsharded, whoever is killed.

Knows the cluster's processes, and who is killed when. Does not know how hosts put parts together (test_parts.py), or
what a rank does (tests/e2e/ranks.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ema_client import EmaClient
from ema_client.errors import EmaError
from tests.e2e.sharded_trainers import WIDTHS, Trainer, assert_same, at, train
from tests.service.cluster.launched import Launched
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle

Launch = Callable[[int], Launched]

WIDTH = 13


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start a cluster of so many hosts."""
    started: list[Launched] = []

    def start(hosts: int) -> Launched:
        started.append(Launched(tmp_path / "cluster", "--local", str(hosts)).start())
        return started[-1]

    yield start
    for each in started:
        each.end()


def scene(cluster: Launched, run: str, how: str, steps: list[int], **more: Any) -> dict[str, Any]:
    return {"url": cluster.url, "run": run, "how": how, "steps": steps, "width": WIDTHS.get(how, WIDTH), **more}


def expected(litema: type[LitEmaOracle], width: int, steps: list[int], first: int = 0) -> dict[str, Any]:
    """What LitEma in one process makes of the unsharded model. first: which step's weights it begins with."""
    oracle = litema(at(width, first), decay=0.9)
    for step in steps:
        oracle.update(at(width, step))
    return dict(oracle.shadow)


def assert_litema(cluster: Launched, run: str, litema: type[LitEmaOracle], steps: list[int], **more: Any) -> None:
    with EmaClient(cluster.url) as client:
        assert_same(client, run, expected(litema, more.pop("width", WIDTH), steps, **more))
        assert client.run(run).num_updates == len(steps)


@pytest.mark.parametrize(
    ("hosts", "straight"),
    [(3, True), *(pytest.param(*each, marks=pytest.mark.soak) for each in ((1, False), (2, False), (2, True)))],
)
def test_two_ranks(hosts: int, straight: bool, launch: Launch, tmp_path: Path, litema: type[LitEmaOracle]) -> None:
    """FSDP2's ranks, and rank 0 of DDP, give the unsharded EMA past the gateway and through it; copy_to() and scope()
    give each rank its own; what was loaded after the constructor counts."""
    cluster, steps = launch(hosts), [1, 2, 3]
    scenes = [scene(cluster, how, how, steps) for how in ("fsdp2", "ddp")]
    loaded: dict[str, Any] = {"loaded": 9, "loaded by": None}
    scenes += [scene(cluster, f"loaded-{how}", how, [1], **loaded) for how in ("fsdp2", "ddp")]
    said = Trainer(tmp_path / "ranks", 2, scenes, straight=straight).end()
    for how in ("fsdp2", "ddp"):
        assert_litema(cluster, how, litema, steps)
        for rank in said[how]:
            assert all(rank[what] for what in ("inside", "changed", "after", "own")), rank
        assert_litema(cluster, f"loaded-{how}", litema, [1], first=9)
    assert [rank["sent"] for rank in said["fsdp2"]] == [3, 3]


@pytest.mark.soak
def test_four_ranks(launch: Launch, tmp_path: Path, litema: type[LitEmaOracle]) -> None:
    """Tensor parallelism under FSDP, columns, replicas, and FSDP1's flat ranges, past the gateway: some ranks have
    nothing for some hosts."""
    cluster, kinds = launch(3), ("tp", "columns", "hsdp", "fsdp1")
    said = Trainer(tmp_path / "ranks", 4, [scene(cluster, how, how, [1, 2]) for how in kinds], straight=True).end()
    for how in kinds:
        assert_litema(cluster, how, litema, [1, 2], width=WIDTHS.get(how, WIDTH))
        assert all(rank["own"] for rank in said[how])


@pytest.mark.parametrize(
    "victim",
    [pytest.param(each, marks=pytest.mark.soak) for each in ("host 0", "host 1", "coordinator", "gateway")],
)
def test_killed_while_ranks_train(victim: str, launch: Launch, tmp_path: Path, litema: type[LitEmaOracle]) -> None:
    """SIGKILL of a process of the cluster, twice in a training of two ranks: each update counts on all hosts, once; or,
    where the ranks go on alone because a host was away for long, on none."""
    cluster, steps = launch(2), [*range(1, 51)]
    trainer = Trainer(tmp_path / "ranks", 2, [scene(cluster, "r", "fsdp2", steps, pause=0.1)], straight=True)
    with EmaClient(cluster.url) as client:
        for step in (5, 25):
            wait_until(lambda step=step: _reached(client, step), f"step {step}", 90.0)
            cluster.kill(victim)
        said = trainer.end()["r"]
        applied = _applied(client, steps, spared=0 if victim == "host 1" else 1)
    if not any(rank["left out"] for rank in said):
        assert applied == steps
    assert applied[-1] == steps[-1]
    assert_litema(cluster, "r", litema, applied)


def _reached(client: EmaClient, step: int) -> bool:
    with contextlib.suppress(EmaError):  # the run is yet to be made, or somebody is being killed
        return (client.run("r").step or 0) >= step
    return False


def _applied(client: EmaClient, steps: list[int], spared: int) -> list[int]:
    """The steps that were applied, by the host that was never killed and has them all in mind."""
    hosts = client._hosts.of("r")
    assert hosts
    with EmaClient(hosts.hosts[spared].shard.address) as host:
        return [step for step in steps if host.update_status("r", step).state == "applied"]


@pytest.mark.soak
def test_a_rank_is_killed(launch: Launch, tmp_path: Path, litema: type[LitEmaOracle]) -> None:
    """A rank that dies half way leaves the EMA as it was, on all hosts; the training goes on with another number of
    ranks, which is started again."""
    cluster = launch(2)
    Trainer(tmp_path / "two", 2, [scene(cluster, "r", "fsdp2", [1, 2], killed=1)], straight=True).end(killed=1)
    assert_litema(cluster, "r", litema, [1])
    train(tmp_path / "three", 3, [scene(cluster, "r", "fsdp2", [3, 4], resume=True)])
    assert_litema(cluster, "r", litema, [1, 3, 4])
