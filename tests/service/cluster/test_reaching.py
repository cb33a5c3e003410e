"""Requests from one program of a cluster to another: those to a machine that is gone end soon, whatever their timeout,
and those that are given up leave no connection.

Machines are network namespaces; skipped where there are none. Does not know programs (test_links).
"""

from __future__ import annotations

import asyncio
import gc
import socket
import time

import httpx2
import pytest

from ema_service.cluster.reaching import client_of
from tests.benchmarks.namespaces import Network, why_no_network

REASON = why_no_network()


@pytest.mark.skipif(bool(REASON), reason=REASON or "-")
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


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_request_that_is_given_up_leaves_no_connection(scheme: str) -> None:
    """Before it is answered, or in a TLS handshake: the other side hears of it at once, and not when memory is
    collected."""

    async def whole() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        loop, client = asyncio.get_running_loop(), client_of(timeout=100.0)
        asking = asyncio.create_task(client.get(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"))
        connection, _ = await loop.sock_accept(listener)
        with listener, connection:
            await loop.sock_recv(connection, 1 << 16)  # the request's head, or the handshake's first word
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            async with asyncio.timeout(20):
                assert await loop.sock_recv(connection, 1) == b""
        await client.aclose()

    gc.disable()
    try:
        asyncio.run(whole())
    finally:
        gc.enable()
