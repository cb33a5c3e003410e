"""One HTTP/1.1 connection for weights: bodies are sent from, and received into, the memory of the tensors.

On the standard library's ``http.client``, which reads straight into a caller's buffer: 4.0-4.4 GB/s over loopback,
where httpx's ``iter_raw``, copied into a buffer, reaches 1.3.

Before a large upload the client asks (``Expect: 100-continue``), so that a server can refuse gigabytes before they are
sent. A server that answers in the middle of a body is heard: the server's answer is raised, not "broken pipe".

Knows: how a request and its answer go over one socket, with which timeouts, and which fault is which error. Does not
know: JSON, routes, tensors, retries, or who else has a connection.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import selectors
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ema_client.errors import ConnectionLost, ProtocolError, printable
from ema_client.forks import tell_in_child
from ema_client.http import cancelling
from ema_client.http.address import Address
from ema_client.http.answers import Answer
from ema_client.http.body import Body, digested, portions
from ema_client.http.early import is_continue, read_head, replaying
from ema_client.http.faults import broken, no_tls, unreachable
from ema_client.http.heads import WholeHead
from ema_client.http.sockets import UNHEARD_SECONDS, Selector, give_up, look_after, open_http, readable, unheard
from ema_client.protocol import DIGEST_BYTES, DIGEST_FOLLOWS, HEADER_DIGEST

__all__ = ["Connection", "Timeouts", "headers_of"]

#: A larger body waits for ``100 Continue``: the round trip is cheap beside the body.
EXPECT_ABOVE = 1 << 20
#: The longest control answer that is read; a list of 10,000 runs fits.
ANSWER_LIMIT = 16 << 20
#: The longest line of an answer without end; an event of the service has less than a kilobyte.
LINE_LIMIT = 1 << 20
#: Seconds between two looks whether the other machine is still there.
_LOOK_SECONDS = 1.0
#: How long a broken upload waits for the answer that may explain the break, in seconds.
LAST_WORDS = 5.0


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds to wait for a sign of life; a whole body may take longer.

    connect: for a connection.
    transfer: for each operation on the socket.
    kept: for the first sign on a connection that was kept since an earlier request, and may be dead by now.
    expect: for ``100 Continue``; after that time the body is sent unasked.
    stream: between two lines of an answer without end, where the service sends one every 15 seconds.
    """

    connect: float = 5.0
    transfer: float = 10.0
    kept: float = 5.0
    expect: float = 5.0
    stream: float = 50.0


