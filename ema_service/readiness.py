"""Tells the service manager of the system when the server is ready, and when it stops: the protocol of sd_notify(3).

systemd, and podman for it, name a socket in the environment; where there is none, nobody is told.

Knows that socket. Does not know when a server is ready.
"""

from __future__ import annotations

import logging
import os
import socket

__all__ = ["tell_ready", "tell_stopping"]

_log = logging.getLogger(__name__)


def tell_ready(url: str) -> None:
    """The server listens."""
    _tell(f"READY=1\nSTATUS=listens on {url}")


def tell_stopping() -> None:
    """The server has begun to stop."""
    _tell("STOPPING=1\nSTATUS=finishes the writes in hand, and keeps every run")


def _tell(state: str) -> None:
    name = os.environ.get("NOTIFY_SOCKET", "")
    if not name:
        return
    # "@" stands for the NUL with which the name of a socket without a file begins.
    address = "\0" + name[1:] if name.startswith("@") else name
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.sendto(state.encode(), address)
    except OSError as fault:
        _log.warning("the service manager cannot be told by %s: %s", name, fault)
