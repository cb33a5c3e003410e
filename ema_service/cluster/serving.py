"""How the coordinator and gateways are served: a socket, and uvicorn's settings.

Knows uvicorn, and the certificate that a program shows. Does not know applications, or when one of them ends.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ema_service.tls import Certificate

__all__ = ["listening_socket", "serving_config"]


def listening_socket(host: str, port: int) -> socket.socket:
    """A TCP socket for serve(), to which shards can connect from now on. port: 0 for any that is free.

    The socket says that it is one of TCP: asyncio sends small answers at once (TCP_NODELAY) only for those, and an
    answer that waits for an acknowledgement takes 40 ms. Raises OSError.
    """
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    with contextlib.ExitStack() as undo:
        sock = undo.enter_context(socket.socket(family, kind, proto))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen()
        undo.pop_all()
    return sock


def serving_config(app: FastAPI, tls: Certificate | None, *, stop_seconds: int) -> uvicorn.Config:
    """Settings for uvicorn. tls: shown to who connects, and read again on SIGHUP; None for plain HTTP. stop_seconds:
    that answers may take once the program was told to stop. To be called by the main thread."""
    config = uvicorn.Config(
        app,
        http="httptools",
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=stop_seconds,
        ssl_context_factory=None if tls is None else lambda _config, _default: tls.following(),
    )
    if tls:
        signal.signal(signal.SIGHUP, lambda _number, _frame: tls.reload())
    return config
