"""Control requests: short JSON bodies and answers, through httpx. The only module that imports httpx.

Proxies of the environment are not used: weights belong on the straight way.

Knows: which of httpx's faults is which error, and which sockets httpx has open. Does not know: retries, routes, what a
body or an answer means.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from ema_client.errors import ProtocolError, UsageError
from ema_client.forks import Lock, tell_in_child
from ema_client.http.address import Address
from ema_client.http.answers import Answer
from ema_client.http.connection import Timeouts
from ema_client.http.faults import broken, no_tls, tls_fault_in, unreachable
from ema_client.http.sockets import give_up

__all__ = ["Control"]

#: The events of httpx's trace extension that tell of a new socket, or of one that speaks TLS from now on.
_OPENED = frozenset(f"connection.{way}.complete" for way in ("connect_tcp", "connect_unix_socket", "start_tls"))


class Control:
    """Control requests to the service at ``address``, each tried once. Thread-safe, as httpx.Client is.

    headers: of every request. closed: whether close() was called. A forked process connects anew.

    Requests raise ServiceUnreachable, ConnectionLost or ProtocolError where the service did not answer, and UsageError
    after close().
    """

    def __init__(
        self, address: Address, headers: Mapping[str, str], timeouts: Timeouts, context: ssl.SSLContext | None
    ) -> None:
        self._address = address
        self._headers = headers
        self._timeouts = timeouts
        self._context = context
        self.closed = False
        self._client: httpx.Client | None = None
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = Lock()
        tell_in_child(self)

    def after_fork(self) -> None:
        """Give up the connections, which are the parent's, and the client, whose locks may be held for ever."""
        for sock in list(self._sockets):
            give_up(sock)
        self._client = None

    def request(self, method: str, path: str, body: Mapping[str, Any] | None) -> Answer:
        """The answer to a request; ``body`` is sent as JSON."""
        with self._faults():
            response = self._http().request(method, path, json=body, extensions={"trace": self._note})
        return Answer(self._address.url + path, response.status_code, response.headers, response.content)

    def head(self, path: str, *, patience: float) -> int:
        """The status that a GET would be answered with. patience: seconds that the answer may take beyond the
        timeout."""
        with self._faults():
            timeout = httpx.Timeout(self._timeouts.transfer + patience, connect=self._timeouts.connect)
            return self._http().head(path, timeout=timeout, extensions={"trace": self._note}).status_code

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            client, self._client, self.closed = self._client, None, True
        if client:
            client.close()

    def check_open(self) -> None:
        """Raises UsageError after close()."""
        if self.closed:
            raise UsageError("this client is closed", hint="make a new EmaClient")

    def _http(self) -> httpx.Client:
        with self._lock:
            self.check_open()
            if self._client is None:
                self._client = self._new_client()
            return self._client

    def _new_client(self) -> httpx.Client:
        uds = self._address.socket
        return httpx.Client(
            base_url=self._address.base,
            headers=self._headers,
            timeout=httpx.Timeout(self._timeouts.transfer, connect=self._timeouts.connect),
            # A URL without TLS needs no context, and loading a context takes 20 ms.
            verify=self._context or False,
            transport=httpx.HTTPTransport(uds=uds, verify=False) if uds else None,
            trust_env=False,
        )

    def _note(self, event: str, info: Mapping[str, Any]) -> None:
        """Remember a socket that was opened: the trace extension of httpx tells of each."""
        if event in _OPENED:
            self._sockets.add(info["return_value"].get_extra_info("socket"))

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        url = self._address.url
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as fault:
            if tls := tls_fault_in(fault):
                raise no_tls(url, tls) from fault
            raise unreachable(url, fault) from fault
        except (httpx.TimeoutException, httpx.NetworkError) as fault:
            raise broken(url, fault) from fault
        except httpx.RemoteProtocolError as fault:
            if _hung_up(fault):
                raise broken(url, fault) from fault
            raise ProtocolError(f"{url} does not speak HTTP/1.1: {fault}") from fault
        except httpx.HTTPError as fault:
            raise ProtocolError(f"{url}: {type(fault).__name__}: {fault}") from fault


def _hung_up(fault: httpx.RemoteProtocolError) -> bool:
    # httpx has the same class for "closed too early" and for "not HTTP"; only the text tells which.
    return "disconnected" in str(fault) or "closed connection" in str(fault)
