"""Which of two hosts of a shard a gateway reads from, and which it sends slices to.

Knows the coordinator's map. Does not know what is asked for.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from ema_client.errors import Overloaded, Unauthorized
from ema_service.cluster import ClusterToken
from ema_service.cluster.gateway.hosts import Hosts
from ema_service.cluster.gateway.twins import HostAddress, Twins


def told(*, away: tuple[int, ...] = (), absent: dict[str, list[int]] | None = None) -> dict[str, Any]:
    """A map of two shards on four hosts."""
    seats = [{"place": place, "address": f"http://h{place}/", "listens": place not in away} for place in range(4)]
    return {"shards": seats, "twins": True, "absent": absent or {}}


def places(hosts: tuple[HostAddress, ...]) -> list[str]:
    return [host.address.removeprefix("http://h") for host in hosts]


def test_the_first_host_is_read_from() -> None:
    assert places(Twins(told()).hosts) == ["0", "1"]


def test_its_twin_where_it_is_away_or_left_behind() -> None:
    """Of the directory, or of the run that is asked for, whose host may be there and have less."""
    assert places(Twins(told(away=(0,))).hosts) == ["2", "1"]
    assert places(Twins(told(absent={"-directory": [1]})).hosts) == ["0", "3"]
    twins = Twins(told(absent={"r@2": [2], "r@9": [0], "s@3": [1]}))
    assert [twins.serving(host, "/v1/runs/r/weights").address for host in twins.hosts] == ["http://h2", "http://h1"]
    assert [twins.serving(host, "/v1/runs").address for host in twins.hosts] == ["http://h0", "http://h1"]


def test_both_are_sent_what_is_written() -> None:
    """But for a host that is left behind; a host that is away is not, before the others go on without it."""
    twins = Twins(told(away=(3,), absent={"r@2": [0]}))
    assert [places(each) for each in twins.both("r")] == [["2"], ["1", "3"]]
    assert [places(each) for each in twins.both("other")] == [["0", "2"], ["1", "3"]]
    assert all(twins.serving(host, "/v1/runs/r") is host for each in twins.both("r") for host in each)


def test_replicas_are_those_of_the_shard() -> None:
    """Whichever of its hosts is read from, or named by the replica; one that is meant is asked itself."""
    replicas = [{"place": 0, "address": "http://r0/"}, {"place": 2, "address": "http://r2"}]
    for away in ((), (0,)):
        twins = Twins(told(away=away) | {"replicas": replicas})
        assert [host.replicas for host in twins.hosts] == [("http://r0", "http://r2"), ()]
        assert {host.replicas for host in twins.both("r")[0]} == {("http://r0", "http://r2")}
        _, first, _ = twins.hosts[0].holders
        assert twins.serving(first, "/v1/runs/r/weights") == first


def test_a_map_that_is_none() -> None:
    """A shard of which no host came, and what no coordinator says."""
    seats = [{"place": place, "address": None if place % 2 else "http://h", "listens": True} for place in range(4)]
    with pytest.raises(Overloaded, match="no host of shard 1"):
        Twins({"shards": seats, "absent": {}})
    with pytest.raises(ValueError, match="no map"):
        Twins({"shards": [{"place": 0}]})


def test_a_gateway_beyond_loopback_goes_on_with_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a host that is gone it does not ask first whether that one asks for tokens, but of the twin in its place."""
    maps, asked = [told(), told(away=(0,), absent={"-directory": [0]})], list[str]()
    hosts = Hosts(["http://coordinator"], ClusterToken("x" * 16), guarded=True)

    async def map_of(*_: object) -> Any:
        return maps[0]

    async def answered(host: HostAddress, request: httpx2.Request) -> httpx2.Response:
        asked.append(host.address)
        gone = host.address == "http://h0" and len(maps) == 1
        raise httpx2.ConnectError("gone", request=request) if gone else Unauthorized("a token is asked for")

    monkeypatch.setattr(hosts, "_ask_coordinator", map_of)
    monkeypatch.setattr(hosts, "_answer", answered)
    monkeypatch.setattr("ema_service.cluster.gateway.hosts._MAP_AGE", -1.0)

    async def whole() -> None:
        assert places(await hosts.all()) == ["0", "1"]
        maps.pop(0)
        assert places(await hosts.all()) == ["2", "1"]
        await hosts.close()

    asyncio.run(whole())
    assert sorted(asked) == ["http://h0", "http://h1", "http://h1", "http://h2"]
