"""One HTTP/1.1 connection for weights: bodies sent from the memory they lie in and received into what they are for.

On the standard library's ``http.client``, as it reads straight into a caller's buffer: 4.0-4.4 GB/s over loopback where
httpx's ``iter_raw`` copied into a buffer reaches 1.3.

A large upload asks first (``Expect: 100-continue``), so that a server which will not have it says so before gigabytes
are sent. A server that answers while the body is under way is listened to: its answer is raised, not "broken pipe".

Knows: sockets, TLS, HTTP/1.1, and which fault is which of our errors. Does not know: JSON, routes, tensors, retries, or
who else has a connection.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import selectors
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ema_client.errors import ConnectionLost, ProtocolError, ServiceUnreachable
from ema_client.http.address import Address
from ema_client.http.answers import Answer

if TYPE_CHECKING:
    from ema_client.http.memfd import SharedBody

__all__ = ["Body", "Connection", "Timeouts", "no_tls", "unreachable"]

#: A body above this asks before it is sent: a round trip is cheap beside it.
EXPECT_ABOVE = 1 << 20
#: sendall() is given this much at a time: its timeout is for the whole piece, and between two pieces an early answer is
#: looked for.
PIECE = 4 << 20
#: Smaller pieces are joined up to JOINED before they are sent: one call to the kernel for many biases.
SMALL = 64 << 10
JOINED = 1 << 20
#: As much of a control answer as is read; a list of 10,000 runs fits.
ANSWER_LIMIT = 16 << 20
#: The longest line of an answer without end; an event of ours has less than a kilobyte.
LINE_LIMIT = 1 << 20
#: What the kernel takes of a Unix socket's sender before it is to wait for the reader; Linux gives no more than
#: net.core.wmem_max. With its default of 208 KiB the two take turns (1 GiB pulled: 0.80 of the raw loop, so 1.1).
UNIX_SEND_BYTES = 512 << 10
#: How long a broken upload waits for the answer that may explain it, in seconds.
LAST_WORDS = 5.0

#: For one look at one socket; epoll would make a descriptor for it.
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds to wait.

    connect: for a connection.
    transfer: for each operation on the socket; a whole body may take longer.
    expect: for ``100 Continue``; after it the body is sent unasked.
    """

    connect: float = 5.0
    transfer: float = 60.0
    expect: float = 5.0


@dataclass(frozen=True, slots=True)
class Body:
    """A body to send, as often as a retry needs it.

    pieces: gives the body anew at each call. A piece belongs to the sender until it asks for the next one; it is not
    copied, so its memory must not change meanwhile.
    shared: memory with these very bytes that a service on this host can read: they need not be sent to it.
    """

    length: int
    pieces: Callable[[], Iterable[memoryview]]
    shared: SharedBody | None = None


