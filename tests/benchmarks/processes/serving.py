"""Runs an application under stock uvicorn on a free port, and says where it listens.

Knows uvicorn. Does not know the application.
"""

from __future__ import annotations

import socket
import sys
from typing import Any

import uvicorn

__all__ = ["serve"]


def serve(app: Any, **config: Any) -> None:
    """Serve until SIGTERM, with uvicorn's own defaults but for ``config``."""
    # The protocol is named: asyncio sets TCP_NODELAY only where it is, and without that each answer takes 40 ms.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        sys.stdout.write(f"listens on http://127.0.0.1:{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, **config))
        server.run(sockets=[listener])
