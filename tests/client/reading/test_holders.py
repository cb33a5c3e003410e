"""Who is asked for weights: the server itself, its twin where the server is away, and for stretches its replicas too.

Knows whom a request went to. Does not know bodies (tests/service/replica/test_replica.py has real ones).
"""

from __future__ import annotations

from typing import Any, cast

import pytest

from ema_client.errors import NotFound, Overloaded, ServiceUnreachable
from ema_client.http.downloads import Download
from ema_client.http.transport import Transport
from ema_client.reading.holders import Holders


class Server:
    """Stands in for a transport: answers with itself, or fails."""

    def __init__(self) -> None:
        self.fault: Exception | None = None
        self.asked = 0
        self.status = 206

    def download(self, _: str, **__: Any) -> Download:
        self.asked += 1
        if self.fault:
            raise self.fault
        return cast(Download, self)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def opened(holders: Holders, etag: str | None = None) -> object:
    """Who answered."""
    return holders.download("/weights", query={}, start=0, stop=None, etag=etag, patience=0.0)


def three() -> tuple[Server, Server, Server, Holders]:
    """A server, its twin, and a replica."""
    server, twin, replica = Server(), Server(), Server()
    found = Holders(cast(Transport, server), (cast(Transport, replica),), cast(Transport, twin))
    return server, twin, replica, found


def test_weights_are_opened_at_the_server_or_its_twin() -> None:
    """At the twin while the server is away, of which it is not asked each time; never at a replica, which may be
    behind."""
    server, twin, replica, holders = three()
    assert [opened(holders) for _ in range(2)] == [server, server]
    server.fault = ServiceUnreachable("gone")
    server.asked = 0
    assert [opened(holders) for _ in range(3)] == [twin] * 3
    assert server.asked == 1
    twin.fault = ServiceUnreachable("gone too")
    with pytest.raises(ServiceUnreachable, match=r"^gone( \(|$)"):
        opened(holders)
    assert replica.asked == 0


def test_what_the_server_says_is_said() -> None:
    """The twin would say it as well; but for "later", which one says that was left behind."""
    server, twin, _, holders = three()
    server.fault = Overloaded("left behind")
    assert opened(holders) is twin
    server, twin, _, holders = three()
    server.fault = NotFound("no such run")
    with pytest.raises(NotFound):
        opened(holders)
    assert twin.asked == 0


def test_stretches_come_from_all_three() -> None:
    """In turn, by the version's name."""
    server, twin, replica, holders = three()
    assert {id(opened(holders, "tag")) for _ in range(3)} == {id(each) for each in (server, twin, replica)}