class Connection:
    """One keep-alive connection. Not thread-safe: the pool lends it to one caller at a time."""

    def __init__(self, address: Address, timeouts: Timeouts, context: ssl.SSLContext | None) -> None:
        self._address = address
        self._timeouts = timeouts
        self._http = _open(address, timeouts.connect, context)
        #: What is being asked, for messages.
        self.url = address.url
        self.used = False
        self._streaming: socket.socket | None = None

    def put(self, path: str, headers: Mapping[str, str], body: Body, *, patience: float = 0.0) -> Answer:
        """Send ``body`` and read the answer. Raises the early answer's error where the server would not have it.

        patience: extra seconds that the answer may take to come.
        """
        asks = body.length > EXPECT_ABOVE
        extra = {"Content-Length": str(body.length)} | ({"Expect": "100-continue"} if asks else {})
        with self._faults():
            self._begin("PUT", path, {**headers, **extra})
            early = self._early_answer(self._timeouts.expect) if asks else b""
            return self._refused(early) if early else self._send(body, patience)

    def get(self, path: str, headers: Mapping[str, str], *, patience: float = 0.0) -> http.client.HTTPResponse:
        """Ask for ``path``; the answer's body is still to be read. ``patience``: extra seconds it may take to come."""
        with self._faults():
            self._begin("GET", path, headers)
            self._socket.settimeout(self._timeouts.transfer + patience)
            response = self._http.getresponse()
            if self._http.sock is not None:
                self._socket.settimeout(self._timeouts.transfer)
            self.used = True
            return response

    def read(self, response: http.client.HTTPResponse) -> Answer:
        """The whole of a short answer."""
        with self._faults():
            headers = {name.lower(): value for name, value in response.getheaders()}
            answer = Answer(self.url, response.status, headers, response.read(ANSWER_LIMIT))
            if not response.isclosed():
                # Cut short, or longer than any answer of ours.
                raise ConnectionResetError(f"an answer of status {response.status} did not end where it should")
        return answer

    def readinto(self, response: http.client.HTTPResponse, view: memoryview) -> int:
        """As many bytes as came, 0 at the end of the stream."""
        with self._faults():
            return response.readinto(view)

    def stream(self, path: str, headers: Mapping[str, str], *, patience: float) -> http.client.HTTPResponse:
        """Ask for an answer without end, to be read with lines(). ``patience``: seconds for its head to come."""
        with self._faults():
            self._begin("GET", path, headers)
            # http.client lets go of the socket if the answer says "Connection: close".
            self._streaming = self._socket
            self._streaming.settimeout(patience)
            response = self._http.getresponse()
            self._streaming.settimeout(self._timeouts.transfer)
            self.used = True
            return response

    def lines(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """Lines as they come, each with its newline, until the answer ends.

        Raises ConnectionLost if none comes in time, ProtocolError for one that does not end.
        """
        with self._faults():
            while line := response.readline(LINE_LIMIT + 1):
                if len(line) > LINE_LIMIT:
                    raise ProtocolError(f"{self.url} sent a line of more than {LINE_LIMIT} bytes")
                yield line

    def interrupt(self) -> None:
        """End lines(), from another thread: to the thread that reads, the answer is over."""
        if self._streaming is not None:
            with contextlib.suppress(OSError):
                # Of the bare socket: a TLS socket's own would say goodbye, and race with who reads.
                socket.socket.shutdown(self._streaming, socket.SHUT_RDWR)

    @property
    def reusable(self) -> bool:
        return self._http.sock is not None

    @property
    def stale(self) -> bool:
        """Whether the server has closed it, or said something unasked, while it lay idle."""
        return self._http.sock is None or _readable(self._http.sock, 0.0)

    def close(self) -> None:
        self._http.close()

    @property
    def _socket(self) -> socket.socket:
        sock: socket.socket | None = self._http.sock
        if sock is None:
            raise ConnectionLost(f"the connection to {self.url} was closed")
        return sock

    def _begin(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        self.url = self._address.url + path
        if self._http.sock is None:
            self._connect()
        self._http.putrequest(method, self._address.prefix + path)
        for name, value in headers.items():
            self._http.putheader(name, value)
        self._http.endheaders()

    def _connect(self) -> None:
        try:
            self._http.connect()
        except ssl.SSLError as fault:
            raise no_tls(self._address.url, fault) from None
        except OSError as fault:
            raise unreachable(self._address.url, fault) from None
        self._socket.settimeout(self._timeouts.transfer)

    def _send(self, body: Body, patience: float) -> Answer:
        sent = 0
        try:
            with _Selector() as arrival:
                arrival.register(self._socket, selectors.EVENT_READ)
                for piece in _pieces(body.pieces()):
                    if sent and arrival.select(0.0) and (early := self._early_answer(0.0)):
                        return self._refused(early)
                    self._socket.sendall(piece)
                    sent += len(piece)
        except OSError:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self._last_words()
            raise
        self._socket.settimeout(self._timeouts.transfer + patience)
        response = self._http.getresponse()
        if self._http.sock is not None:
            self._socket.settimeout(self._timeouts.transfer)
        self.used = True
        return self.read(response)

    def _early_answer(self, timeout: float) -> bytes:
        """The head of a final answer that came before its time; empty on 100 Continue and on silence."""
        sock = self._socket
        if timeout == 0.0 and isinstance(sock, ssl.SSLSocket):
            # A TLS socket turns readable for the protocol's own messages too.
            return b""
        if not _readable(sock, timeout):
            return b""
        head = b""
        sock.settimeout(max(timeout, LAST_WORDS))
        while not head.endswith(b"\r\n\r\n"):
            # Byte by byte: what follows the head is not ours to take.
            byte = sock.recv(1)
            if not byte:
                raise ConnectionResetError("closed before an answer")
            head += byte
        sock.settimeout(self._timeouts.transfer)
        return b"" if head.startswith(b"HTTP/1.1 100") else head

    def _refused(self, head: bytes) -> Answer:
        """The final answer to a body not sent, or not all of it. The connection cannot be used after it."""
        self._http.response_class = functools.partial(_Replayed, head)  # type: ignore[assignment]
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
        """Name what went wrong, and never use a connection again after it."""
        try:
            yield
        except (OSError, http.client.IncompleteRead) as fault:
            self.close()
            raise ConnectionLost(f"the connection to {self.url} broke: {str(fault) or type(fault).__name__}") from fault
        except http.client.HTTPException as fault:
            self.close()
            raise ProtocolError(f"{self.url} does not speak HTTP/1.1: {type(fault).__name__}: {fault}") from fault
        except BaseException:
            # Ctrl-C, or a body whose pieces raise: the request on the wire is half a request.
            self.close()
            raise


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self.timeout)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SEND_BYTES)
            sock.connect(self._path)
        except BaseException:
            sock.close()
            raise
        self.sock = sock


