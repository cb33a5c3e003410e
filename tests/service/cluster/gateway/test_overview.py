"""What a gateway says of its hosts and of a run's shards, with all of them there and with one away.

Knows the routes. Does not know the page that shows them (e2e/test_gateway_pages.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch

from ema_client import EmaClient
from ema_service.tokens import create_token
from tests.conftest import PlainRun, ServerProcess
from tests.service.cluster.launched import Launched
from tests.service.cluster.plain_hosts import PlainHosts
from tests.service.cluster.servers import cut

STATE = {"first": torch.ones(8, 4), "last": torch.zeros(6)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    folder = tmp_path_factory.mktemp("cluster")
    found = Launched(folder / "all", "--local", "2").start()
    yield found
    found.end()


def test_hosts_are_told(cluster: Launched) -> None:
    """Where each is, since when the coordinator hears it, and what it has; and the coordinator's number."""
    with cluster.http() as http:
        told = http.get("/v1/hosts").raise_for_status().json()
        assert http.get("/v1/server").json()["hosts"] == 2
    assert told["term"] >= 1
    assert [each["place"] for each in told["hosts"]] == [0, 1]
    for each in told["hosts"]:
        assert each["address"].startswith("http://127.0.0.1:")
        assert (each["listens"], each["fault"]) == (True, None)
        assert 1.7e9 < each["since"] < 1e11
        assert each["server"]["memory_limit_bytes"] > 0


def test_shards_are_told(cluster: Launched, run_name: str) -> None:
    """Which rows each has, one after the other; revision and version, the same on all."""
    with EmaClient(cluster.url) as client, cluster.http() as http:
        client.create_run(run_name, STATE)
        client.push(run_name, STATE, step=1)
        told = http.get(f"/v1/runs/{run_name}/hosts").raise_for_status().json()
        missing = http.get("/v1/runs/nobody/hosts")
    first, last = told["shards"]
    assert (told["fault"], first["start"], first["stop"], last["stop"]) == (None, 0, last["start"], 4 * (32 + 6))
    assert first["first"] == ["first", 0]
    assert last["last"] == ["last", 5]
    assert last["first"] == ["first", first["last"][1] + 1]
    assert first["revision"] == last["revision"] == 2
    assert [each["info"]["step"] for each in told["shards"]] == [1, 1]
    assert (missing.status_code, missing.json()["code"]) == (404, "run_not_found")


@pytest.fixture
def plain(tmp_path: Path, server_class: type[ServerProcess]) -> Iterator[Callable[..., PlainHosts]]:
    """Make hosts of one's own, with flags."""
    made: list[PlainHosts] = []

    def make(*flags: str) -> PlainHosts:
        number = iter(range(9))

        def start() -> ServerProcess:
            folder = tmp_path / f"host-{next(number)}"
            folder.mkdir()
            return server_class(folder, flags, data_dir=folder / "data").start()

        made.append(PlainHosts(tmp_path, start, 2))
        return made[-1]

    yield make
    for each in made:
        each.end()
        for server in each.servers:
            if server.process.poll() is None:
                server.kill()


def test_a_host_that_is_away(plain: Callable[..., PlainHosts]) -> None:
    """Is told so, and the others as they are; with no coordinator its part is not known."""
    hosts = plain()
    hosts.runs("r", STATE)
    assert hosts.gateway.get("/v1/runs/r/shards").status_code == 200
    hosts.servers[1].kill()
    well, away = hosts.gateway.get("/v1/hosts").raise_for_status().json()["hosts"]
    assert (well["fault"], away["server"]) == (None, None)
    assert "does not answer" in away["fault"]
    first, last = hosts.gateway.get("/v1/runs/r/hosts").raise_for_status().json()["shards"]
    assert (first["fault"], last["info"]) == (None, None)
    assert "host 1" in last["fault"]
    assert last["last"] == ["last", 5]  # as it was remembered
    hosts.coordinator.kill()
    hosts.coordinator.wait(30)
    told = hosts.gateway.get("/v1/hosts").raise_for_status().json()
    assert (told["term"], told["hosts"][0]["listens"]) == (None, None)


def test_strangers_are_told_nothing(plain: Callable[..., PlainHosts], tmp_path: Path) -> None:
    """Neither an address nor a shard, to whom a host would not let in; only how many hosts there are."""
    token = create_token(tmp_path / "tokens", ["pull", "train"], "*")
    hosts = plain("--token-file", str(tmp_path / "tokens"))
    given = {"Authorization": f"Bearer {token}"}
    for server, part in zip(hosts.servers, cut(STATE, 2), strict=True):
        with server.http() as http:
            http.headers.update(given)
            PlainRun(http, "r").create(part).raise_for_status()
    for path in ("/v1/hosts", "/v1/runs/r/hosts"):
        assert hosts.gateway.get(path, headers=given).status_code == 200, path
        for wrong in ({}, {"Authorization": "Bearer other"}):
            refused = hosts.gateway.get(path, headers=wrong)
            assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized"), path
    assert httpx.get(f"{hosts.url}/v1/server").json()["hosts"] == 2
