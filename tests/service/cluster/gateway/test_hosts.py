"""A gateway's requests to hosts that do not answer: how long it waits for one that is elsewhere by now.

Coordinator and host are sockets of this process. Does not know runs (test_gateway).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging

import pytest

from ema_client.errors import Overloaded, RunNotFound, StepConflict
from ema_service.cluster import ClusterToken
from ema_service.cluster.gateway.hosts import HostAddress, Hosts


def test_a_host_that_is_elsewhere_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its former machine may be gone, and end no connection: the request ends with the map that names another."""
    monkeypatch.setattr("ema_service.cluster.gateway.hosts._MAP_AGE", 0.05)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 16):
            reached.set()
        writer.close()

    async def mapping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET"):
            body = json.dumps({"shards": [{"place": 0, "address": where[-1]}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async def whole() -> None:
        async with (
            await asyncio.start_server(silent, "127.0.0.1", 0) as former,
            await asyncio.start_server(mapping, "127.0.0.1", 0) as coordinator,
        ):
            where.append(f"http://127.0.0.1:{former.sockets[0].getsockname()[1]}")
            hosts = Hosts([f"http://127.0.0.1:{coordinator.sockets[0].getsockname()[1]}"], ClusterToken("x" * 16))
            (host,) = await hosts.all()
            assert host == HostAddress(0, where[0])
            asking = asyncio.create_task(hosts.send(host, "GET", "/v1/runs", {}))
            await reached.wait()
            await asyncio.sleep(0.3)
            assert not asking.done(), "given up although it is where it was"
            where.append("http://127.0.0.1:1")
            with pytest.raises(Overloaded, match="does not answer"):
                await asking
            await hosts.close()

    where, reached = list[str](), asyncio.Event()
    asyncio.run(asyncio.wait_for(whole(), 20))


@pytest.mark.parametrize("fault", [None, "shard 1 is at revision 0: is its data dir an older copy?"])
def test_nobody_is_told_that_a_run_is_gone_by_an_empty_disk(fault: str | None) -> None:
    """A host that knows no runs is not believed while the coordinator holds its directory for an older copy."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (head := await reader.readuntil(b"\r\n\r\n")).startswith(b"GET"):
            mapped = b"/shards" in head
            told = (
                {"shards": [{"place": 0, "address": where}], "fault": fault}
                if mapped
                else RunNotFound("there is no run 'r'").to_problem()
            )
            kind = b"application/json" if mapped else b"application/problem+json"
            body = json.dumps(told).encode()
            lines = b"HTTP/1.1 %d X\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
            writer.write(lines % (200 if mapped else 404, kind, len(body)) + body)

    async def whole() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as both:
            nonlocal where
            where = f"http://127.0.0.1:{both.sockets[0].getsockname()[1]}"
            hosts = Hosts([where], ClusterToken("x" * 16))
            (host,) = await hosts.all()
            with pytest.raises(Overloaded if fault else RunNotFound, match=fault and "an older copy"):
                await hosts.send(host, "GET", "/v1/runs/r", {})
            with pytest.raises(Overloaded) if fault else contextlib.nullcontext():
                await hosts.check_directory()
            await hosts.close()

    where = ""
    asyncio.run(asyncio.wait_for(whole(), 20))


def test_hosts_that_have_not_come_yet_are_no_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cluster that is started has no hosts at first; the same is told as a fault where it goes on."""
    caplog.set_level(logging.INFO, "ema_service.cluster.gateway.hosts")

    async def look(hosts: Hosts) -> None:
        with pytest.raises(Overloaded, match="where the hosts are is not known"):
            await hosts.all()

    async def whole() -> None:
        hosts = Hosts(["http://127.0.0.1:1"], ClusterToken("x" * 16))
        for seconds in (20.0, 20.0, 0.0, 0.0):
            monkeypatch.setattr("ema_service.cluster.gateway.hosts._STARTING", seconds)
            await look(hosts)
        await hosts.close()

    asyncio.run(whole())
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


def test_what_a_host_says_that_was_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers by an older version, as the gateway learns from a map that it asks for then: nobody's push is refused
    for that. What a host says that counts stands."""
    monkeypatch.setattr("ema_service.cluster.gateway.hosts._MAP_AGE", 60.0)

    async def refusing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET"):
            body = json.dumps(StepConflict("not the next step").to_problem()).encode()
            kind = b"application/problem+json"
            writer.write(
                b"HTTP/1.1 409 No\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n" % (kind, len(body)) + body
            )

    async def mapping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET"):
            seats = [{"place": place, "address": where[place], "listens": True} for place in range(2)]
            body = json.dumps({"shards": seats, "twins": True, "absent": absent}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async def whole() -> None:
        async with (
            await asyncio.start_server(refusing, "127.0.0.1", 0) as host,
            await asyncio.start_server(refusing, "127.0.0.1", 0) as twin,
            await asyncio.start_server(mapping, "127.0.0.1", 0) as coordinator,
        ):
            where.extend(f"http://127.0.0.1:{each.sockets[0].getsockname()[1]}" for each in (host, twin))
            hosts = Hosts([f"http://127.0.0.1:{coordinator.sockets[0].getsockname()[1]}"], ClusterToken("x" * 16))
            ((first, second),) = await hosts.both("r")
            absent["r@1"] = [1]
            with pytest.raises(StepConflict):
                await hosts.send(first, "GET", "/v1/runs/r/updates/1", {})
            with pytest.raises(Overloaded, match="was left behind"):
                await hosts.send(second, "GET", "/v1/runs/r/updates/1", {})
            await hosts.close()

    where, absent = list[str](), dict[str, list[int]]()
    asyncio.run(asyncio.wait_for(whole(), 20))