def _open(address: Address, timeout: float, context: ssl.SSLContext | None) -> http.client.HTTPConnection:
    if address.socket is not None:
        return _UnixConnection(address.socket, timeout)
    if address.secure:
        return http.client.HTTPSConnection(address.host, address.port, timeout=timeout, context=context)
    return http.client.HTTPConnection(address.host, address.port, timeout=timeout)


def unreachable(url: str, fault: Exception) -> ServiceUnreachable:
    """The error of a connection that could not be made."""
    return ServiceUnreachable(f"nothing answers at {url}: {str(fault) or type(fault).__name__}")


def no_tls(url: str, fault: Exception) -> ProtocolError:
    """The error of a connection that could not be made secure; trying again would not change that."""
    hint = "check the scheme of the URL and the server's certificate"
    if isinstance(fault, ssl.SSLCertVerificationError):
        hint = (
            "if an authority of your own signed it, name that authority's certificate: SSL_CERT_FILE=/path/to/ca.pem; "
            "the URL's host must be one the certificate is for"
        )
    return ProtocolError(f"no TLS with {url}: {fault}", hint=hint)


def _readable(sock: socket.socket, timeout: float) -> bool:
    with _Selector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(timeout))


def _pieces(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    """The same bytes, small pieces joined and large ones, uncopied, cut into what is sent at a time."""
    for piece in _joined(pieces):
        for start in range(0, len(piece), PIECE):
            yield piece[start : start + PIECE]


def _joined(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    pending = bytearray()
    for piece in pieces:
        small = len(piece) <= SMALL
        if pending and not (small and len(pending) + len(piece) <= JOINED):
            yield memoryview(pending)
            pending = bytearray()
        if small:
            pending += piece
        else:
            yield piece
    if pending:
        yield memoryview(pending)


class _Replayed(http.client.HTTPResponse):
    """An answer whose head was taken off the socket before."""

    def __init__(self, head: bytes, sock: socket.socket, debuglevel: int = 0, method: str | None = None) -> None:
        super().__init__(sock, debuglevel, method)
        self.fp = io.BufferedReader(_Prepended(head, self.fp))


class _Prepended(io.RawIOBase):
    def __init__(self, head: bytes, rest: io.BufferedReader) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._head:
            return self._rest.readinto1(buffer)
        count = min(len(buffer), len(self._head))
        buffer[:count] = self._head[:count]
        self._head = self._head[count:]
        return count

    def close(self) -> None:
        self._rest.close()
        super().close()
