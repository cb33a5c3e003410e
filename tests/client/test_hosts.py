"""Runs on several hosts, as the client sees them: what hosts answer, and what becomes of several errors.

Knows answers and errors. Does not know processes (tests/service/cluster/test_direct.py has the cluster's).
"""

from __future__ import annotations

import json
import socket
from types import SimpleNamespace

import pytest

from ema_client.errors import ConnectionLost, EmaError, NonFinite, ProtocolError
from ema_client.hosts.finding import GivenUp, Host, HostedRun, Hosts, at_all
from ema_client.hosts.pulling import pull
from ema_client.hosts.pushing import together
from ema_client.http.connection import Timeouts
from ema_client.http.transport import Reply, Transport
from ema_client.protocol import HostedShard, RunShards, TensorSpec, to_json
from ema_client.reading.asked import Asked
from ema_client.wire import place


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


@pytest.mark.parametrize(("scheme", "asked"), [("https", False), ("http", True)])
def test_no_token_in_plain_text(scheme: str, asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reaches the service over TLS sends nothing to hosts without; who does not is as well off at the hosts."""
    with socket.create_server(("127.0.0.1", 0)) as host:
        address = f"http://127.0.0.1:{host.getsockname()[1]}"
        shards = RunShards("r", (HostedShard(0, 1, address, (), ()),))
        transport = Transport(f"{scheme}://service", token="a-token", timeouts=Timeouts(transfer=0.2, kept=0.2))
        monkeypatch.setattr(transport, "json", lambda *_: Reply(transport.url, json.loads(json.dumps(to_json(shards)))))
        hosts = Hosts(transport)
        assert hosts.of("r") is None  # nobody answers there
        host.settimeout(0.0)
        connected = True
        try:
            host.accept()[0].close()
        except BlockingIOError:
            connected = False
        assert connected is asked
        hosts.close()
        transport.close()


def test_a_gateway_that_names_no_host() -> None:
    """All weights go through the gateway, which sends each slice to two hosts; it is asked again later."""
    said = SimpleNamespace(parsed=lambda _: RunShards("r", ()))
    hosts = Hosts(SimpleNamespace(json=lambda *_: said))  # type: ignore[arg-type]

    assert hosts.of("r") is None
    assert hosts.known("r") is None


@pytest.mark.parametrize("tensors", [[("w", (9, 3)), ("b", (4,))], [("w", (8, 3))], [("v", (9, 3))]])
def test_a_map_of_another_run(tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    """Weights are read from no hosts whose map has other tensors than the service said, or other rows: what the hosts
    do not send would stay as it is."""
    transport = Transport("http://127.0.0.1:1")
    shards = [(TensorSpec("w", (5, 3), "F32"), 0), (TensorSpec("w", (4, 3), "F32"), 5)]
    hosts = tuple(
        Host(HostedShard(number, 1, transport.url, (spec,), (first,)), transport)
        for number, (spec, first) in enumerate(shards)
    )
    entries = tuple(place([TensorSpec(*each, "F32") for each in tensors]))
    with pytest.raises(ProtocolError, match="other tensors"):
        pull(HostedRun("r", hosts), Asked("r"), entries, lambda _: pytest.fail("memory was asked for"))
    transport.close()
