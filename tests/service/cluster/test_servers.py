"""Servers that are hosts of a cluster, as processes: runs are created, trained and deleted on all of them or on none,
whoever is killed, and are bit-identical to LitEma.

Knows processes and plain HTTP. Does not know messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
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


@pytest.mark.parametrize("of", [1, 2, 3])
def test_life_of_a_run(of: int, cluster: Callable[..., Servers], model: Model, litema: type[LitEmaOracle]) -> None:
    """A run is created at any host, and is there on all; its updates, and a changed decay, a reset counter, and a
    trainer that attaches, count on all; deleted at any, it is nowhere."""
    servers, oracle, last = cluster(of).start(), litema(model(0), decay=0.9), of - 1

    assert servers.create(model(0), last, decay=0.9).status_code == 201
    assert servers.create(model(0), 0, decay=0.9).status_code == 200
    refused = servers.create(model(0), 0, decay=0.5)
    assert (refused.status_code, refused.json()["code"]) == (409, "run_exists")
    for place, info in enumerate(servers.infos()):
        assert info["shard"] == {"place": place, "of": of, "birth": 1}
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
    servers.until(
        lambda: {each.status_code for each in servers.ask_all("GET", "/v1/runs/r")} == {404}, "the run to be gone"
    )
    assert servers.create(model(0), 0, decay=0.5).status_code == 201
    assert {info["shard"]["birth"] for info in servers.infos()} == {3}
