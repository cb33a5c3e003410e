"""Requests from one program of a cluster to another whose machine is gone: they end soon, whatever their timeout.

Machines are network namespaces; skipped where there are none. Does not know programs (test_links).
"""

from __future__ import annotations

import asyncio
import socket
import time

import httpx2
import pytest

from ema_service.cluster.reaching import client_of
from tests.benchmarks.namespaces import Network, why_no_network

REASON = why_no_network()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "-")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("asked", [True, False], ids=["waits for the answer", "nobody has the request"])
def test_a_machine_that_is_gone_is_left(asked: bool) -> None:
    """By the kernel's probes where nothing is on its way, by its patience with what nobody acknowledges otherwise."""

    async def whole(network: Network, listener: socket.socket) -> float:
        listener.setblocking(False)
        loop, client = asyncio.get_running_loop(), client_of(timeout=100.0)
        url = f"http://{network.address('other')}:{listener.getsockname()[1]}"
        asking = asyncio.create_task(client.get(url))
        connection, _ = await loop.sock_accept(listener)
        await loop.sock_recv(connection, 1 << 16)
        if not asked:  # over the connection that is kept, to a machine that has gone meanwhile
            await loop.sock_sendall(connection, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await asking
        network.cut("other")
        gone = time.monotonic()
        if not asked:
            asking = asyncio.create_task(client.get(url))
        with pytest.raises(httpx2.HTTPError):
            await asking
        await client.aclose()
        connection.close()
        return time.monotonic() - gone

    with Network({"other": None, "here": None}) as network:
        with network.at("other"):
            listener = socket.create_server((network.address("other"), 0))
        with listener, network.at("here"):
            assert asyncio.run(whole(network, listener)) < 15
