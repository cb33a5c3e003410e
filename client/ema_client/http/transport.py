"""All HTTP of one service: control requests, large bodies over pooled connections, retries.

Thread-safe, and may be used on in a forked process, which opens connections of its own.

Knows: the token, timeouts, when to sleep between two tries. Does not know: how a request travels (control, uploads,
downloads), what the routes mean, tensors, environment variables.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import urlencode

from ema_client import protocol
from ema_client.errors import EmaError, ProtocolError, TransportError, UsageError
from ema_client.http.answers import json_of
from ema_client.http.body import Body
from ema_client.http.connection import Timeouts
from ema_client.http.control import Control
from ema_client.http.downloads import Download, Stream, open_download, open_stream
from ema_client.http.pace import Pace, Paces
from ema_client.http.place import Place
from ema_client.http.pool import Pool
from ema_client.http.retry import RetryPolicy
from ema_client.http.uploads import Uploads

__all__ = ["Query", "Reply", "Transport", "with_query"]

T = TypeVar("T")
Query = Mapping[str, str | int | float | None]


#: Seconds for a connection to one of several servers.
_CONNECT_SOON = 2.0


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
    """Requests to the service at ``url``. More than twenty methods: each way in which one goes, and what is told.

    Args:
        url: ``http://``, ``https://``, ``unix:///path.sock``, or ``file:///path`` of a file that holds one of them.
        token: sent as bearer token if given; never shown.
        retry: when to try again. Every request of the protocol may be repeated.
        timeouts: of single operations.
        lanes: so many connections carry a large body; by default as many as pay.

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
        lanes: int | None = None,
    ) -> None:
        self._place = Place(url)
        self._token = token
        self._timeouts = timeouts = timeouts or Timeouts()
        self.url = self._place.url
        self.retry = retry or RetryPolicy()
        self._headers = {"Authorization": f"Bearer {_checked(token)}"} if token else {}
        self._pool = Pool(self._place, timeouts)
        self.lanes = lanes
        #: The directions in which large bodies went.
        self._laned: set[str] = set()
        self._uploads = Uploads(self._pool, self._place)
        self._control = Control(self._place, self._headers, timeouts, doubted=self._pool.doubt)

    def __repr__(self) -> str:
        return f"Transport({self.url!r})"

    def beside(self, url: str, retry: RetryPolicy) -> Transport:
        """A transport to another server of the same service, with this one's token, timeouts and lanes; one that cannot
        be reached soon is tried again, or elsewhere."""
        timeouts = replace(self._timeouts, connect=min(self._timeouts.connect, _CONNECT_SOON))
        return Transport(url, token=self._token, retry=retry, timeouts=timeouts, lanes=self.lanes)

    @property
    def same_host(self) -> bool:
        """Whether the service is on this host for sure, as far as is known now."""
        return self._place.same_host

    @property
    def may_be_here(self) -> bool:
        """Whether the service can be on this host, as far as is known now, and so read this process' memory."""
        return self._place.may_be_here

    @property
    def secure(self) -> bool:
        """Whether the service is reached over TLS, as far as is known now."""
        return self._place.secure

    def pace(self, direction: str) -> Pace:
        """How many lanes a large body has that begins now: see ema_client.http.pace."""
        self._laned.add(direction)
        return Paces.of(self.url, same_host=self.same_host).begin(direction, self.lanes)

    def alike(self, direction: str) -> int | None:
        """How many lanes a large body would have that began now, where they are alike; None where that is not known."""
        if self.lanes is None:
            return Paces.of(self.url, same_host=self.same_host).alike(direction)
        return 1 if self.lanes == 1 else None

    def bound(self, direction: str, most: int) -> None:
        """Have ``most`` lanes at the most, where nobody says how many."""
        Paces.of(self.url, same_host=self.same_host).bound(direction, most)

    def shares(self, body: Body) -> bool:
        """Whether the service takes the body from shared memory, as far as is known now."""
        return self._uploads.shares(body)

    @property
    def link(self) -> str:
        """How large bodies travel to the service, in words."""
        asked_for = "" if self.lanes is None else f"lanes: {self.lanes}, as was asked for"
        return "; ".join(filter(None, [self.way, asked_for, self.widths]))

    @property
    def way(self) -> str:
        """By what large bodies travel to the service, in words; not over how many connections."""
        return self._uploads.link

    @property
    def widths(self) -> str:
        """How many lanes large bodies were found to need, and why not more, in words; nothing where as many as there
        are at first, or where somebody says how many."""
        if self.lanes is not None:
            return ""
        told = Paces.of(self.url, same_host=self.same_host).told
        return "; ".join(f"lanes of a {each}: {said}" for each, said in told.items() if each in self._laned)

    def json(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, patience: float = 0.0) -> Reply:
        """A control request and its answer, with retries, of which the service applies one (Idempotency-Key).

        body: sent as JSON. patience: seconds that the service may work, in silence, before it answers.
        """
        key = {} if method == "GET" else {protocol.HEADER_KEY: secrets.token_hex(16)}
        return self.retrying(lambda _: self.json_once(method, path, body, headers=key, patience=patience))

    def json_once(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        patience: float = 0.0,
    ) -> Reply:
        """json(), tried once: for a caller of retrying() that must know the number of the try."""
        answer = self._control.request(method, path, body, headers=headers, patience=patience)
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
        self._control.check_open()
        headers = {**self._headers, "Content-Type": "application/octet-stream", **(headers or {})}
        answer = self._uploads.put(with_query(path, query), headers, body)
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
        self._control.check_open()
        headers = dict(self._headers)
        if stop is not None or (start and etag):
            headers["Range"] = f"bytes={start}-" if stop is None else f"bytes={start}-{stop - 1}"
            if etag:
                headers["If-Range"] = etag
        return open_download(self._pool, with_query(path, query), headers, patience=patience)

    def stream(self, path: str, *, accept: str, patience: float) -> Stream:
        """GET an answer without end, tried once. ``patience``: seconds for the answer's head to come."""
        self._control.check_open()
        return open_stream(self._pool, path, {**self._headers, "Accept": accept}, patience=patience)

    def head(self, path: str, *, query: Query, patience: float) -> int:
        """The status that a GET would be answered with, tried once. ``patience``: as for download()."""
        return self._control.head(with_query(path, query), patience=patience)

    def retrying(
        self,
        operation: Callable[[int], T],
        *,
        brought: Callable[[], int] = lambda: 0,
        policy: RetryPolicy | None = None,
    ) -> T:
        """Call ``operation`` with the number of the try (from 0) until a try succeeds or the policy gives up.

        brought: gives the bytes that the call has brought so far and that no later try has to bring again. After a try
        that brought more of them than there ever were the policy counts anew: what ends a call is time in which
        nothing comes, however long the whole takes. policy: in place of the transport's own.
        """
        policy = policy or self.retry
        attempt, fruitless, waited, most = 0, 0, 0.0, brought()
        while True:
            try:
                return operation(attempt)
            except EmaError as error:
                if (there := brought()) > most:
                    fruitless, waited, most = 0, 0.0, there
                else:
                    waited += error.silence if isinstance(error, TransportError) else 0.0
                pause = policy.delay(fruitless, error, random.random, waited=waited)
                if pause is None:
                    raise
            time.sleep(pause)
            waited += pause
            attempt += 1
            fruitless += 1

    def close(self) -> None:
        """Close all connections. Later requests raise UsageError."""
        self._control.close()
        self._pool.close()


def _checked(token: str) -> str:
    # Here and not by the HTTP library, whose message would show the token.
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError("the token holds characters that no HTTP header may carry", hint="check EMA_SERVICE_TOKEN")
    return token


def with_query(path: str, query: Query | None) -> str:
    """The path with what of the query is not None."""
    given = {key: value for key, value in (query or {}).items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path
