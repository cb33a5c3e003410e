"""Control requests: short JSON bodies and answers, through httpx2. The only module that imports httpx2.

Proxies of the environment are not used: weights belong on the straight way.

Knows: which of httpx2's faults is which error, and which sockets httpx2 has open. Does not know: retries, routes, what
a body or an answer means.
"""

from __future__ import annotations

import contextlib
import socket
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2

from ema_client.errors import ConnectionLost, ProtocolError, ServiceUnreachable, UsageError
from ema_client.forks import Lock, tell_in_child
from ema_client.http.address import Address
from ema_client.http.answers import Answer
from ema_client.http.connection import Timeouts
from ema_client.http.faults import broken, no_tls, tls_fault_in, unreachable
from ema_client.http.place import Place
from ema_client.http.sockets import UNHEARD_SECONDS, give_up, probing

__all__ = ["Control"]

#: The events of httpx2's trace extension that tell of a new socket, or of one that speaks TLS from now on.
_OPENED = frozenset(f"connection.{way}.complete" for way in ("connect_tcp", "connect_unix_socket", "start_tls"))


class Control:
    """Control requests to the service at ``place``, each tried once. Thread-safe, as httpx2.Client is.

    headers: of every request. doubted: called when a connection broke, for others of its age. closed: whether close()
    was called. A forked process connects anew.

    A request is made a second time, over new connections, where a kept one stayed silent. A write goes over a new
    connection, as a service may take its time: there silence is the service's.

    Requests raise ServiceUnreachable, ConnectionLost or ProtocolError where the service did not answer, and UsageError
    after close().
    """

    def __init__(
        self,
        place: Place,
        headers: Mapping[str, str],
        timeouts: Timeouts,
        *,
        doubted: Callable[[], None],
    ) -> None:
        self._doubted = doubted
        self._place = place
        self._headers = headers
        self._timeouts = timeouts
        self.closed = False
        self._connections: _Connections | None = None
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = Lock()
        tell_in_child(self)

    def after_fork(self) -> None:
        """Give up the connections, which are the parent's, and the client, whose locks may be held for ever."""
        for sock in list(self._sockets):
            give_up(sock)
        self._connections = None

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        *,
        headers: Mapping[str, str] | None = None,
        patience: float = 0.0,
    ) -> Answer:
        """The answer to a request; ``body`` is sent as JSON. patience: seconds that the answer may take beyond the
        timeout."""
        if method != "GET":
            self.doubt()
        url, response = self._exchange(method, path, patience, json=body, headers=headers)
        return Answer(url, response.status_code, response.headers, response.content)

    def head(self, path: str, *, patience: float) -> int:
        """The status that a GET would be answered with. patience: as for request()."""
        return self._exchange("HEAD", path, patience)[1].status_code

    def doubt(self) -> None:
        """Let later requests open new connections; those under way go on."""
        with self._lock:
            self._drop()

    def _exchange(self, method: str, path: str, patience: float, **options: Any) -> tuple[str, httpx2.Response]:
        """The URL that a request went to, and the answer."""
        with self._lent() as connections:
            kept = connections.used
            limit = self._timeouts.kept if kept else self._timeouts.transfer
            try:
                with _faults(connections.address.url, limit):
                    return self._send(connections, method, path, limit + patience, options)
            except ServiceUnreachable:
                # The next request looks where the service is by then.
                self._doubt(connections)
                raise
            except ConnectionLost as lost:
                self._doubt(connections)
                self._doubted()
                if not kept or not lost.silence:
                    raise
        with self._lent() as connections, _faults(connections.address.url, self._timeouts.transfer):
            return self._send(connections, method, path, self._timeouts.transfer + patience, options)

    def _send(
        self, connections: _Connections, method: str, path: str, limit: float, options: dict[str, Any]
    ) -> tuple[str, httpx2.Response]:
        timeout = httpx2.Timeout(limit, connect=self._timeouts.connect)
        response = connections.client.request(
            method, path, timeout=timeout, extensions={"trace": self._note}, **options
        )
        connections.used = True
        return connections.address.url + path, response

    @contextlib.contextmanager
    def _lent(self) -> Iterator[_Connections]:
        with self._lock:
            self.check_open()
            if self._connections is None:
                address = self._place.address()
                self._connections = _Connections(address, self._new_client(address))
            lent = self._connections
            lent.users += 1
        try:
            yield lent
        finally:
            with self._lock:
                lent.users -= 1
                lent.close_unused()

    def _doubt(self, connections: _Connections) -> None:
        with self._lock:
            if self._connections is connections:
                self._drop()

    def _drop(self) -> None:
        connections, self._connections = self._connections, None
        if connections:
            connections.dropped = True
            connections.close_unused()

    def close(self) -> None:
        """Close all connections; those under way with the ends of their requests."""
        with self._lock:
            self.closed = True
            self._drop()

    def check_open(self) -> None:
        """Raises UsageError after close()."""
        if self.closed:
            raise UsageError("this client is closed", hint="make a new EmaClient")

    def _new_client(self, address: Address) -> httpx2.Client:
        uds, verify = address.socket, self._place.context if address.secure else False
        # No body of a control request is so large that a service which reads nothing would be taken for gone.
        options = probing(TCP_USER_TIMEOUT=int(UNHEARD_SECONDS * 1000))
        transport = httpx2.HTTPTransport(uds=uds, verify=verify, socket_options=None if uds else options)
        return httpx2.Client(
            base_url=address.base,
            headers=self._headers,
            transport=transport,
            trust_env=False,
        )

    def _note(self, event: str, info: Mapping[str, Any]) -> None:
        """Remember a socket that was opened: the trace extension of httpx2 tells of each."""
        if event in _OPENED:
            self._sockets.add(info["return_value"].get_extra_info("socket"))


@dataclass
class _Connections:
    """A client of httpx2 with its kept connections to ``address``.

    users: requests under way. used: whether an answer has come.
    """

    address: Address
    client: httpx2.Client
    users: int = 0
    used: bool = False
    dropped: bool = False

    def close_unused(self) -> None:
        """Close what was dropped and nobody uses any more."""
        if self.dropped and not self.users:
            self.client.close()


@contextlib.contextmanager
def _faults(url: str, limit: float) -> Iterator[None]:
    """Turn a fault of httpx2 into an EmaError. limit: seconds that a silence lasted."""
    try:
        yield
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as fault:
        if tls := tls_fault_in(fault):
            raise no_tls(url, tls) from fault
        raise unreachable(url, fault) from fault
    except httpx2.TimeoutException as fault:
        raise broken(url, fault, silence=UNHEARD_SECONDS if _is_gone(fault) else limit) from fault
    except httpx2.NetworkError as fault:
        raise broken(url, fault) from fault
    except httpx2.RemoteProtocolError as fault:
        if _hung_up(fault):
            raise broken(url, fault) from fault
        raise ProtocolError(f"{url} does not speak HTTP/1.1: {fault}") from fault
    except httpx2.HTTPError as fault:
        raise ProtocolError(f"{url}: {type(fault).__name__}: {fault}") from fault


def _is_gone(fault: BaseException) -> bool:
    """Whether the other machine is gone, by the kernel's word: a timeout of Python's own has no errno."""
    cause: BaseException | None = fault
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return isinstance(cause, TimeoutError) and cause.errno is not None


def _hung_up(fault: httpx2.RemoteProtocolError) -> bool:
    # httpx2 has the same class for "closed too early" and for "not HTTP"; only the text tells which.
    return "disconnected" in str(fault) or "closed connection" in str(fault)