class Connection:
    """A keep-alive connection, for a single caller at a time: not thread-safe, but for interrupt().

    In a forked process the connection is closed, and the parent's goes on.

    More than twenty methods, the steps of the four ways in which a request goes over one socket.
    """

    def __init__(self, address: Address, timeouts: Timeouts, context: ssl.SSLContext | None) -> None:
        self.address = address
        self._timeouts = timeouts
        self._http = open_http(address, timeouts.connect, context)
        self._http.response_class = WholeHead
        #: URL of the latest request, for messages.
        self.url = address.url
        #: When the latest answer came over the connection (time.monotonic), None before the first.
        self.heard: float | None = None
        #: Seconds to wait for the next sign of life.
        self._limit = timeouts.transfer
        #: Whether the other end is known to ask for bodies by ``100 Continue``.
        self._continues = False
        #: The socket, also once http.client has let go of it, because the answer said "Connection: close".
        self._opened: socket.socket | None = None
        tell_in_child(self)

    def after_fork(self) -> None:
        """Close this process' copy of the socket, without a word to the service: the connection is the parent's."""
        give_up(self._opened)

    def put(self, path: str, headers: Mapping[str, str], body: Body, *, patience: float = 0.0) -> Answer:
        """Send ``body`` and read the answer, which is the server's refusal where the server did not take the body.

        patience: seconds that the answer may take beyond the timeout.
        """
        asks = body.length > EXPECT_ABOVE
        length = body.length + (DIGEST_BYTES if body.digest else 0)
        extra = {"Content-Length": str(length)} | ({"Expect": "100-continue"} if asks else {})
        if body.digest:
            extra[HEADER_DIGEST] = DIGEST_FOLLOWS
        with self._faults():
            self._begin("PUT", path, {**headers, **extra})
            early = self._early_answer(self._timeouts.expect) if asks else b""
            return self._refused(early) if early else self._send(body, patience)

    def get(self, path: str, headers: Mapping[str, str], *, patience: float = 0.0) -> http.client.HTTPResponse:
        """Ask for ``path``; the body of the response is still to be read. ``patience``: as for put()."""
        with self._faults():
            self._begin("GET", path, headers)
            return self._response(patience)

    def read(self, response: http.client.HTTPResponse) -> Answer:
        """A short answer, read to its end."""
        with self._faults():
            answer = Answer(self.url, response.status, headers_of(response), response.read(ANSWER_LIMIT))
            if response.length or not response.isclosed():
                # Cut short (http.client closes a response of which not a byte came), or longer than any answer of ours.
                raise ConnectionResetError(f"an answer of status {response.status} did not end where it should")
        return answer

    def readinto(self, response: http.client.HTTPResponse, view: memoryview) -> int:
        """Read as many bytes as have come into ``view``; returns their number, 0 at the end of the body."""
        with self._faults():
            return response.readinto(view)

    def stream(self, path: str, headers: Mapping[str, str], *, patience: float) -> http.client.HTTPResponse:
        """Ask for an answer without end, for lines() to read. ``patience``: seconds for the answer's head to come."""
        with self._faults():
            self._begin("GET", path, headers)
            sock = self._socket
            sock.settimeout(patience)
            response = self._http.getresponse()
            self._limit = self._timeouts.stream
            sock.settimeout(self._limit)
            self.heard = time.monotonic()
            return response

    def lines(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """The lines of an answer as they come, newlines included, until the answer ends.

        Raises ConnectionLost if no line comes in time, ProtocolError for a line without end.
        """
        with self._faults():
            while line := response.readline(LINE_LIMIT + 1):
                if len(line) > LINE_LIMIT:
                    raise ProtocolError(f"{self.url} sent a line of more than {LINE_LIMIT} bytes")
                yield line

    def interrupt(self) -> None:
        """End what waits for the socket, from another thread, which sees a closed connection; lines() ends."""
        if self._opened is not None:
            with contextlib.suppress(OSError):
                # shutdown() of the bare socket: a TLS socket's says goodbye first, and races with the reader.
                socket.socket.shutdown(self._opened, socket.SHUT_RDWR)

    @property
    def reusable(self) -> bool:
        """Whether another request can be sent over the connection."""
        return self._http.sock is not None

    @property
    def stale(self) -> bool:
        """Whether the server closed the idle connection, or sent something unasked."""
        return self._http.sock is None or readable(self._http.sock, 0.0)

    def close(self) -> None:
        self._http.close()

    @property
    def _socket(self) -> socket.socket:
        sock: socket.socket | None = self._http.sock
        if sock is None:
            raise ConnectionLost(f"the connection to {self.url} was closed")
        return sock

    def _begin(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        self.url = self.address.url + path
        cancelling.hold(self)
        if self._http.sock is None:
            self._connect()
        self._http.putrequest(method, self.address.prefix + path)
        for name, value in headers.items():
            self._http.putheader(name, value)
        self._limit = self._timeouts.transfer if self.heard is None else self._timeouts.kept
        self._socket.settimeout(self._limit)
        self._http.endheaders()

    def _connect(self) -> None:
        try:
            self._http.connect()
        except ssl.SSLError as fault:
            raise no_tls(self.address.url, fault) from None
        except OSError as fault:
            raise unreachable(self.address.url, fault) from None
        self._opened = self._socket
        look_after(self._opened)
        # Once more: what there was to interrupt until now was another socket.
        cancelling.hold(self)

    def _response(self, patience: float, look: Callable[[], None] | None = None) -> http.client.HTTPResponse:
        sock = self._socket
        self._await(sock, self._limit + patience, look)
        sock.settimeout(self._limit + patience)
        response = self._http.getresponse()
        self._limit = self._timeouts.transfer
        if self._http.sock is not None:
            sock.settimeout(self._limit)
        self.heard = time.monotonic()
        return response

    def _await(self, sock: socket.socket, seconds: float, look: Callable[[], None] | None) -> None:
        """Return once there is something to read. look: called meanwhile, as Body.look. Raises TimeoutError, and what
        ``look`` raises."""
        if isinstance(sock, ssl.SSLSocket) and sock.pending():
            return
        began = time.monotonic()
        while not readable(sock, min(_LOOK_SECONDS, seconds)):
            if look:
                look()
            _check_heard(sock, time.monotonic() - began, seconds)

    def _send_some(self, portion: memoryview, seconds: float, look: Callable[[], None]) -> int:
        """Send some bytes, and return how many. look: as Body.look. Raises TimeoutError where nobody takes any for so
        long, and what ``look`` raises."""
        sock, began = self._socket, time.monotonic()
        sock.settimeout(min(_LOOK_SECONDS, seconds))
        while True:
            look()
            # Not sendall(), whose timeout is for the whole: a slow way is no silent one.
            try:
                return sock.send(portion)
            except TimeoutError as fault:
                if _is_gone(fault):
                    raise
                _check_heard(sock, time.monotonic() - began, seconds)

    def _send(self, body: Body, patience: float) -> Answer:
        sent = 0
        try:
            with Selector() as arrival:
                arrival.register(self._socket, selectors.EVENT_READ)
                for portion in _shares(body):
                    if sent and arrival.select(0.0) and (early := self._early_answer(0.0)):
                        return self._refused(early)
                    while portion:
                        count = self._send_some(portion, self._limit + patience, body.look)
                        portion = portion[count:]
                        sent += count
                        body.moved(sent)
        except OSError as fault:
            if not _is_gone(fault):
                with contextlib.suppress(OSError, http.client.HTTPException):
                    return self._last_words()
            raise
        return self.read(self._response(patience, body.look))

    def _early_answer(self, timeout: float) -> bytes:
        """The head of a final answer that came early; empty where 100 Continue came, or nothing in ``timeout`` s.

        Raises TimeoutError where nothing came and the other end has said 100 Continue before.
        """
        sock = self._socket
        if timeout == 0.0 and isinstance(sock, ssl.SSLSocket):
            # A TLS socket turns readable for messages of TLS too.
            return b""
        if not readable(sock, timeout):
            if timeout and self._continues:
                raise TimeoutError
            self._limit = max(1.0, self._limit - timeout)
            return b""
        before = sock.gettimeout()
        sock.settimeout(max(timeout, LAST_WORDS))
        head = read_head(sock)
        sock.settimeout(before)
        if not is_continue(head):
            return head
        self._continues = True
        self._limit = self._timeouts.transfer
        return b""

    def _refused(self, head: bytes) -> Answer:
        """The final answer to a body that was not sent, or in part. The connection is closed after the answer."""
        self._http.response_class = replaying(head)  # type: ignore[assignment]
        return self._last_words()

    def _last_words(self) -> Answer:
        try:
            self._socket.settimeout(LAST_WORDS)
            answer = self.read(self._http.getresponse())
        finally:
            self.close()
        if answer.status < 400:
            raise ConnectionLost(f"{self.url} answered {answer.status} to a body it had not received")
        return answer

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """Turn a fault of the socket into an EmaError; after any fault the connection is closed."""
        try:
            yield
        except TimeoutError as fault:
            self.close()
            seconds = UNHEARD_SECONDS if _is_gone(fault) else self._limit
            raise broken(self.url, fault, silence=seconds) from fault
        except (OSError, http.client.IncompleteRead) as fault:
            self.close()
            raise broken(self.url, fault) from fault
        except http.client.HTTPException as fault:
            self.close()
            raise ProtocolError(f"{self.url} does not speak HTTP/1.1: {type(fault).__name__}: {fault}") from fault
        except BaseException:
            # Ctrl-C, or a body whose pieces raise: half a request has gone out.
            self.close()
            raise


def _is_gone(fault: OSError) -> bool:
    """Whether the other machine is gone, by the kernel's word: a timeout of Python's own has no errno."""
    return isinstance(fault, TimeoutError) and fault.errno is not None


def _check_heard(sock: socket.socket, waited: float, seconds: float) -> None:
    """Raises TimeoutError where somebody has waited for too long, or for a machine that is gone."""
    if waited >= seconds:
        raise TimeoutError
    if waited >= UNHEARD_SECONDS and unheard(sock):
        raise TimeoutError(errno.ETIMEDOUT, "the other machine acknowledges nothing")


def _shares(body: Body) -> Iterator[memoryview]:
    whole = portions(body.pieces())
    return digested(whole, body.digest()) if body.digest else whole


def headers_of(response: http.client.HTTPResponse) -> dict[str, str]:
    """The response's headers, with lower-case names, fit to be shown and to be sent back."""
    return {name.lower(): printable(value) for name, value in response.getheaders()}
