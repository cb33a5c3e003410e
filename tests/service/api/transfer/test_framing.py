"""Request smuggling: whatever of a request other readers may take for the next one is never run as one.

Knows HTTP as bytes. Does not know the server's parser.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

TENSORS = {"w": torch.ones(4)}
HOST = b"Host: localhost\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
CHUNKS = b"Transfer-Encoding: chunked\r\n"
#: Stands for the length of the smuggled request, in a header.
LENGTH = b"Content-Length: LENGTH\r\n"

#: Heads behind which a smuggled request is sent as the body or as what follows; what the server answers.
REFUSED = {
    "upgrade, a length": b"POST {run}/reset-num-updates HTTP/1.1\r\n" + HOST + UPGRADE + LENGTH,
    "upgrade, a push": b"PUT {run}/updates/1 HTTP/1.1\r\n" + HOST + UPGRADE + LENGTH,
    "upgrade, a GET": b"GET /healthz HTTP/1.1\r\n" + HOST + UPGRADE + LENGTH,
    "upgrade to websocket": b"GET /healthz HTTP/1.1\r\n" + HOST + UPGRADE.replace(b"h2c", b"websocket") + LENGTH,
    "upgrade by Proxy-Connection": b"POST /healthz HTTP/1.1\r\n" + HOST + b"Proxy-" + UPGRADE + LENGTH,
    "upgrade among others": b"GET /healthz HTTP/1.1\r\n"
    + HOST
    + b"Connection: keep-alive, Upgrade\r\nUpgrade: TLS/1.0\r\n"
    + LENGTH,
    "upgrade, chunks": b"POST /healthz HTTP/1.1\r\n" + HOST + UPGRADE + CHUNKS,
    "CONNECT": b"CONNECT localhost:80 HTTP/1.1\r\n" + HOST,
    "CONNECT with a path": b"CONNECT /v1/runs HTTP/1.1\r\n" + HOST + LENGTH,
    "a length and chunks": b"POST /healthz HTTP/1.1\r\n" + HOST + LENGTH + CHUNKS,
    "chunks and a length": b"POST /healthz HTTP/1.1\r\n" + HOST + CHUNKS + LENGTH,
    "two lengths": b"POST /healthz HTTP/1.1\r\n" + HOST + LENGTH + b"Content-Length: 0\r\n",
    "the same length twice": b"POST /healthz HTTP/1.1\r\n" + HOST + LENGTH + LENGTH,
    "a list of lengths": b"POST /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: 0, 0\r\n",
    "a length with a sign": b"POST /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: +0\r\n",
    "a length of many zeros": b"POST /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: " + b"0" * 30 + b"\r\n",
    "a length in hexadecimal": b"POST /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: 0x0\r\n",
    "an empty length": b"POST /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: \r\n",
    "a blank before the colon": b"POST /healthz HTTP/1.1\r\n" + HOST + b"Content-Length : 0\r\n",
    "a folded length": b"POST /healthz HTTP/1.1\r\n" + HOST + b"Content-Length:\r\n 0\r\n",
    "folded chunks": b"POST /healthz HTTP/1.1\r\n" + HOST + b"Transfer-Encoding:\r\n chunked\r\n",
    "a bare line feed": b"POST /healthz HTTP/1.1\r\n" + HOST + b"X: y\nContent-Length: 0\r\n",
    "a bare carriage return": b"POST /healthz HTTP/1.1\r\n" + HOST + b"X: y\rContent-Length: 0\r\n",
    "a vertical tab": b"POST /healthz HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: \x0bchunked\r\n",
    "another coding": b"POST /healthz HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: xchunked\r\n",
    "chunked, but not last": b"POST /healthz HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked, identity\r\n",
    "chunked twice": b"POST /healthz HTTP/1.1\r\n" + HOST + CHUNKS + CHUNKS,
    "chunks in HTTP/1.0": b"POST /healthz HTTP/1.0\r\n" + HOST + CHUNKS,
    "HTTP/2": b"GET /healthz HTTP/2.0\r\n" + HOST,
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n",
    "HTTP/0.9": b"GET /healthz HTTP/0.9\r\n" + HOST,
    "no Host": b"GET /healthz HTTP/1.1\r\n",
    "two Hosts": b"GET /healthz HTTP/1.1\r\n" + HOST + b"Host: evil.example\r\n",
    "the same Host twice": b"GET /healthz HTTP/1.1\r\n" + HOST + HOST,
    "a Host that is a path": b"GET /healthz HTTP/1.1\r\nHost: localhost/x\r\n",
    "a Host that is a list": b"GET /healthz HTTP/1.1\r\nHost: localhost, evil.example\r\n",
    "a URL of another host": b"GET http://evil.example/healthz HTTP/1.1\r\n" + HOST,
    "a blank in the path": b"GET /healthz /x HTTP/1.1\r\n" + HOST,
}
#: Requests that are answered, and are their connection's last: what follows is read by nobody.
LAST = {
    "upgrade without a body": (200, b"GET /healthz HTTP/1.1\r\n" + HOST + UPGRADE),
    "curl's offer of HTTP/2": (
        200,
        b"GET /healthz HTTP/1.1\r\n"
        + HOST
        + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n",
    ),
    "Connection: close": (200, b"GET /healthz HTTP/1.1\r\n" + HOST + b"Connection: close\r\n"),
    "HTTP/1.0": (200, b"GET /healthz HTTP/1.0\r\n" + HOST),
    "HTTP/1.0, kept alive": (200, b"GET /healthz HTTP/1.0\r\n" + HOST + b"Connection: keep-alive\r\n"),
    "identity and chunks": (
        415,
        b"PUT {run}/updates/1 HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: identity\r\n" + CHUNKS,
    ),
    "an empty coding": (415, b"PUT {run}/updates/1 HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: ,chunked\r\n"),
}


@pytest.fixture
def run(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> PlainRun:
    return plain_run(server, TENSORS)


def talk(server: ServerProcess, *pieces: bytes, to_the_end: bool = False) -> bytes:
    """Send the pieces one by one, and give what comes back.

    to_the_end: until the server ends the connection; else the end is asked for after the first answer.
    """
    address, answers = urlsplit(server.url), b""
    with socket.create_connection((address.hostname, address.port), timeout=10) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):  # closed with bytes of ours unread
            for number, piece in enumerate(pieces):
                time.sleep(0.05 * number)
                raw.sendall(piece)
            while part := raw.recv(1 << 16):
                if not answers and not to_the_end:
                    with contextlib.suppress(OSError):  # the server has ended the connection already
                        raw.shutdown(socket.SHUT_WR)
                answers += part
    return answers


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", answers)]


def smuggled(head: bytes, run: PlainRun) -> tuple[bytes, bytes]:
    """The head, and the request behind it that must not be run."""
    inner = f"DELETE {run.path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    return head.replace(b"{run}", run.path.encode()).replace(b"LENGTH", b"%d" % len(inner)) + b"\r\n", inner


@pytest.mark.parametrize("apart", [False, True], ids=["in one piece", "in two"])
@pytest.mark.parametrize("what", REFUSED)
def test_ambiguous_request_is_refused(what: str, apart: bool, run: PlainRun, server: ServerProcess) -> None:
    """The request is refused, nothing behind its head is run, and the connection ends."""
    head, inner = smuggled(REFUSED[what], run)
    answers = talk(server, *((head, inner) if apart else (head + inner,)))

    assert statuses(answers) == [400]
    assert b'"bad_request"' in answers
    assert run.info()["num_updates"] == 0


@pytest.mark.parametrize("apart", [False, True], ids=["in one piece", "in two"])
@pytest.mark.parametrize("what", LAST)
def test_last_request_is_the_last(what: str, apart: bool, run: PlainRun, server: ServerProcess) -> None:
    """The request is answered, what follows is never run, and the connection ends."""
    status, head = LAST[what]
    first, inner = smuggled(head, run)
    body = b"0\r\n\r\n" if b"chunked" in head else b""
    answers = talk(server, *((first + body, inner) if apart else (first + body + inner,)))

    assert statuses(answers) == [status]
    assert run.info()["num_updates"] == 0


@pytest.mark.parametrize(
    "head", [REFUSED["upgrade, a GET"], LAST["upgrade without a body"][1]], ids=["refused", "last"]
)
def test_server_ends_the_connection(head: bytes, run: PlainRun, server: ServerProcess) -> None:
    """Who sends such a request and waits sees the connection end."""
    assert len(statuses(talk(server, *smuggled(head, run), to_the_end=True))) == 1


def test_push_that_closes_is_the_last(run: PlainRun, server: ServerProcess) -> None:
    """A body that is read straight into its place ends with its length, and so does a connection that was to close."""
    body = save(TENSORS)
    head = f"PUT {run.path}/updates/1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    first, inner = smuggled(f"{head}Content-Length: {len(body)}\r\n".encode(), run)

    assert statuses(talk(server, first + body + inner)) == [200]
    assert statuses(talk(server, first.replace(b"updates/1", b"updates/2") + body, inner)) == [200]
    assert run.info()["num_updates"] == 2


def test_request_sent_ahead_of_the_last_is_answered(run: PlainRun, server: ServerProcess) -> None:
    """A connection is closed after its last request, not while requests before it wait for their answers."""
    ahead = f"GET {run.path}/weights?min_step=9&wait=0.3 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    last = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

    assert statuses(talk(server, ahead + last, to_the_end=True)) == [409, 200]


@pytest.mark.parametrize("field", ["Authorization: Bearer x", "Origin: http://evil.example", "Ema-Writer: 99"])
def test_trailers_are_no_headers(field: str, run: PlainRun, server: ServerProcess) -> None:
    """What stands behind a chunked body was seen by no proxy that checks heads, and is not taken for a header."""
    body = save(TENSORS)
    chunk = b"%x\r\n%b\r\n0\r\n%b\r\n\r\n" % (len(body), body, field.encode())
    head = f"PUT {run.path}/updates/1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n".encode() + CHUNKS

    assert statuses(talk(server, head + b"\r\n" + chunk)) == [200]
