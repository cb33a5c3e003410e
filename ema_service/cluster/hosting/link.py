"""A shard's connections to one coordinator: one that it listens on, and one that it reports on.

A coordinator that is away is tried again and again, for as long as the shard lives. Nothing that was not received is
remembered for long: of reports the newest counts, and a coordinator asks for a report as soon as the shard listens.

Knows sockets, threads, and that silence means that nobody is there. Does not know what a message leads to.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from ema_client.errors import Fenced
from ema_service.cluster.encoding import MalformedMessage, decode, encode
from ema_service.cluster.messages import Arrival, Ask, Propose, Refusal, Report, Resolve
from ema_service.cluster.reasons import code_in, detail_in
from ema_service.cluster.token import ClusterToken
from ema_service.cluster.whereabouts import CoordinatorAddress, check_coordinator, coordinator_address
from ema_service.tls import may_be_tls, trusting, why_no_tls

__all__ = ["Link"]

_log = logging.getLogger(__name__)

#: Seconds without a word after which a coordinator is held for gone: it asks every second.
_SILENCE = 5.0
#: Seconds between two tries to reach a coordinator: the first, and the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
#: Messages that wait to be sent. A shard has few proposals in hand at once.
_MOST_WAITING = 64
_JSON = "application/json"
#: Bytes that are read of a refusal.
_PROBLEM_BYTES = 4 << 10


class _NotLinked(Exception):
    """The coordinator answered, and not as one does."""


class _Connection(http.client.HTTPConnection):
    """A connection to a coordinator, over TLS where its address says so, which sends the head and the body of a message
    at once.

    http.client sends one after the other, which wakes the coordinator twice: 0.15 ms of a decision.
    """

    _held: bytearray | None = None

    def __init__(self, address: CoordinatorAddress) -> None:
        super().__init__(address.host, address.port, timeout=_SILENCE)
        self._secure = address.secure

    def connect(self) -> None:
        """Connect. Raises OSError, of which SSLError is one."""
        super().connect()
        if self._secure:
            self.sock = trusting().wrap_socket(self.sock, server_hostname=self.host)

    def post(self, path: str, body: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        """Send a message, and return the answer once its head is there."""
        self._held = bytearray()
        self.request("POST", path, body.encode(), headers)
        held, self._held = bytes(self._held), None
        self.send(held)
        return self.getresponse()

    def send(self, data: Any) -> None:
        """Send what http.client has made of a request, or hold it while post() collects."""
        if self._held is None:
            super().send(data)
        else:
            self._held += data


class Link:
    """The talk with one coordinator. Two threads, from start() to close().

    More than a dozen attributes: what the two threads share, and what of it others ask. Thread-safe.
    """

    def __init__(
        self,
        url: str,
        run: str,
        arrival: Callable[[], Arrival],
        token: ClusterToken,
        hear: Callable[[Ask | Propose | Resolve], None],
    ) -> None:
        """hear: called with each message, in the order in which they were sent. Raises ValueError for a URL that is
        none of a coordinator."""
        check_coordinator(url)
        self._url = url
        self._run = run
        self._arrival = arrival
        self._headers = {**token.headers, "Content-Type": _JSON}
        #: When the coordinator's latest word came, by time.monotonic().
        self.heard = float("-inf")
        #: Why the coordinator hears this process no more: a later one is the host. Empty where there is none.
        self.replaced = ""
        self._hear = hear
        self._stopped = threading.Event()
        self._changed = threading.Condition()
        self._linked = False
        #: What is to be sent, by what a newer message of the same kind replaces.
        self._waiting: dict[object, Arrival | Refusal | Report] = {}
        self._connections: set[_Connection] = set()
        self._threads = [
            threading.Thread(target=work, name=f"ema-{name}", daemon=True)
            for work, name in ((self._listen, "listen"), (self._report, "report"))
        ]

    @property
    def linked(self) -> bool:
        """Whether the coordinator is heard: there was a word of it within some seconds."""
        return self._linked

    def start(self) -> None:
        """Begin to look for the coordinator."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End both threads; a message that is being heard is heard to its end."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
            for connection in self._connections:
                _break(connection)
        for thread in self._threads:
            if thread is not threading.current_thread() and thread.ident:
                thread.join()

    def say(self, message: Arrival | Refusal | Report) -> None:
        """Have a message sent once the coordinator is there. Returns at once."""
        with self._changed:
            self._waiting[message.ticket if isinstance(message, Refusal) else type(message)] = message
            while len(self._waiting) > _MOST_WAITING:
                del self._waiting[next(iter(self._waiting))]
            self._changed.notify_all()

    # --- listening --------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Listen, as often as it takes."""
        pause, told = _FIRST_PAUSE, ""
        while not self._stopped.is_set():
            try:
                with self._connected() as connection:
                    response = self._post(connection, "link", encode(self._arrival()))
                    pause, told = _FIRST_PAUSE, ""
                    _log.info("run %s: listens to the coordinator %s", self._run, self._url)
                    self._hear_all(response)
                fault = "the coordinator ended"
            except (OSError, http.client.HTTPException, MalformedMessage, _NotLinked) as error:
                fault = why_no_tls(error) or f"{type(error).__name__}: {error}"
                if isinstance(error, ConnectionResetError):  # http.client's RemoteDisconnected is one
                    fault += may_be_tls(self._url)
            if fault != told and not self._stopped.is_set():
                _log.warning("run %s: no coordinator at %s, trying again: %s", self._run, self._url, fault)
                told = fault
            self._stopped.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _hear_all(self, response: http.client.HTTPResponse) -> None:
        """Hear messages until the coordinator ends."""
        self._set_linked(True)
        try:
            for line in iter(response.readline, b""):
                self.heard = time.monotonic()
                if self._stopped.is_set():  # since before the connection was one that close() could break
                    return
                self._hear(cast("Ask | Propose | Resolve", decode(line, Ask, Propose, Resolve)))
        finally:
            self._set_linked(False)

    def _set_linked(self, linked: bool) -> None:
        with self._changed:
            self._linked = linked
            self._changed.notify_all()

    # --- reporting --------------------------------------------------------------------------------------------------

    def _report(self) -> None:
        """Send what is to be said, while there is somebody to listen."""
        while self._ready():
            try:
                with self._connected() as connection:
                    while self._ready():
                        self._send_next(connection)
            except (OSError, http.client.HTTPException) as fault:
                why = why_no_tls(fault) or type(fault).__name__
                _log.info("run %s: a report did not reach %s: %s", self._run, self._url, why)
                self._stopped.wait(_FIRST_PAUSE)

    def _ready(self) -> bool:
        """Wait until there is something to say and somebody to say it to. Returns False once the link is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped.is_set() or (self._linked and self._waiting))
            return not self._stopped.is_set()

    def _send_next(self, connection: _Connection) -> None:
        with self._changed:
            key, message = next(iter(self._waiting.items()))
        try:
            self._post(connection, "reports", encode(message)).read()
        except _NotLinked as fault:
            # It would be refused again. Where it was about a vote the coordinator asks anew.
            _log.warning("run %s: the coordinator refused a message: %s", self._run, fault)
        with self._changed:
            if self._waiting.get(key) is message:
                del self._waiting[key]

    # --- HTTP -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _connected(self) -> Iterator[_Connection]:
        """A connection that close() breaks. Raises NoCoordinator."""
        connection = _Connection(coordinator_address(self._url))
        with self._changed:
            self._connections.add(connection)
        try:
            yield connection
        finally:
            with self._changed:
                self._connections.discard(connection)
            connection.close()

    def _post(self, connection: _Connection, route: str, body: str) -> http.client.HTTPResponse:
        """Send one message. Raises _NotLinked where the answer is an error."""
        path = f"/v1/runs/{self._run}/shards/{self._arrival().shard}/{route}"
        response = connection.post(path, body, self._headers)
        if response.status >= 300:
            said = response.read(_PROBLEM_BYTES)
            if code_in(said) == Fenced.code:
                self.replaced = detail_in(said)
            raise _NotLinked(f"{response.status} {detail_in(said)}")
        return response


def _break(connection: _Connection) -> None:
    """End whatever waits for a connection."""
    if connection.sock is not None:
        with contextlib.suppress(OSError):
            # Of the bare socket: that of a TLS socket says goodbye first, and races with the reader.
            socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)
