"""Runs the application under uvicorn: sockets, the announcement, the graceful end.

Knows uvicorn and sockets. Does not know routes or the command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ema_service.api.app import create_app, open_registry
from ema_service.api.context import Context
from ema_service.api.transfer.lending import LendingProtocol
from ema_service.api.transfer.uvicorn_fit import uvicorn_fits
from ema_service.settings import Settings
from ema_service.storage import Store

__all__ = ["CannotListen", "http_protocol", "serve"]

_log = logging.getLogger(__name__)

#: Seconds that requests in hand get to finish once the server is told to stop.
GRACE_SECONDS = 30


class CannotListen(OSError):
    """The address is in use, or this process may not listen on it."""


def serve(
    settings: Settings,
    store: Store | None,
    host: str,
    port: int,
    uds: Path | None,
    announce: Callable[[str], None],
    tls: ssl.SSLContext | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then finish the requests in hand and take a last checkpoint of every run.

    store: what is kept; None keeps nothing. announce: called with the http:// or https:// address once connections are
    accepted. uds: a Unix socket to listen on as well. tls: for the address; the Unix socket never leaves the machine
    and stays plain. Raises CannotListen, and what open_registry() raises, before anything is served.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal again once it has stopped. The process exits with 0: stopping was what it was told
        # to do.
        signal.signal(number, _exit)
    # Addresses are bound first, which fails at once if they are in use. They are listened on last: until then a client
    # is refused and tries again.
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(_tcp(host, port))
        unix = stack.enter_context(_unix(uds)) if uds else None
        app = create_app(settings, open_registry(settings, store))
        config = uvicorn.Config(
            app,
            http=http_protocol(),
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
            ssl_context_factory=(lambda _config, _default: tls) if tls else None,
        )
        announced = partial(_url, host, tcp, secure=tls is not None)
        _Server(config, unix, lambda: announce(announced()), partial(_let_go, app)).run([tcp])


def http_protocol() -> type[HttpToolsProtocol]:
    """The protocol class for uvicorn: LendingProtocol, or uvicorn's own where this version of uvicorn does not fit."""
    if uvicorn_fits():
        return LendingProtocol
    _log.warning(
        "uvicorn %s is not as this server knows it: pushes are received the slow way; see the range of versions in "
        "the package's requirements",
        uvicorn.__version__,
    )
    return HttpToolsProtocol


def _exit(_number: int, _frame: object) -> None:
    sys.exit(0)


class _Server(uvicorn.Server):
    """A uvicorn server that also listens on a plain Unix socket, and calls back when it accepts connections and when it
    begins to stop."""

    def __init__(
        self,
        config: uvicorn.Config,
        unix: socket.socket | None,
        started: Callable[[], None],
        stopping: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._unix = unix
        self._on_started = started
        self._on_stopping = stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._unix:
            # Not by uvicorn, which has one TLS context for all sockets.
            self.servers.append(await asyncio.get_running_loop().create_server(self._protocol, sock=self._unix))
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stopping()
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        protocol: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        return protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)


def _let_go(app: FastAPI) -> None:
    """Wake whoever waits for a run, so that their requests end."""
    context: Context | None = getattr(app.state, "context", None)
    if context:
        context.stop_watching()


def _url(host: str, sock: socket.socket, *, secure: bool) -> str:
    """The address that the socket listens on, as clients write it."""
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if secure else 'http'}://{shown}:{sock.getsockname()[1]}"


@contextlib.contextmanager
def _tcp(host: str, port: int) -> Iterator[socket.socket]:
    """A bound TCP socket. Raises CannotListen."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
    except OSError as fault:
        raise CannotListen(f"cannot listen on {host}: {fault.strerror}; choose another --host") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as fault:
        sock.close()
        raise CannotListen(
            f"cannot listen on {host} port {port}: {fault.strerror}; choose another --host or --port"
        ) from None
    with sock:
        yield sock


@contextlib.contextmanager
def _unix(path: Path) -> Iterator[socket.socket]:
    """A bound Unix socket that only this user may connect to; one left behind by a dead server is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and not _answers(path):
            path.unlink()
        before = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
    except OSError as fault:
        sock.close()
        raise CannotListen(f"cannot listen on the Unix socket {path}: {fault}; choose another --uds") from None
    with sock:
        try:
            yield sock
        finally:
            path.unlink(missing_ok=True)


def _answers(path: Path) -> bool:
    """Whether a server listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        return True
