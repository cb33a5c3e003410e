"""HTTP from one program of a cluster to another: over TLS where an address says so, and not to machines that are gone.

A machine whose link is down ends no connection. So the kernel probes one on which nothing moves, and gives bytes that
nobody acknowledges some seconds: whoever waits hears of it then, and asks where the other program is by now. A request
that is given up leaves no connection behind, also in the middle of a TLS handshake, where httpx2 would leave one.

Knows sockets' options and httpx2. Does not know requests, or where programs are.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import httpx2

from ema_service.tls import trusting

__all__ = ["client_of"]

#: Seconds after which a machine that acknowledges nothing is held for gone: those of a link's silence.
_UNHEARD_SECONDS = 5.0
#: By name, since not every system has each. From the end of what moves until the third probe that nobody answered.
_PROBES = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}


def client_of(*, unheard: float = _UNHEARD_SECONDS, **more: Any) -> httpx2.AsyncClient:
    """A client of httpx2. unheard: seconds after which a connection ends whose bytes nobody acknowledges, or takes: a
    program that reads nothing for so long is held for gone, too. more: as httpx2.AsyncClient() has it, without
    transport."""
    limits = httpx2.Limits(max_connections=None)
    transport = _Transport(verify=trusting(), trust_env=False, limits=limits, socket_options=_options(unheard))
    return httpx2.AsyncClient(transport=transport, trust_env=False, follow_redirects=False, **more)


class _Transport(httpx2.AsyncHTTPTransport):
    """One that ends a connection whose TLS handshake was cancelled."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.scheme == "https":
            request.extensions = {**request.extensions, "trace": _Handshake()}
        return await super().handle_async_request(request)


class _Handshake:
    """The way of a request to its connection, as httpx2 tells it."""

    def __init__(self) -> None:
        self._stream: Any = None

    async def __call__(self, event: str, told: Mapping[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            self._stream = told["return_value"]
        elif event == "connection.start_tls.failed":
            await self._stream.aclose()


def _options(unheard: float) -> list[tuple[int, int, int]]:
    given = {**_PROBES, "TCP_USER_TIMEOUT": int(unheard * 1000)}
    options = [
        (socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in given.items() if hasattr(socket, name)
    ]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), *options]
