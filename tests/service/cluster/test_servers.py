"""Servers that are hosts of a cluster, as processes: runs are created, trained and deleted on all of them or on none,
whoever is killed, and are bit-identical to LitEma.

Knows processes and plain HTTP. Does not know messages.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from tests.service.cluster.servers import Servers, cut
from tests.service.conftest import parameters

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle

Model = Callable[[int], dict[str, Tensor]]

_SECONDS = 60.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Servers]]:
    """Make clusters of so many hosts, none of which has been started."""
    made: list[Servers] = []

    def make(of: int, *arguments: str) -> Servers:
        folder = tmp_path / f"cluster-{len(made)}"
        folder.mkdir()
        made.append(Servers(folder, of, *arguments))
        return made[-1]

    yield make
    for each in made:
        each.end()


def assert_same(servers: Servers, oracle: LitEmaOracle, run: str = "r") -> None:
    """All hosts have one version, and together what LitEma has."""
    parts = zip(servers.shadows(run), cut(oracle.shadow, servers.of, parameters(0)), strict=True)
    for place, (found, expected) in enumerate(parts):
        assert found.keys() == expected.keys()
        for name, shadow in expected.items():
            assert torch.equal(found[name], shadow), f"{name} on host {place}\n{servers.log()}"
    assert len({info["version"] for info in servers.infos(run)}) == 1


@pytest.mark.parametrize("of", [pytest.param(1, marks=pytest.mark.soak), 2, pytest.param(3, marks=pytest.mark.soak)])
def test_life_of_a_run(of: int, cluster: Callable[..., Servers], model: Model, litema: type[LitEmaOracle]) -> None:
    """A run is created at any host, and is there on all; its updates, and a changed decay, a reset counter, and a
    trainer that attaches, count on all; deleted at any, it is nowhere."""
    servers, oracle, last = cluster(of).start(), litema(model(0), decay=0.9), of - 1

    assert servers.create(model(0), last, decay=0.9).status_code == 201
    assert servers.create(model(0), 0, decay=0.9).status_code == 200
    refused = servers.create(model(0), 0, decay=0.5)
    assert (refused.status_code, refused.json()["code"]) == (409, "run_exists")
    for place, info in enumerate(servers.infos()):
        whole = {"tensors": len(model(0)), "copied": 0}
        assert info["shard"] == {"place": place, "of": of, "birth": 1, **whole}
        assert info["status"] == "awaiting_weights"
    assert len({info["created_at"] for info in servers.infos()}) == 1
    config = servers.ask(last, "GET", "/v1/runs/r/config").json()
    assert (len(config["layout"]), config["decay"], config["durability"]) == (len(model(0)), 0.9, "process")

    assert [answer.status_code for answer in servers.push("weights", model(0), "first")] == [200] * of
    for step in range(1, 5):
        answers = [each.json() for each in servers.push(f"updates/{step}", model(step), f"u{step}")]
        assert [(each["applied"], each["step"]) for each in answers] == [(True, step)] * of
        oracle.update(model(step))
    assert [each.json()["applied"] for each in servers.push("updates/4", model(4), "u4")] == [False] * of

    changed = servers.ask(last, "PATCH", "/v1/runs/r", json={"decay": 0.5}, headers={"Idempotency-Key": "d"})
    assert changed.json()["decay"] == 0.5
    again = servers.ask(0, "PATCH", "/v1/runs/r", json={"decay": 0.5}, headers={"Idempotency-Key": "d"})
    assert again.json()["decay"] == 0.5
    oracle.decay = torch.tensor(0.5)
    assert servers.ask(0, "POST", "/v1/runs/r/reset-num-updates").json()["num_updates"] == 0
    oracle.num_updates = torch.tensor(0)
    writers = [
        servers.ask(place, "POST", "/v1/runs/r/writers", headers={"Idempotency-Key": "w"}).json() for place in (0, last)
    ]
    assert writers == [{"run": "r", "writer": 1}] * 2
    refusals = servers.push("updates/5", model(5), "u5")
    assert [each.json()["code"] for each in refusals] == ["fenced"] * of
    assert servers.push("updates/5", model(5), "u5", **{"Ema-Writer": "1"})[0].json()["applied"]
    oracle.update(model(5))
    assert_same(servers, oracle)

    assert servers.ask(last, "DELETE", "/v1/runs/r").status_code == 204
    servers.until(lambda: servers.at_all("/v1/runs/r") == {404}, "the run to be gone")
    assert servers.create(model(0), 0, decay=0.5).status_code == 201
    assert {info["shard"]["birth"] for info in servers.infos()} == {3}


#: Slices and parts that do not say of which push they are.
REFUSED = (
    "/weights/parts/0?of=2",
    "/updates/1/parts/0?of=2",
    "/updates/1/stretches/0-1?group=g",
    "/updates/1/parts/0/stretches/0-8?of=2&size=8",
    "/weights",
    "/updates/2",
)


def test_what_a_host_takes(cluster: Callable[..., Servers], model: Model) -> None:
    """A slice without its push's key is refused; there is no write but those that hosts were taught; a host says so
    while it hears no coordinator, and reads go on."""
    servers = cluster(1).start()
    assert servers.create(model(0)).status_code == 201
    attached = servers.ask(0, "POST", "/v1/runs/r/writers")
    assert (attached.status_code, attached.json()["writer"]) == (201, 1), "before there are weights"
    assert servers.once(0, "DELETE", "/v1/runs/r/writers/1").json()["ended_at"]
    early = servers.ask(0, "PATCH", "/v1/runs/r", json={"decay": 0.5})
    assert (early.status_code, early.json()["code"]) == (409, "awaiting_weights")
    servers.push("weights", model(0), "first")
    for path in REFUSED:
        answer = servers.once(0, "PUT", f"/v1/runs/r{path}", content=b"")
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), path
        assert re.search("cluster|shard|Ema-Push|several hosts", answer.text), f"{path}: {answer.text}"

    offered = {("POST", ""), ("PATCH", "/{run}"), ("DELETE", "/{run}"), ("POST", "/{run}/reset-num-updates")}
    offered |= {
        ("POST", "/{run}/averages"),
        ("DELETE", "/{run}/averages/{name}"),
        ("POST", "/{run}/writers"),
        ("DELETE", "/{run}/writers/{writer}"),
        ("PUT", "/{run}/weights"),
        ("PUT", "/{run}/updates/{step}"),
        ("POST", "/{run}/rewind"),
        ("PUT", "/{run}/snapshots/{name}"),
        ("POST", "/{run}/sweeps"),
        ("DELETE", "/{run}/snapshots/{name}"),
        ("PUT", "/{run}/weights/parts/{part}"),
        ("PUT", "/{run}/updates/{step}/parts/{part}"),
        ("PUT", "/{run}/updates/{step}/stretches/{start}-{stop}"),
        ("PUT", "/{run}/updates/{step}/parts/{part}/stretches/{start}-{stop}"),
    }
    paths = servers.once(0, "GET", "/openapi.json").json()["paths"]
    writes = {
        (method.upper(), path.removeprefix("/v1/runs"))
        for path, methods in paths.items()
        for method in methods
        if method not in ("get", "head")
    }
    assert writes == offered, "do hosts write it together, or each by itself? A server alone would do it on one host"

    servers.until(lambda: servers.once(0, "GET", "/readyz").status_code == 200, "a coordinator to be heard")
    assert "\nema_coordinator_away 0.0\n" in servers.once(0, "GET", "/metrics").text
    servers.coordinators.kill_coordinator()
    servers.until(lambda: servers.once(0, "GET", "/readyz").status_code == 503, "the coordinator to be missed")
    assert "\nema_coordinator_away 1.0\n" in servers.once(0, "GET", "/metrics").text
    assert servers.once(0, "GET", "/v1/runs/r/weights").status_code == 200
    servers.coordinate()
    servers.until(lambda: servers.once(0, "GET", "/readyz").status_code == 200, "a coordinator to be heard again")
    assert servers.push("updates/1", model(1), "u1", **{"Ema-Writer": "1"})[0].json()["applied"]


def test_slice_that_is_never_right(cluster: Callable[..., Servers], model: Model) -> None:
    """Where one host is sent something else than its slice, the others are told why at once, and wait for no slice."""
    servers = cluster(2).start()
    assert servers.create(model(0)).status_code == 201
    first = servers.push("weights", {**model(0), "conv.weight": model(0)["conv.weight"] * torch.nan}, "first")
    assert [each.json()["code"] for each in first] == ["non_finite"] * 2
    servers.push("weights", model(0), "again")
    slices = [save(part) for part in cut(model(1), 2)]
    answers = servers.ask_all("PUT", "/v1/runs/r/updates/1", [slices[0], slices[0]], headers={"Ema-Push": "u1"})
    assert [each.json()["code"] for each in answers] == ["layout_mismatch"] * 2
    assert [each.json()["applied"] for each in servers.push("updates/1", model(1), "u2")] == [True, True]


def test_waiting_holds_nothing(cluster: Callable[..., Servers], model: Model) -> None:
    """More slices than a server has threads for updates wait for a host that is away, and hold neither threads nor
    staging: each is voted for, and counts when the other host has come."""
    servers = cluster(2).start()
    runs = ["a", "b", "c", "d"]
    for run in runs:
        averages = [{"name": "ema", "decay": 0.9}, {"name": run, "schedule": "constant", "decay": 0.5}]
        assert servers.create(model(0), run=run, averages=averages).status_code == 201
        servers.push("weights", model(0), "first", run)
    slices = [save(part) for part in cut(model(1), 2)]
    servers.kill(1)
    key = {"Ema-Push": "u1"}
    paths = [f"/v1/runs/{run}/updates/1" for run in runs]
    puts = [partial(servers.once, 0, "PUT", path, content=slices[0], headers=key) for path in paths]
    waiting = [in_background(put) for put in puts]
    voted = '\nema_push_seconds_count{phase="commit"} 4.0\n'
    servers.until(lambda: voted in servers.once(0, "GET", "/metrics").text, "all slices to be voted for")
    assert "\nema_staging_bytes 0.0\n" in servers.once(0, "GET", "/metrics").text
    assert not any(each.done() for each in waiting)
    servers.host(1)
    for path, each in zip(paths, waiting, strict=True):
        assert servers.ask(1, "PUT", path, content=slices[1], headers=key).json()["applied"]
        assert each.result(_SECONDS).json()["applied"]
    assert servers.at_all("/v1/runs/d/weights?average=d") == {200}


def test_host_that_stops(cluster: Callable[..., Servers], model: Model, litema: type[LitEmaOracle]) -> None:
    """A host that is told to stop tells those who wait for other hosts, ends, and comes back with its vote: the slice
    that it has counts once the others have theirs."""
    servers, oracle = cluster(2).start(), litema(model(0), decay=0.9)
    assert servers.create(model(0), decay=0.9).status_code == 201
    train(servers, model, oracle)
    slices = [save(part) for part in cut(model(2), 2)]
    put = partial(servers.once, 0, "PUT", "/v1/runs/r/updates/2", content=slices[0], headers={"Ema-Push": "u2"})
    waiting = in_background(put)
    time.sleep(0.5)
    assert not waiting.done()
    assert servers.hosts[0].stop() == 0
    answer = waiting.result(_SECONDS)
    assert (answer.status_code, answer.json()["code"]) == (503, "stopping")
    servers.host(0)
    other = servers.ask(1, "PUT", "/v1/runs/r/updates/2", content=slices[1], headers={"Ema-Push": "u2"})
    assert other.json()["applied"], "by the vote that the host that stopped had kept"
    oracle.update(model(2))
    servers.until(lambda: {info["step"] for info in servers.infos()} == {2}, "the update on both")
    assert_same(servers, oracle)


def listening(servers: Servers, talk: str) -> list[tuple[str | None, bool]]:
    """The address of each who takes part in a talk, as the coordinator has it, and whether that one listens."""
    found = servers.coordinators.ask("GET", f"/v1/runs/{talk}/shards")
    return [(seat["address"], seat["listens"]) for seat in found.raise_for_status().json()["shards"]]


def test_talk_of_a_run_ends_with_the_run(cluster: Callable[..., Servers], model: Model) -> None:
    """Hosts listen to a coordinator about a run as long as there is the run: a host of many runs that come and go
    would have ever more connections."""
    servers = cluster(2).start()
    assert servers.create(model(0)).status_code == 201
    servers.until(lambda: [each for _, each in listening(servers, "r@1")] == [True, True], "both to listen")
    assert servers.ask(0, "DELETE", "/v1/runs/r").status_code == 204
    servers.until(lambda: [each for _, each in listening(servers, "r@1")] == [False, False], "both to end the talk")
    assert [each for _, each in listening(servers, "-directory")] == [True, True]


def test_address_that_a_host_was_given_is_told(cluster: Callable[..., Servers], model: Model) -> None:
    """Others reach a host by the address of --cluster-address, behind a name of its own, say; by default by the one
    that it listens at."""
    servers = cluster(2)
    servers.coordinate()
    servers.host(0, "--cluster-address", "http://ema-0.example:8470")
    servers.host(1)
    assert servers.create(model(0)).status_code == 201
    for talk in ("-directory", "r@1"):
        addresses = [address for address, _ in listening(servers, talk)]
        assert addresses == ["http://ema-0.example:8470", servers.hosts[1].url]


def test_damaged_run_is_deleted(cluster: Callable[..., Servers], model: Model) -> None:
    """A run whose weights are gone on one host takes no updates on any, and is deleted from all."""
    servers = cluster(2, "--no-measurements").start()
    assert servers.create(model(0), durability="disk").status_code == 201
    servers.push("weights", model(0), "first")
    servers.kill(1)
    for path in (servers.folder / "host-1" / "data" / "runs").rglob("*.safetensors"):
        path.write_bytes(b"")
    servers.host(1)
    assert [info["status"] for info in servers.infos()] == ["ready", "degraded"]
    assert servers.ask(0, "DELETE", "/v1/runs/r").status_code == 204
    servers.until(lambda: servers.at_all("/v1/runs/r") == {404}, "the run to be gone")


def test_machine_goes_down(
    cluster: Callable[..., Servers], model: Model, litema: type[LitEmaOracle], ram_dir: Path
) -> None:
    """Checkpoints are taken of one version on all hosts; where the memory of one is lost, all go back to that, in a new
    epoch, and the trainer goes on with its next step."""
    servers = cluster(2, "--checkpoint-interval", "2", "--ram-dir", str(ram_dir)).start()
    oracle = litema(model(0), decay=0.9)
    assert servers.create(model(0), decay=0.9).status_code == 201
    train(servers, model, oracle)
    servers.until(lambda: {info["checkpoint_step"] for info in servers.infos()} == {1}, "a checkpoint")
    assert [each.json()["version"] for each in servers.push("updates/2", model(2), "u2")] == ["1.2"] * 2
    servers.kill(1)
    [memory] = [path.parent for path in ram_dir.glob("*/owner") if "host-1" in path.read_text()]
    shutil.rmtree(memory)
    servers.host(1)
    servers.until(lambda: {info["version"] for info in servers.infos()} == {"2.1"}, "both to go back")
    assert_same(servers, oracle)
    assert [each.json()["version"] for each in servers.push("updates/3", model(3), "u3")] == ["2.2"] * 2
    oracle.update(model(3))
    assert_same(servers, oracle)
    assert all("back at step 1" in each.text for each in servers.ask_all("GET", "/v1/runs/r/timeline"))


def in_background(work: Callable[[], Any]) -> Future[Any]:
    """What ``work`` returns, on a thread of its own."""
    threads = ThreadPoolExecutor(1)
    try:
        return threads.submit(work)
    finally:
        threads.shutdown(wait=False)


def answer_of(servers: Servers, asked: Future[Any]) -> Any:
    """What came of a request in the background."""
    assert wait([asked], _SECONDS).done, servers.log()
    return asked.result()


def train(servers: Servers, model: Model, oracle: LitEmaOracle) -> None:
    """Give the initial weights and an update to a new run, and look at what all have."""
    assert [each.status_code for each in servers.push("weights", model(0), "first")] == [200] * servers.of
    assert [each.status_code for each in servers.push("updates/1", model(1), "u1")] == [200] * servers.of
    oracle.update(model(1))
    assert_same(servers, oracle)


#: Where a host ends itself, and which: the one that is asked is host 0.
DEATHS = {("after vote", 0), ("made", 1), ("before commit", 0)}
POINTS = ("before vote", "after vote", "made", "before commit", "after commit", "hear", "answer")
LONG = {*product(POINTS, (0, 1))} - DEATHS


@pytest.mark.parametrize(
    ("point", "victim"), [*sorted(DEATHS), *(pytest.param(*each, marks=pytest.mark.soak) for each in sorted(LONG))]
)
def test_host_is_killed_as_a_run_comes_and_goes(
    point: str, victim: int, cluster: Callable[..., Servers], model: Model, litema: type[LitEmaOracle]
) -> None:
    """A run is created on both hosts, and then deleted on both, although one of them is killed meanwhile, the one that
    was asked or the other; nothing of a run that is gone is left."""
    servers = cluster(2)
    servers.coordinate()
    servers.host(1 - victim)
    servers.host(victim, kill=f"{point} {4 if point == 'hear' else 1}")
    created = in_background(lambda: servers.create(model(0), decay=0.9))
    servers.wait_for_end(victim)
    # What was not kept is done again before the deletion is.
    again = f"{point} {2 if point.startswith('before') else 1}"
    servers.host(victim, kill="" if point in ("made", "hear") else again)
    assert created.result(_SECONDS).status_code in (200, 201)
    train(servers, model, litema(model(0), decay=0.9))

    deleted = in_background(lambda: servers.ask(0, "DELETE", "/v1/runs/r"))
    if point not in ("made", "hear"):
        servers.wait_for_end(victim)
        servers.host(victim)
    assert deleted.result(_SECONDS).status_code in (204, 404)
    servers.until(lambda: servers.at_all("/v1/runs/r") == {404}, "the run to be gone")
    assert servers.create(model(0), decay=0.5).status_code == 201
    assert servers.at_all("/v1/runs/r") == {200}
    assert [len(servers.folders(place)) for place in range(2)] == [1, 1]
    train(servers, model, litema(model(0), decay=0.5))


@pytest.mark.parametrize("point", ["before abort", "after abort"])
def test_refusal_by_one_host(point: str, cluster: Callable[..., Servers], model: Model) -> None:
    """Where one host has no room the run is on none, also where the other is killed as it learns so; and whoever comes
    again gets the run."""
    servers = cluster(2)
    servers.coordinate()
    servers.host(0, kill="refuse 1")
    servers.host(1, kill=f"{point} 1")
    layout = [{"name": "w", "shape": [8, 2], "dtype": "F32"}]
    refused = servers.once(0, "POST", "/v1/runs", json={"run": "r", "layout": layout})
    assert (refused.status_code, refused.json()["detail"]) == (503, "host 0: no room")
    servers.wait_for_end(1)
    assert servers.once(0, "GET", "/v1/runs/r").status_code == 404
    servers.host(1)
    assert servers.create(model(0)).status_code == 201
    assert servers.at_all("/v1/runs/r") == {200}
    assert [len(servers.folders(place)) for place in range(2)] == [1, 1]


@pytest.mark.parametrize(
    "kill",
    [
        "hear 3",
        "say 3",
        "say 7",
        *(pytest.param(each, marks=pytest.mark.soak) for each in ("decide 2", "say 5", "hear 7")),
    ],
)
def test_coordinator_is_killed(
    kill: str, cluster: Callable[..., Servers], model: Model, litema: type[LitEmaOracle]
) -> None:
    """A run is created, trained and deleted, although the coordinator is killed at one of its messages."""
    servers = cluster(2)
    servers.coordinate(kill)
    for place in range(2):
        servers.host(place)

    def supervise() -> None:
        servers.until(servers.coordinators.coordinator_is_gone, "the end of the coordinator")
        servers.coordinate()

    again = in_background(supervise)
    assert servers.create(model(0), decay=0.9).status_code in (200, 201)
    train(servers, model, litema(model(0), decay=0.9))
    assert servers.ask(1, "DELETE", "/v1/runs/r").status_code in (204, 404)
    servers.until(lambda: servers.at_all("/v1/runs/r") == {404}, "the run to be gone")
    again.result(_SECONDS)


def test_name_comes_again_while_a_host_is_down(
    cluster: Callable[..., Servers], model: Model, litema: type[LitEmaOracle]
) -> None:
    """A run is deleted, and its name used again, while a host is down that has a slice of an update in hand which no
    other host has: when it comes back it has the new run, and none of its old slice is in it."""
    servers = cluster(2)
    servers.coordinate()
    servers.host(0)
    servers.host(1, kill="before commit 2")
    assert servers.create(model(0), decay=0.9).status_code == 201
    train(servers, model, litema(model(0), decay=0.9))
    orphan = save(cut(model(7), 2)[1])
    with pytest.raises(httpx.ReadTimeout):
        httpx.put(
            f"{servers.hosts[1].url}/v1/runs/r/updates/2", content=orphan, headers={"Ema-Push": "orphan"}, timeout=1
        )
    deleted = in_background(lambda: servers.ask(0, "DELETE", "/v1/runs/r"))
    servers.wait_for_end(1)
    servers.until(lambda: servers.once(0, "GET", "/v1/runs/r").status_code == 404, "the run to be gone on one host")
    created = in_background(lambda: servers.create(model(0), decay=0.5))
    time.sleep(0.5)
    assert not deleted.done(), "a host has the run yet"
    assert not created.done()
    servers.host(1)
    assert deleted.result(_SECONDS).status_code == 204
    assert created.result(_SECONDS).status_code == 201
    assert [info["shard"]["birth"] for info in servers.infos()] == [3, 3]
    train(servers, model, litema(model(0), decay=0.5))


def kill_some(servers: Servers, random: Random) -> None:
    """Kill hosts, the coordinator, or nobody, and start them again."""
    time.sleep(random.random() * 0.05)
    for victim in random.choice([(), ("coordinator",), (0,), (1,), (0, 1), ("coordinator", 0, 1)]):
        if isinstance(victim, int):
            servers.kill(victim)
            servers.host(victim)
        else:
            servers.coordinators.kill_coordinator()
            servers.coordinate()


@pytest.mark.parametrize("seconds", [4, pytest.param(120, marks=pytest.mark.soak)])
def test_random_kills(
    seconds: float, cluster: Callable[..., Servers], model: Model, litema: type[LitEmaOracle]
) -> None:
    """Whoever is killed meanwhile, each update, each changed decay and each trainer counts once on both hosts."""
    servers, random, step, writer = cluster(2).start(), Random(5), 0, 0
    oracle = litema(model(0), decay=0.9)
    assert servers.create(model(0), decay=0.9).status_code == 201
    servers.push("weights", model(0), "first")
    until = time.monotonic() + seconds
    while step < 4 or time.monotonic() < until:
        step += 1
        headers = {"Ema-Writer": str(writer)} if writer else {}
        pushed = in_background(partial(servers.push, f"updates/{step}", model(step), f"u{step}", **headers))
        kill_some(servers, random)
        assert [each.status_code for each in answer_of(servers, pushed)] == [200, 200], servers.log()
        oracle.update(model(step))
        decay, key = random.choice([0.25, 0.5, 0.75]), {"Idempotency-Key": f"d{step}"}
        asked = in_background(partial(servers.ask, 0, "PATCH", "/v1/runs/r", json={"decay": decay}, headers=key))
        kill_some(servers, random)
        assert answer_of(servers, asked).json()["decay"] == decay
        oracle.decay = torch.tensor(decay)
        if step % 3 == 0:
            key = {"Idempotency-Key": f"w{step}"}
            writer = servers.ask(1, "POST", "/v1/runs/r/writers", headers=key).json()["writer"]
    assert_same(servers, oracle)
    for place in range(2):
        servers.kill(place)
        servers.host(place)
    assert_same(servers, oracle)
    assert {info["writer"] for info in servers.infos()} == {writer}
