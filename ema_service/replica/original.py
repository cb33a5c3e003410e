"""The original of a replica: requests to it, each over a connection of its own thread, answered by what it says.

Weights are received where they are to stay: straight into the memory that is given. Whatever goes wrong is an EmaError,
so that who follows has one thing to catch.

Knows HTTP, TLS by what the machine trusts, and a reader's token. Does not know what is done with an answer.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

from ema_client.errors import (
    PROBLEM_JSON,
    ConnectionLost,
    EmaError,
    ProtocolError,
    ServiceUnreachable,
    error_from_problem,
)
from ema_client.protocol import (
    HEADER_DIGEST,
    RunConfig,
    RunEvent,
    RunInfo,
    RunLayout,
    RunList,
    RunVersion,
    events_path,
    from_json,
    layout_path,
    run_path,
    runs_path,
    version_path,
    weights_path,
)

__all__ = ["Original", "check_original", "read_token"]

T = TypeVar("T")

#: Seconds for the original to be there, and to say anything: between two events it is silent for 15 at the most.
_CONNECT, _SILENCE = 5.0, 40.0
#: Bytes that are read of an error.
_PROBLEM_BYTES = 64 << 10
#: Bytes that are taken of a socket at once.
_AT_ONCE = 4 << 20


def check_original(url: str) -> None:
    """Raises ValueError for a URL that leads to no server."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.path.strip("/"):
        raise ValueError(f"{url!r}: expected http://HOST:PORT or https://HOST:PORT")


def read_token(path: Path) -> str:
    """The token in a file of one line. Raises OSError; ValueError, which does not quote the file, where it has none."""
    token = path.read_text(encoding="utf-8").strip()
    if not token.isascii() or not token.isprintable() or not token or " " in token:
        raise ValueError(f"{path}: expected one line with a token that may pull")
    return token


