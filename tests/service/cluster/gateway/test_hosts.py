"""A gateway's requests to hosts that do not answer: how long it waits for one that is elsewhere by now.

Coordinator and host are sockets of this process. Does not know runs (test_gateway).
"""

from __future__ import annotations

import asyncio
import json

import pytest

from ema_client.errors import Overloaded
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
