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
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ema_service.address_file import AddressFile
from ema_service.addresses import announced, most_reachable
from ema_service.api.app import create_app, open_registry
from ema_service.api.context import Context
from ema_service.api.transfer.accepting import Acceptor, Connections, Idling
from ema_service.api.transfer.lending import LendingProtocol
from ema_service.api.transfer.uvicorn_fit import uvicorn_fits
from ema_service.api.writes import Writes
from ema_service.descriptors import connections_within, raise_limit
from ema_service.metrics import Metrics
from ema_service.readiness import tell_ready, tell_stopping
from ema_service.settings import Settings
from ema_service.storage import Store
from ema_service.tls import Certificate
from ema_service.tokens import Tokens

__all__ = ["CannotListen", "http_protocol", "serve"]

_log = logging.getLogger(__name__)

#: Seconds from the order to stop in which writes in hand get to finish, and in which readers do. Kubernetes kills after
#: 30: the rest is for what is kept between the two.
WRITE_SECONDS = 5.0
STOP_SECONDS = 20.0


class CannotListen(OSError):
    """The address is in use, or this process may not listen on it."""


def serve(
    settings: Settings,
    store: Store | None,
    host: str,
    port: int,
    uds: Path | None,
    announce: Callable[[str], None],
    tls: Certificate | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then finish the writes in hand, take a checkpoint of every run that moved, and let
    readers finish. SIGHUP reads tokens and certificate again.

    store: what is kept; None keeps nothing. announce: called with the http:// or https:// address once connections are
    accepted. uds: a Unix socket to listen on as well. tls: for the address; the Unix socket never leaves the machine
    and stays plain. Raises CannotListen, and what open_registry() raises, before anything is served.
    """
    most = connections_within(raise_limit(), settings.max_connections)
    # A stream of events keeps its connection: streams leave half of them to trainers and readers.
    watchers = min(settings.max_watchers, max(1, most // 2))
    settings = replace(settings, max_connections=most, max_watchers=watchers)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal again once it has stopped. The process exits with 0: stopping was what it was told
        # to do.
        signal.signal(number, _exit)
    # Until there is something to read again: a server that restores large runs must not end by a rotation's signal.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Addresses are bound first, which fails at once if they are in use. They are listened on last: until then a client
    # is refused and tries again.
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(_tcp(host, port))
        unix = stack.enter_context(_unix(uds)) if uds else None
        url = announced(host, tcp.getsockname()[1], secure=tls is not None, name=settings.announce)
        told = AddressFile(settings.address_file, most_reachable(url, uds)) if settings.address_file else None
        if told:
            stack.callback(told.withdraw)
        if settings.shard or settings.replica_place:
            settings = replace(settings, cluster_address=settings.cluster_address or url)
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
        )
        started = partial(_started, app.state.metrics, announce, url, told)
        stopping = partial(_stopping, told)
        duties = _Duties(started, partial(_reload, app, tls), stopping, partial(_keep, app))
        stack.callback(_log.info, "stopped")
        _Server(config, tcp, unix, tls, settings.max_connections, duties).run([])


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


@dataclass(frozen=True, slots=True)
class _Duties:
    """What a server does beside answering.

    started: called with the connections once they are accepted. reload: called on SIGHUP. stopping: called when no more
    are accepted. keep: awaited then, before readers are waited for.
    """

    started: Callable[[Connections], None]
    reload: Callable[[], None]
    stopping: Callable[[], None]
    keep: Callable[[], Awaitable[None]]


class _Server(uvicorn.Server):
    """A uvicorn server that accepts connections itself, also on a plain Unix socket.

    most: connections at once. tls: for the first socket.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        tcp: socket.socket,
        unix: socket.socket | None,
        tls: Certificate | None,
        most: int,
        duties: _Duties,
    ) -> None:
        super().__init__(config)
        context = (lambda: tls.context) if tls else None
        self._sockets = [(tcp, context), *([(unix, None)] if unix else [])]
        self._most = most
        self._duties = duties

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)  # of none: uvicorn accepts without end, and has one TLS context for all sockets
        connections = Connections(self._most, cast(set[Idling], self.server_state.connections))
        for sock, tls in self._sockets:
            acceptor = Acceptor(sock, connections, self._protocol, backlog=self.config.backlog, tls=tls)
            self.servers.append(cast(asyncio.Server, acceptor))
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._duties.reload)
        self._duties.started(connections)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        for server in self.servers:
            server.close()
        self._duties.stopping()
        await self._duties.keep()
        self.config.timeout_graceful_shutdown = max(1, round(STOP_SECONDS - (clock() - began)))
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        protocol: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        return protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)


def _started(
    metrics: Metrics, announce: Callable[[str], None], url: str, told: AddressFile | None, connections: Connections
) -> None:
    """Tell the address, and from here on how many connections there are."""
    metrics.watch("ema_connections", "Connections that are open.", lambda: len(connections.opened))
    metrics.watch("ema_connections_limit", "Most of ema_connections.", lambda: connections.most)
    if told:
        told.show()
    _say(announce, url)
    tell_ready(url)
    _log.info("started: ema-service %s on %s", version("ema-service"), url)


def _stopping(told: AddressFile | None) -> None:
    """Let no client come any more, and whoever watches the server know."""
    tell_stopping()
    if told:
        told.withdraw()


def _reload(app: FastAPI, tls: Certificate | None) -> None:
    """Read tokens and certificate again. Requests in hand, and streams of events, go on as they began."""
    tokens: Tokens | None = app.state.tokens
    for each in (tokens, tls):
        if each:
            each.reload()


async def _keep(app: FastAPI) -> None:
    """Wake whoever waits for a run, let the writes in hand finish, and take what must be kept to disk."""
    context: Context = app.state.context
    writes: Writes = app.state.writes
    context.stop_watching()
    _log.info("stopping: no more is accepted, and what moved is kept")
    await writes.end(WRITE_SECONDS)
    await context.workers.block(context.registry.checkpoint)


def _say(announce: Callable[[str], None], url: str) -> None:
    """Tell the address. A terminal that is gone, or a full disk behind the output, ends no server."""
    try:
        announce(url)
    except (OSError, ValueError) as fault:  # ValueError: closed, or an encoding without the letters of a path
        _log.warning("the server listens on %s; what it prints at the start cannot be written: %s", url, fault)


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
    with sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError as fault:
            raise CannotListen(
                f"cannot listen on {host} port {port}: {fault.strerror}; choose another --host or --port"
            ) from None
        yield sock


@contextlib.contextmanager
def _unix(path: Path) -> Iterator[socket.socket]:
    """A bound Unix socket that only this user may connect to; one left behind by a dead server is replaced."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            if path.is_socket() and not _answers(path):
                path.unlink()
            before = os.umask(0o177)
            try:
                sock.bind(str(path))
            finally:
                os.umask(before)
        except OSError as fault:
            raise CannotListen(f"cannot listen on the Unix socket {path}: {fault}; choose another --uds") from None
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
