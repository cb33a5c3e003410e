"""The process that serves a gateway.

Knows when it listens, and what ends. Does not know routes.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from ema_service.cluster.gateway.app import create_gateway
from ema_service.cluster.gateway.hosts import Hosts
from ema_service.cluster.gateway.watching import Watches
from ema_service.cluster.serving import serving_config
from ema_service.tls import Certificate

__all__ = ["serve"]


def serve(
    hosts: Hosts,
    sock: socket.socket,
    announce: Callable[[], None],
    pages: Callable[[FastAPI], None] = lambda _: None,
    tls: Certificate | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM. sock: from listening_socket(). announce: called once connections are accepted.
    pages: as for create_gateway(). tls: as for serving_config()."""
    app = create_gateway(hosts, pages)
    config = serving_config(app, tls, stop_seconds=20)
    server = _Server(config, announce, app.state.watches)
    server.run([sock])


class _Server(uvicorn.Server):
    """A server that says when it listens, and lets nobody wait any more before it waits for connections to end."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None], watches: Watches) -> None:
        super().__init__(config)
        self._announce = announce
        self._watches = watches

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._watches.end()
        await super().shutdown(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._announce()
