"""All HTTP of one service: JSON requests through httpx, large bodies over pooled connections, retries.

The only module that imports httpx. Thread-safe: httpx.Client is, and the pool lends each connection to one caller.
Proxies of the environment are not used: weights belong on the straight way.

Knows: the token, timeouts, when to sleep between two tries, which of httpx's faults is which error. Does not know: what
the routes mean, tensors, environment variables.
"""

from __future__ import annotations

import contextlib
import random
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlencode

import httpx

from ema_client import protocol
from ema_client.errors import EmaError, ProtocolError, UsageError
from ema_client.http.address import parse_address
from ema_client.http.answers import Answer, json_of
from ema_client.http.body import Body
from ema_client.http.connection import Timeouts
from ema_client.http.downloads import Download, Stream, open_download, open_stream
from ema_client.http.faults import broken, no_tls, tls_fault_in, unreachable
from ema_client.http.pool import Pool
from ema_client.http.retry import RetryPolicy
from ema_client.http.uploads import Uploads

__all__ = ["Query", "Reply", "Transport"]

T = TypeVar("T")
Query = Mapping[str, str | int | float | None]


@dataclass(frozen=True, slots=True)
class Reply:
    """A success: the URL of the request, and the JSON object of the answer."""

    url: str
    data: dict[str, Any]

    def parsed(self, cls: type[T]) -> T:
        """The answer as a dataclass of the protocol. Raises ProtocolError naming what is missing."""
        try:
            return protocol.from_json(cls, self.data)
        except ValueError as fault:
            raise ProtocolError(f"{self.url} answered without something that is needed: {fault}") from None


class Transport:
    """Requests to the service at ``url``.

    Args:
        url: ``http://``, ``https://`` or ``unix:///path.sock``.
        token: sent as bearer token if given; never shown.
        retry: when to try again. Every request of the protocol may be repeated.
        timeouts: of single operations.

    Every method raises the service's error; ServiceUnreachable, ConnectionLost or ProtocolError where the service did
    not answer; UsageError for a malformed URL or token, and after close().
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        retry: RetryPolicy | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        address = parse_address(url)
        self._timeouts = timeouts = timeouts or Timeouts()
        context = ssl.create_default_context() if address.secure else None
        self.url = address.url
        self.same_host = address.same_host
        self.retry = retry or RetryPolicy()
        self._headers = {"Authorization": f"Bearer {_checked(token)}"} if token else {}
        self._pool = Pool(address, timeouts, context)
        self._uploads = Uploads(self._pool, address)
        self._http = httpx.Client(
            base_url=address.base,
            headers=self._headers,
            timeout=httpx.Timeout(timeouts.transfer, connect=timeouts.connect),
            # A URL without TLS needs no context, and loading a context takes 20 ms.
            verify=context or False,
            transport=httpx.HTTPTransport(uds=address.socket, verify=False) if address.socket else None,
            trust_env=False,
        )

    def __repr__(self) -> str:
        return f"Transport({self.url!r})"

    @property
    def link(self) -> str:
        """How large bodies travel to the service, in words."""
        return self._uploads.link

    def json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Reply:
        """A control request and its answer, with retries. ``body`` is sent as JSON."""
        return self.retrying(lambda _: self.json_once(method, path, body))

    def json_once(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Reply:
        """json(), tried once: for a caller of retrying() that must know the number of the try."""
        with self._faults():
            response = self._http.request(method, path, json=body)
        answer = Answer(self.url + path, response.status_code, response.headers, response.content)
        return Reply(answer.url, json_of(answer))

    def upload(
        self, path: str, body: Body, *, query: Query | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """PUT a large body, with retries; each try sends the body from its beginning."""
        return self.retrying(lambda _: self.upload_once(path, body, query=query, headers=headers))

    def upload_once(
        self, path: str, body: Body, *, query: Query | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """upload(), tried once: for a caller with retries of its own."""
        self._check_open()
        headers = {**self._headers, "Content-Type": "application/octet-stream", **(headers or {})}
        answer = self._uploads.put(_with_query(path, query), headers, body)
        return Reply(answer.url, json_of(answer))

    def download(
        self,
        path: str,
        *,
        query: Query | None = None,
        start: int = 0,
        stop: int | None = None,
        etag: str | None = None,
        patience: float = 0.0,
    ) -> Download:
        """GET a large body, tried once: the bytes read before a fault stay with the caller, who decides on retries.

        start, stop: only the bytes from ``start`` on, before ``stop`` (206).
        etag: the part of the body with this ETag; a newer body comes whole instead (200).
        patience: seconds that the service was asked to wait before it answers.
        """
        self._check_open()
        headers = dict(self._headers)
        if stop is not None or (start and etag):
            headers["Range"] = f"bytes={start}-" if stop is None else f"bytes={start}-{stop - 1}"
            if etag:
                headers["If-Range"] = etag
        return open_download(self._pool, _with_query(path, query), headers, patience=patience)

    def stream(self, path: str, *, accept: str, patience: float) -> Stream:
        """GET an answer without end, tried once. ``patience``: seconds for the answer's head to come."""
        self._check_open()
        return open_stream(self._pool, path, {**self._headers, "Accept": accept}, patience=patience)

    def head(self, path: str, *, query: Query, patience: float) -> int:
        """The status that a GET would be answered with, tried once. ``patience``: as for download()."""
        with self._faults():
            timeout = httpx.Timeout(self._timeouts.transfer + patience, connect=self._timeouts.connect)
            return self._http.head(_with_query(path, query), timeout=timeout).status_code

    def retrying(self, operation: Callable[[int], T]) -> T:
        """Call ``operation`` with the number of the try (from 0) until a try succeeds or the policy gives up."""
        attempt = 0
        while True:
            try:
                return operation(attempt)
            except EmaError as error:
                pause = self.retry.delay(attempt, error, random.random)
                if pause is None:
                    raise
            time.sleep(pause)
            attempt += 1

    def close(self) -> None:
        """Close all connections. Later requests raise UsageError."""
        self._http.close()
        self._pool.close()

    def _check_open(self) -> None:
        if self._http.is_closed:
            raise UsageError("this client is closed", hint="make a new EmaClient")

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        self._check_open()
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as fault:
            if tls := tls_fault_in(fault):
                raise no_tls(self.url, tls) from fault
            raise unreachable(self.url, fault) from fault
        except (httpx.TimeoutException, httpx.NetworkError) as fault:
            raise broken(self.url, fault) from fault
        except httpx.RemoteProtocolError as fault:
            if _hung_up(fault):
                raise broken(self.url, fault) from fault
            raise ProtocolError(f"{self.url} does not speak HTTP/1.1: {fault}") from fault
        except httpx.HTTPError as fault:
            raise ProtocolError(f"{self.url}: {type(fault).__name__}: {fault}") from fault


def _checked(token: str) -> str:
    # Here and not by the HTTP library, whose message would show the token.
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError("the token holds characters that no HTTP header may carry", hint="check EMA_SERVICE_TOKEN")
    return token


def _with_query(path: str, query: Query | None) -> str:
    given = {key: value for key, value in (query or {}).items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


def _hung_up(fault: httpx.RemoteProtocolError) -> bool:
    # httpx has the same class for "closed too early" and for "not HTTP"; only the text tells which.
    return "disconnected" in str(fault) or "closed connection" in str(fault)
