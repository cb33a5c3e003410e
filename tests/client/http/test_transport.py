"""The transport against servers that misbehave. Knows scripts of raw HTTP (conftest.py); the real service is elsewhere.

connection, bulk and transport are tested together, through the transport: what matters is what a caller meets.
"""

from __future__ import annotations

import contextlib
import gc
import random
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ema_client.errors import (
    ConnectionLost,
    InternalError,
    LayoutMismatch,
    NonFinite,
    Overloaded,
    ProtocolError,
    RunNotFound,
    ServiceUnreachable,
    UsageError,
)
from ema_client.http import connection
from ema_client.http.connection import Body, Timeouts
from ema_client.http.retry import RetryPolicy
from ema_client.http.transport import Transport

QUICK = RetryPolicy(attempts=3, base=0.01, cap=0.02)
ONCE = RetryPolicy(attempts=1)
TIMEOUTS = Timeouts(connect=5.0, transfer=5.0, expect=5.0)
LARGE = 8 << 20

Scripted = Callable[..., Any]


@pytest.fixture
def transport() -> Iterator[Callable[..., Transport]]:
    """Make transports, closed after the test."""
    made: list[Transport] = []

    def make(url: str, retry: RetryPolicy = ONCE, **options: Any) -> Transport:
        made.append(Transport(url, retry=retry, **{"timeouts": TIMEOUTS, **options}))
        return made[-1]

    yield make
    for each in made:
        each.close()


def body_of(raw: bytes, piece: int = 1 << 20) -> Body:
    return Body(len(raw), lambda: (memoryview(raw)[i : i + piece] for i in range(0, len(raw), piece)))


def ok(peer: Any) -> None:
    """Answers every request of the connection with an empty object."""
    while request := peer.request():
        if "expect" in request.headers:
            peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        peer.body(request.length)
        peer.answer(200, {})


# --- control --------------------------------------------------------------------------------------------------------