class Original:
    """The server that a replica follows. Thread-safe; each call raises EmaError.

    where: its URL by now, empty while that is not known.
    """

    def __init__(self, where: Callable[[], str], token: str | None = None) -> None:
        self._where = where
        self._headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {token}"} if token else {})}
        self._tls = ssl.create_default_context()
        self._lock = threading.Lock()
        self._open: set[http.client.HTTPConnection] = set()
        self._closed = False

    @property
    def url(self) -> str:
        """Its URL by now, empty while that is not known."""
        return self._where().rstrip("/")

    def close(self) -> None:
        """End what is being asked, and ask nothing any more."""
        with self._lock:
            self._closed = True
            for connection in self._open:
                _break(connection)

    def runs(self) -> tuple[RunInfo, ...]:
        """All runs that the token may read."""
        return self._json(runs_path(), RunList).runs

    def config(self, run: str) -> RunConfig:
        """With which a run was created there: of a shard, with the shard's tensors."""
        layout = self._json(layout_path(run), RunLayout)
        with self._asked(f"{run_path(run)}/config") as answer:
            whole = _parsed(answer.read(), RunConfig)
        return RunConfig(
            **{
                **{name: getattr(whole, name) for name in RunConfig.__dataclass_fields__},
                "layout": layout.layout,
                "copied": layout.copied,
            }
        )

    def version(self, run: str, created_at: float) -> RunVersion:
        """The newest version of a run, whose weights stay for a second."""
        query = {"created_at": repr(created_at), "hold": "true"}
        return self._json(version_path(run), RunVersion, query)

    def events(self, run: str, begun: Callable[[], None]) -> Iterator[RunEvent]:
        """What happens to a run, from its present version on. begun: called once the original tells."""
        with self._asked(events_path(run)) as answer:
            begun()
            data = b""
            with _faults(self.url):
                for line in iter(answer.readline, b""):
                    if line.startswith(b"data:"):
                        data += line[len(b"data:") :]
                    elif not line.strip() and data:
                        yield _parsed(data, RunEvent)
                        data = b""

    def weights(
        self, run: str, average: str, etag: str, created_at: float, head_bytes: int, into: memoryview
    ) -> bytes | None:
        """Receive the weights of one version of an average, all of it or an error; b"" where they have no digest.

        None where the original has the version no more. head_bytes: of the body, before its data. Returns the digest.
        """
        query = {"average": average, "created_at": repr(created_at)}
        headers = {"Range": "bytes=0-", "If-Range": etag}
        with self._asked(weights_path(run), query, headers) as answer:
            if answer.status != 206 or answer.headers.get("ETag") != etag:
                return None
            if answer.length != head_bytes + len(into):
                raise ProtocolError(f"run {run!r}: the original sends {answer.length} bytes of weights")
            with _faults(self.url):
                _fill(answer, memoryview(bytearray(head_bytes)))
                _fill(answer, into)
            return bytes.fromhex(answer.headers.get(HEADER_DIGEST, ""))

    # ----------------------------------------------------------------------------------------------------------------

    def _json(self, path: str, kind: type[T], query: Mapping[str, str] | None = None) -> T:
        with self._asked(path, query) as answer, _faults(self.url):
            return _parsed(answer.read(), kind)

    @contextlib.contextmanager
    def _asked(
        self, path: str, query: Mapping[str, str] | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to a GET, whose body is yet to be read; closed at the block's end."""
        url = self.url
        connection = self._connection(url)
        try:
            with _faults(url):
                connection.connect()
                connection.sock.settimeout(_SILENCE)
                target = f"{path}?{urlencode(query)}" if query else path
                connection.request("GET", target, headers={**self._headers, **(headers or {})})
                answer = connection.getresponse()
                if answer.status >= 400:
                    raise _error_of(answer)
            yield answer
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _connection(self, url: str) -> http.client.HTTPConnection:
        parts = urlsplit(url)
        if not parts.hostname:
            raise ServiceUnreachable("where the original is is not known yet")
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(
                parts.hostname, parts.port or 443, timeout=_CONNECT, context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=_CONNECT)
        with self._lock:
            if self._closed:
                raise ConnectionLost("the replica ends")
            self._open.add(connection)
        return connection


def _fill(answer: http.client.HTTPResponse, into: memoryview) -> None:
    """Read exactly as many bytes as there is room for. Raises OSError where the answer ends before."""
    at = 0
    while at < len(into):
        count = answer.readinto(into[at : at + _AT_ONCE])
        if not count:
            raise ConnectionResetError(f"the body ended {len(into) - at} bytes before its end")
        at += count


@contextlib.contextmanager
def _faults(url: str) -> Iterator[None]:
    """Turn a fault of the transport into an EmaError that names the original."""
    try:
        yield
    except ConnectionRefusedError as fault:
        raise ServiceUnreachable(f"the original {url} is not there: {fault}") from fault
    except (OSError, http.client.HTTPException, ValueError) as fault:
        # ValueError and AttributeError: of a connection that close() has broken
        raise ConnectionLost(f"the original {url}: {type(fault).__name__}: {fault}") from fault
    except AttributeError as fault:
        raise ConnectionLost(f"the original {url}: the connection was closed") from fault


def _parsed(raw: bytes, kind: type[T]) -> T:
    """Raises ProtocolError."""
    try:
        return from_json(kind, json.loads(raw))
    except ValueError as fault:
        raise ProtocolError(f"the original answered what no ema-service says: {fault}") from None


def _error_of(answer: http.client.HTTPResponse) -> EmaError:
    raw = answer.read(_PROBLEM_BYTES)
    told: Any = None
    if answer.headers.get("Content-Type", "").startswith(PROBLEM_JSON):
        with contextlib.suppress(ValueError):
            told = json.loads(raw)
    return error_from_problem(told if isinstance(told, dict) else {}, answer.status)


def _break(connection: http.client.HTTPConnection) -> None:
    """End whatever waits for a connection."""
    if connection.sock is not None:
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)
