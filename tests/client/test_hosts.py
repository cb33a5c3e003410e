"""Runs on several hosts, as the client sees them: what hosts answer, and what becomes of several errors.

Knows answers and errors. Does not know processes (tests/service/cluster/test_direct.py has the cluster's).
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ema_client.errors import ConnectionLost, EmaError, NonFinite
from ema_client.hosts.finding import GivenUp, Host, Hosts, at_all
from ema_client.hosts.pushing import together
from ema_client.http.transport import Reply, Transport
from ema_client.protocol import HostedShard, RunShards


def reply(applied: bool, durable_step: int | None) -> Reply:
    return Reply("http://host", {"step": 7, "applied": applied, "durable_step": durable_step})


def test_an_update_is_applied_where_one_host_says_so() -> None:
    """A slice that was sent again is told "applied before", of the very push that applied it."""
    assert together([reply(False, 7), reply(True, 7)]).data == {"step": 7, "applied": True, "durable_step": 7}
    assert together([reply(False, 7), reply(False, 7)]).data["applied"] is False


@pytest.mark.parametrize(("steps", "least"), [((7, 5), 5), ((7, None), None), ((None, None), None)])
def test_an_update_is_as_durable_as_on_each_host(steps: tuple[int | None, ...], least: int | None) -> None:
    """Of several answers the least."""
    assert together([reply(True, step) for step in steps]).data["durable_step"] == least


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        ([ConnectionLost("gone"), NonFinite("NaN"), GivenUp()], NonFinite),
        ([GivenUp(), ConnectionLost("gone")], ConnectionLost),
        ([NonFinite("NaN"), KeyError("defect")], KeyError),
        ([GivenUp(), None], GivenUp),
    ],
)
def test_of_several_errors_the_one_that_says_most(
    faults: list[Exception | None], told: type[EmaError | Exception]
) -> None:
    """A defect before what no other try would mend, that before silence, and last who gave up for another."""
    transport = Transport("http://127.0.0.1:1")
    hosts = [Host(HostedShard(place, 1, transport.url, (), ()), transport) for place in range(len(faults))]

    def fail(host: Host) -> None:
        if fault := faults[host.shard.place]:
            raise fault

    with pytest.raises(told):
        at_all(hosts, fail)
    transport.close()


def test_a_gateway_that_names_no_host() -> None:
    """All weights go through the gateway, which sends each slice to two hosts; it is asked again later."""
    said = SimpleNamespace(parsed=lambda _: RunShards("r", ()))
    hosts = Hosts(SimpleNamespace(json=lambda *_: said))  # type: ignore[arg-type]

    assert hosts.of("r") is None
    assert hosts.known("r") is None