def test_control_request_and_answer(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """Method, path, JSON body and token go out; the object comes back."""
    seen = []

    def script(peer: Any) -> None:
        request = peer.request()
        seen.append((request, peer.body(request.length)))
        peer.answer(201, {"a": 1})

    reply = transport(scripted(script).url, token="sesame").json("POST", "/v1/runs", {"run": "r"})

    request, body = seen[0]
    assert reply.data == {"a": 1}
    assert (request.method, request.target, body) == ("POST", "/v1/runs", b'{"run":"r"}')
    assert request.headers["authorization"] == "Bearer sesame"


def test_prefix_of_the_url_stands_before_every_path(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A service behind a reverse proxy is reached under its path, by control and by bulk requests."""
    seen = []

    def script(peer: Any) -> None:
        while request := peer.request():
            seen.append(request.target)
            peer.body(request.length)
            peer.answer(200, {})

    one = transport(scripted(script).url + "/ema/")
    one.json("GET", "/v1/runs")
    one.upload("/v1/runs/r/weights", body_of(b"x"), query={"step": 0, "num_updates": None})

    assert seen == ["/ema/v1/runs", "/ema/v1/runs/r/weights?step=0"]


def test_problem_is_raised_by_control_and_bulk(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """All three kinds of request raise the class of the problem's code, and the connection is used again."""

    def script(peer: Any) -> None:
        while request := peer.request():
            peer.body(request.length)
            peer.problem(404, "run_not_found")

    server = scripted(script)
    one = transport(server.url)
    for call in (
        lambda: one.json("GET", "/x"),
        lambda: one.upload("/x", body_of(b"x")),
        lambda: one.download("/x"),
    ):
        with pytest.raises(RunNotFound, match="the detail of run_not_found"):
            call()

    assert server.connections == 2


def test_page_of_a_proxy_is_a_protocol_error(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """HTML instead of our answer names URL and status, for control and bulk requests, and is not tried again."""

    def script(peer: Any) -> None:
        while request := peer.request():
            peer.body(request.length)
            peer.answer(502, b"<html>Bad Gateway</html>", "text/html")

    server = scripted(script)
    one = transport(server.url, QUICK)
    for call in (
        lambda: one.json("GET", "/x"),
        lambda: one.upload("/x", body_of(b"x")),
        lambda: one.download("/x"),
    ):
        with pytest.raises(ProtocolError, match=r"/x answered 502 \(text/html\).*Bad Gateway"):
            call()


def test_another_protocol_on_the_port(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A port that speaks something else is told apart from a service that broke, and is not tried again."""

    def script(peer: Any) -> None:
        peer.request()
        peer.send(b"ERR unknown command 'GET'\r\n\r\n")

    server = scripted(script)
    one = transport(server.url, QUICK)
    with pytest.raises(ProtocolError, match=server.url):
        one.json("GET", "/x")
    with pytest.raises(ProtocolError, match=server.url):
        one.download("/x")

    assert server.connections == 2


# --- nothing listens ------------------------------------------------------------------------------------------------


def test_unreachable_names_the_url_after_bounded_tries(free_url: str, transport: Callable[..., Transport]) -> None:
    """Where nothing listens, every kind of request says which URL and what to start, after the policy's tries."""
    one = transport(free_url, QUICK)
    for call in (
        lambda: one.json("GET", "/x"),
        lambda: one.upload("/x", body_of(b"x" * LARGE)),
        lambda: one.retrying(lambda _: one.download("/x")),
    ):
        with pytest.raises(ServiceUnreachable) as raised:
            call()
        assert free_url in raised.value.detail
        assert "ema-service serve" in raised.value.hint


def test_tries_are_bounded(transport: Callable[..., Transport], free_url: str) -> None:
    """The operation is called as often as the policy allows, with the number of the try."""
    tries = []

    def operation(number: int) -> None:
        tries.append(number)
        raise ServiceUnreachable("gone")

    with pytest.raises(ServiceUnreachable):
        transport(free_url, QUICK).retrying(operation)

    assert tries == [0, 1, 2]


# httpcore leaves a Unix socket that it could not connect to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_missing_socket_file(tmp_path: Path, transport: Callable[..., Transport]) -> None:
    """A Unix socket that is not there is a service that is not there."""
    one = transport(f"unix://{tmp_path}/none.sock")

    with pytest.raises(ServiceUnreachable, match=r"unix:///.*none\.sock"):
        one.json("GET", "/x")
    with pytest.raises(ServiceUnreachable, match=r"unix:///.*none\.sock"):
        one.upload("/x", body_of(b"x"))
    gc.collect()


def test_service_that_comes_up_meanwhile(transport: Callable[..., Transport], free_url: str) -> None:
    """A request made while the service starts succeeds once it listens."""
    port = int(free_url.rpartition(":")[2])
    one = transport(free_url, RetryPolicy(attempts=200, base=0.05, cap=0.05))
    started: list[socket.socket] = []

    def serve() -> None:
        listener = socket.create_server(("127.0.0.1", port))
        started.append(listener)
        listener.settimeout(10)
        sock, _ = listener.accept()
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
        sock.close()
        listener.close()

    thread = threading.Timer(0.3, serve)
    thread.start()
    try:
        assert one.json("GET", "/x").data == {}
    finally:
        thread.join(15)


def test_tls_that_cannot_be_is_not_tried_again(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """https to a port without TLS is the wrong scheme, not a broken connection."""

    def script(peer: Any) -> None:
        peer.sock.recv(1000)
        peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    server = scripted(script)
    one = transport(server.url.replace("http:", "https:"), QUICK)
    with pytest.raises(ProtocolError, match="no TLS"):
        one.json("GET", "/x")
    with pytest.raises(ProtocolError, match="no TLS"):
        one.upload("/x", body_of(b"x"))

    assert server.connections == 2


# --- retries --------------------------------------------------------------------------------------------------------


def test_connection_lost_is_tried_again(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A connection reset before the answer is made anew, for control and bulk requests."""

    def broken(peer: Any) -> None:
        request = peer.request()
        peer.body(min(request.length, 1))
        peer.reset()

    first = scripted(broken, broken, ok)
    second = scripted(broken, broken, ok)

    assert transport(first.url, QUICK).json("GET", "/x").data == {}
    assert transport(second.url, QUICK).upload("/x", body_of(b"x" * 1000)).data == {}
    assert (first.connections, second.connections) == (3, 3)


def test_retry_after_is_waited_for(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """503 with Retry-After is tried again, not before that time."""

    def busy(peer: Any) -> None:
        peer.request()
        peer.problem(503, "overloaded", Retry_After="0.3")

    server = scripted(busy, ok)
    before = time.monotonic()

    assert transport(server.url, QUICK).json("GET", "/x").data == {}
    assert time.monotonic() - before >= 0.3


@pytest.mark.parametrize(("status", "code", "cls"), [(503, "overloaded", Overloaded), (500, "internal", InternalError)])
def test_last_error_is_the_servers(
    scripted: Scripted, transport: Callable[..., Transport], status: int, code: str, cls: type[Exception]
) -> None:
    """When the tries are spent, what is raised is what the server said last."""

    def script(peer: Any) -> None:
        while peer.request():
            peer.problem(status, code)

    with pytest.raises(cls):
        transport(scripted(script).url, QUICK).json("GET", "/x")


# --- uploads --------------------------------------------------------------------------------------------------------


def test_upload_arrives_byte_for_byte(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A body of pieces of all sizes, empty ones among them, arrives as the bytes it is made of."""
    dice = random.Random(1)
    sizes = [0, 1, 7, 100, 65_536, 65_537, 1 << 20, 3, 0, 5 << 20, 2, 30_000, 30_000, 30_000, *([50_000] * 40)]
    pieces = [dice.randbytes(size) for size in sizes]
    raw = b"".join(pieces)
    seen = []

    def script(peer: Any) -> None:
        request = peer.request()
        peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        seen.append((request.headers, peer.body(request.length)))
        peer.answer(200, {"ok": True})

    reply = transport(scripted(script).url).upload("/x", Body(len(raw), lambda: map(memoryview, pieces)))

    headers, body = seen[0]
    assert reply.data == {"ok": True}
    assert body == raw
    assert headers["content-length"] == str(len(raw))
    assert headers["expect"] == "100-continue"


def test_small_upload_does_not_ask(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """Below the threshold a round trip would cost more than the body."""
    seen = []

    def script(peer: Any) -> None:
        while request := peer.request():
            seen.append("expect" in request.headers)
            if seen[-1]:
                peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            peer.body(request.length)
            peer.answer(200, {})

    one = transport(scripted(script).url)
    one.upload("/x", body_of(b"x" * connection.EXPECT_ABOVE))
    one.upload("/x", body_of(b"x" * (connection.EXPECT_ABOVE + 1)))

    assert seen == [False, True]


def test_refusal_before_the_body_spares_it(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A final answer instead of 100 Continue is raised, no byte of the body was sent, and the next request works."""
    received = []

    def refuse(peer: Any) -> None:
        peer.request()
        peer.problem(422, "layout_mismatch")
        received.append(peer.body(1))

    server = scripted(refuse, ok)
    one = transport(server.url)
    with pytest.raises(LayoutMismatch):
        one.upload("/x", body_of(b"x" * LARGE))

    assert one.upload("/x", body_of(b"x" * LARGE)).data == {}
    assert received == [b""]


def test_server_that_never_says_continue_gets_the_body(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """After a bounded wait the body is sent unasked, as RFC 9110 allows; a late 100 Continue disturbs nothing."""
    seen = []

    def script(peer: Any) -> None:
        request = peer.request()
        first = peer.body(1)
        peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        seen.append(len(first + peer.body(request.length - 1)))
        peer.answer(200, {})

    one = transport(scripted(script).url, timeouts=Timeouts(expect=0.1, transfer=5.0))

    assert one.upload("/x", body_of(b"x" * LARGE)).data == {}
    assert seen == [LARGE]


def test_refusal_in_the_middle_of_the_body_is_heard(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A server that answers and hangs up while the body is under way: its answer is raised, not "broken pipe"."""

    def script(peer: Any) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        peer.body(1 << 20)
        peer.problem(422, "layout_mismatch")
        # Until the client has stopped sending, so that unread data does not turn into a reset that drops the answer.
        with contextlib.suppress(OSError):  # the client has heard it already, and is gone
            peer.sock.shutdown(socket.SHUT_WR)
        while peer.sock.recv(1 << 20):
            pass

    with pytest.raises(LayoutMismatch, match="the detail of layout_mismatch"):
        transport(scripted(script).url).upload("/x", body_of(b"x" * (64 << 20)))


def test_reset_in_the_middle_of_the_body(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """Without an answer to read, a reset is a lost connection."""

    def script(peer: Any) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        peer.body(1 << 20)
        peer.reset()

    server = scripted(script)
    with pytest.raises(ConnectionLost, match=server.url):
        transport(server.url).upload("/x", body_of(b"x" * (64 << 20)))


def test_success_before_the_body_is_not_believed(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A server that has not had the body cannot have done anything with it."""

    def script(peer: Any) -> None:
        peer.request()
        peer.answer(200, {"applied": True})

    with pytest.raises(ConnectionLost, match="had not received"):
        transport(scripted(script).url).upload("/x", body_of(b"x" * LARGE))


def test_silent_server_is_given_up(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A server that takes the request and says nothing is a lost connection after the timeout, for every request."""

    def script(peer: Any) -> None:
        while peer.sock.recv(1 << 20):
            pass

    one = transport(scripted(script).url, timeouts=Timeouts(transfer=0.2, expect=0.1))
    for call in (
        lambda: one.json("GET", "/x"),
        lambda: one.upload("/x", body_of(b"x" * 10)),
        lambda: one.download("/x"),
    ):
        with pytest.raises(ConnectionLost):
            call()


def test_fault_of_the_pieces_leaves_no_half_request(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """When the body's own pieces raise, that error is the caller's, and the next request begins on a new connection."""

    def pieces() -> Iterator[memoryview]:
        yield memoryview(b"x" * 100_000)
        raise RuntimeError("the tensor is gone")

    def cut_short(peer: Any) -> None:
        request = peer.request()
        assert len(peer.body(request.length)) < request.length

    server = scripted(cut_short, ok)
    one = transport(server.url)
    with pytest.raises(RuntimeError, match="the tensor is gone"):
        one.upload("/x", Body(200_000, pieces))

    assert one.upload("/x", body_of(b"x")).data == {}


# --- kept connections -----------------------------------------------------------------------------------------------


def test_connection_is_kept(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """Uploads and downloads one after the other share one connection."""

    def script(peer: Any) -> None:
        while request := peer.request():
            peer.body(request.length)
            peer.answer(200, {})

    server = scripted(script)
    one = transport(server.url)
    for _ in range(3):
        one.upload("/x", body_of(b"x"))
        with one.download("/x") as download:
            download.readinto(memoryview(bytearray(2)))

    assert server.connections == 1


def test_connection_closed_while_idle_is_replaced(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A server that hung up between two requests costs no error and no retry."""
    closed = threading.Event()

    def one_request(peer: Any) -> None:
        request = peer.request()
        peer.body(request.length)
        peer.answer(200, {})
        peer.sock.close()
        closed.set()

    server = scripted(one_request)
    one = transport(server.url, ONCE)
    for number in range(3):
        one.upload("/x", body_of(b"x"))
        assert closed.wait(10)
        closed.clear()
        assert server.connections == number + 1


def test_connection_closed_as_the_request_goes_out(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A kept connection that dies under the next request is replaced at once, without the policy's pauses."""

    def dies_at_the_second(peer: Any) -> None:
        request = peer.request()
        peer.body(request.length)
        peer.answer(200, {})
        peer.request()
        peer.reset()

    server = scripted(dies_at_the_second, ok)
    one = transport(server.url, ONCE)
    one.upload("/x", body_of(b"x"))

    assert one.upload("/x", body_of(b"x")).data == {}
    assert server.connections == 2


def test_connection_that_says_close_is_not_kept(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """``Connection: close`` is obeyed."""

    def script(peer: Any) -> None:
        request = peer.request()
        peer.body(request.length)
        peer.answer(200, {}, Connection="close")
        assert peer.request() is None

    server = scripted(script)
    one = transport(server.url, ONCE)
    one.upload("/x", body_of(b"x"))
    one.upload("/x", body_of(b"x"))

    assert server.connections == 2


def test_threads_have_connections_of_their_own(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """Many threads may upload at once: each gets the answer to its own request."""

    def script(peer: Any) -> None:
        while request := peer.request():
            peer.answer(200, {"sum": sum(peer.body(request.length))})

    one = transport(scripted(script).url)
    answers: dict[int, Any] = {}

    def upload(number: int) -> None:
        for _ in range(5):
            answers[number] = one.upload("/x", body_of(bytes([number]) * 10_000)).data

    threads = [threading.Thread(target=upload, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert answers == {number: {"sum": number * 10_000} for number in range(8)}


def test_unix_socket(scripted: Scripted, transport: Callable[..., Transport], tmp_path: Path) -> None:
    """Control, upload and download work over a Unix socket."""
    one = transport(scripted(ok, path=str(tmp_path / "s.sock")).url)

    assert one.json("GET", "/x").data == {}
    assert one.upload("/x", body_of(b"x" * LARGE)).data == {}
    with one.download("/x") as download:
        received = bytearray(download.length)
        download.readinto(memoryview(received))
    assert received == b"{}"


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A server's context with a certificate of its own, which this process trusts."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=test"]
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, *words, *files], check=True, capture_output=True, timeout=60)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def test_tls(scripted: Scripted, transport: Callable[..., Transport], tls: ssl.SSLContext) -> None:
    """Control, upload and download work over TLS, with the token, and connections are kept."""
    raw = random.Random(3).randbytes(LARGE)
    seen = []

    def script(peer: Any) -> None:
        while request := peer.request():
            assert request.headers["authorization"] == "Bearer sesame"
            if "expect" in request.headers:
                peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            seen.append(peer.body(request.length))
            peer.answer(200, {} if request.target != "/big" else raw, "application/json")

    server = scripted(script, tls=tls)
    one = transport(server.url, token="sesame")
    assert one.json("GET", "/x").data == {}
    assert one.upload("/x", body_of(raw)).data == {}
    with one.download("/big") as download:
        received = bytearray(download.length)
        download.readinto(memoryview(received))

    assert seen == [b"", raw, b""]
    assert received == raw
    assert server.connections == 2


def test_refusal_over_tls(scripted: Scripted, transport: Callable[..., Transport], tls: ssl.SSLContext) -> None:
    """Over TLS too, a refusal comes before the body, and one in its middle is heard."""

    def at_once(peer: Any) -> None:
        peer.request()
        peer.problem(422, "layout_mismatch")
        assert peer.body(1) == b""

    def under_way(peer: Any) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        peer.body(1 << 20)
        peer.problem(422, "non_finite")
        peer.body(LARGE)

    one = transport(scripted(at_once, under_way, tls=tls).url)
    with pytest.raises(LayoutMismatch):
        one.upload("/x", body_of(b"x" * LARGE))
    with pytest.raises(NonFinite):
        one.upload("/x", body_of(b"x" * LARGE))


def test_certificate_that_nobody_vouches_for(
    scripted: Scripted, transport: Callable[..., Transport], tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate is checked, by control and by bulk requests, and a bad one is not tried again."""
    monkeypatch.delenv("SSL_CERT_FILE")

    def script(peer: Any) -> None:
        assert peer.sock.recv(1) == b"", "a client that should not trust this server spoke to it"

    server = scripted(script, tls=tls)
    one = transport(server.url, QUICK)
    for call in (lambda: one.json("GET", "/x"), lambda: one.download("/x")):
        with pytest.raises(ProtocolError, match="certificate"):
            call()

    assert server.connections == 2


# --- downloads ------------------------------------------------------------------------------------------------------


def test_download_fills_the_callers_memory(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A body is read in the lengths the caller asks for, into the caller's buffers."""
    raw = random.Random(2).randbytes(3 << 20)

    def script(peer: Any) -> None:
        peer.request()
        peer.answer(200, raw, "application/octet-stream", ETag='"1.0"')

    with transport(scripted(script).url).download("/x", query={"dtype": "F32", "prefix": None}) as download:
        received = bytearray(download.length)
        view = memoryview(received)
        for start, stop in [(0, 8), (8, 8), (8, 100_000), (100_000, len(raw))]:
            download.readinto(view[start:stop])

    assert received == raw
    assert download.headers["etag"] == '"1.0"'


def test_short_body_is_a_lost_connection(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A body that ends before its Content-Length is never taken for a whole one."""

    def script(peer: Any) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"x" * 99)

    with (
        pytest.raises(ConnectionLost, match="Content-Length of 100"),
        transport(scripted(script).url).download("/x") as download,
    ):
        download.readinto(memoryview(bytearray(100)))


def test_reset_in_the_middle_of_a_download(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A connection reset under way is a lost connection too."""

    def script(peer: Any) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"x" * 50)
        peer.reset()

    with pytest.raises(ConnectionLost), transport(scripted(script).url).download("/x") as download:
        download.readinto(memoryview(bytearray(100)))


def test_body_without_length_is_refused(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A proxy that makes chunks of a body takes away the length by which it is checked."""

    def script(peer: Any) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n")

    with pytest.raises(ProtocolError, match="without Content-Length"):
        transport(scripted(script).url).download("/x")


def test_download_broken_off_does_not_spoil_the_next(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """What is left of a body that the caller stopped reading is not taken for the next answer."""

    def script(peer: Any) -> None:
        while peer.request():
            peer.answer(200, b"x" * 1000, "application/octet-stream")

    server = scripted(script)
    one = transport(server.url)
    with one.download("/x") as download:
        download.readinto(memoryview(bytearray(10)))
    with one.download("/x") as download:
        whole = bytearray(1000)
        download.readinto(memoryview(whole))

    assert whole == b"x" * 1000
    assert server.connections == 2


def test_range_is_asked_for_with_its_etag(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A start is asked for together with the ETag it belongs to, and not without one."""
    seen = []

    def script(peer: Any) -> None:
        while request := peer.request():
            seen.append((request.headers.get("range"), request.headers.get("if-range")))
            peer.answer(206, b"xx", "application/octet-stream", Content_Range="bytes 8-9/10")

    one = transport(scripted(script).url)
    for start, etag in [(8, '"1.0"'), (8, None), (0, '"1.0"')]:
        with one.download("/x", start=start, etag=etag) as download:
            download.readinto(memoryview(bytearray(2)))

    assert seen == [("bytes=8-", '"1.0"'), (None, None), (None, None)]


def test_patience_outlasts_the_timeout(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A server that was asked to wait may take that much longer to answer."""

    def script(peer: Any) -> None:
        peer.request()
        time.sleep(0.6)
        peer.answer(200, b"xx", "application/octet-stream")

    one = transport(scripted(script).url, timeouts=Timeouts(transfer=0.3))

    with one.download("/x", patience=5.0) as download:
        download.readinto(memoryview(bytearray(2)))


# --- secrets and ends -----------------------------------------------------------------------------------------------


def test_token_is_never_shown(free_url: str, transport: Callable[..., Transport]) -> None:
    """Neither repr nor an error repeats the token."""
    one = transport(free_url, token="hunter2")
    with pytest.raises(ServiceUnreachable) as raised:
        one.upload("/x", body_of(b"x"))

    assert "hunter2" not in repr(one) + str(raised.value) + repr(raised.value)


@pytest.mark.parametrize("token", ["hunter2\r\nX: y", "hunter2 x", "hünter2", "hunter2\x00"])
def test_token_that_no_header_can_carry(token: str, free_url: str) -> None:
    """A token that would break out of its header is refused, and not shown."""
    with pytest.raises(UsageError, match="EMA_SERVICE_TOKEN") as raised:
        Transport(free_url, token=token)

    assert "nter2" not in str(raised.value)


def test_closed_transport_says_so(free_url: str) -> None:
    """Every request after close() is refused as what it is."""
    one = Transport(free_url)
    one.close()
    for call in (
        lambda: one.json("GET", "/x"),
        lambda: one.upload("/x", body_of(b"x")),
        lambda: one.download("/x"),
    ):
        with pytest.raises(UsageError, match="closed"):
            call()


def test_proxies_of_the_environment_are_not_used(
    scripted: Scripted, free_url: str, transport: Callable[..., Transport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control requests go the same straight way as bulk requests do."""
    monkeypatch.setenv("HTTP_PROXY", free_url)
    monkeypatch.setenv("ALL_PROXY", free_url)

    assert transport(scripted(ok).url).json("GET", "/x").data == {}


# --- answers without end --------------------------------------------------------------------------------------------

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n%s\r\n"


@pytest.mark.parametrize("closing", [b"", b"Connection: close\r\n"], ids=["kept", "closing"])
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
def test_a_stream_is_read_until_another_thread_closes_it(
    scripted: Scripted,
    transport: Callable[..., Transport],
    request: pytest.FixtureRequest,
    secure: bool,
    closing: bytes,
) -> None:
    """Lines come as they are sent, cut anywhere; close() from another thread wakes the one that waits for more."""

    def script(peer: Any) -> None:
        assert peer.request().headers["accept"] == "text/event-stream"
        peer.send(STREAM % closing + b"3\r\none\r\n" + b"5\r\n\ntwo\n\r\n")
        # Silent, until the client has hung up.
        assert peer.body(1) == b""

    server = scripted(script, tls=request.getfixturevalue("tls") if secure else None)
    stream = transport(server.url).stream("/x", accept="text/event-stream", patience=5.0)
    lines = stream.lines()
    assert [next(lines), next(lines)] == [b"one\n", b"two\n"]
    rest: list[bytes] = []
    reader = threading.Thread(target=lambda: rest.extend(_until_broken(lines)))
    reader.start()
    before = time.monotonic()
    stream.close()
    reader.join(TIMEOUTS.transfer * 2)
    assert not reader.is_alive()
    assert time.monotonic() - before < TIMEOUTS.transfer
    assert rest == []


def _until_broken(lines: Iterator[bytes]) -> Iterator[bytes]:
    with contextlib.suppress(ConnectionLost):
        yield from lines


def test_a_stream_that_is_refused(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """The error of the answer is raised; silence in place of an answer is a lost connection, after ``patience``."""

    def refuses(peer: Any) -> None:
        peer.request()
        peer.problem(404, "run_not_found")

    def waits(peer: Any) -> None:
        peer.request()
        peer.body(1)

    one = transport(scripted(refuses, waits).url)
    with pytest.raises(RunNotFound):
        one.stream("/x", accept="*/*", patience=5.0)
    with pytest.raises(ConnectionLost) as lost:
        one.stream("/x", accept="*/*", patience=0.2)
    assert isinstance(lost.value.__cause__, TimeoutError)


def test_a_line_without_end(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A line beyond the limit is an error before it fills the memory."""

    def script(peer: Any) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        for _ in range(40):
            peer.send(b"x" * (1 << 16))

    stream = transport(scripted(script).url).stream("/x", accept="*/*", patience=5.0)
    with pytest.raises(ProtocolError, match="line of more than"):
        next(stream.lines())


def test_head_is_a_status(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """What a GET would be answered with, without its body, and with as much patience as is asked of the service."""

    def script(peer: Any) -> None:
        asked = peer.request()
        assert (asked.method, asked.target) == ("HEAD", "/x?min_step=3")
        peer.send(b"HTTP/1.1 409 Conflict\r\nContent-Length: 99\r\n\r\n")

    assert transport(scripted(script).url).head("/x", query={"min_step": 3}, patience=1.0) == 409
