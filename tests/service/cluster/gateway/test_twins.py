"""Which of two hosts of a shard a gateway reads from, and which it sends slices to.

Knows the coordinator's map. Does not know requests.
"""

from __future__ import annotations

from typing import Any

import pytest

from ema_client.errors import Overloaded
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


def test_a_map_that_is_none() -> None:
    """A shard of which no host came, and what no coordinator says."""
    seats = [{"place": place, "address": None if place % 2 else "http://h", "listens": True} for place in range(4)]
    with pytest.raises(Overloaded, match="no host of shard 1"):
        Twins({"shards": seats, "absent": {}})
    with pytest.raises(ValueError, match="no map"):
        Twins({"shards": [{"place": 0}]})
