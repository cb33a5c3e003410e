"""The transport against servers that misbehave: control requests, retries, secrets. Knows scripts of raw HTTP.

What matters is what a caller meets, so connection and pool are tested through the transport too (test_uploads.py,
test_downloads.py, test_pool.py, test_tls.py); the real service is elsewhere.
"""

from __future__ import annotations

import gc
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ema_client.errors import (
    ConnectionLost,
    InternalError,
    Overloaded,
    ProtocolError,
    RunNotFound,
    ServiceUnreachable,
    UsageError,
)
from ema_client.http.retry import RetryPolicy
from ema_client.http.transport import Transport
from tests.client.http.scripts import LARGE, QUICK, Scripted, body_of, ok

# --- control ----------------------------------------------------------------------------------------------------------


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
            peer.answer(403, b"<html>No entry</html>", "text/html")

    server = scripted(script)
    one = transport(server.url, QUICK)
    for call in (
        lambda: one.json("GET", "/x"),
        lambda: one.upload("/x", body_of(b"x")),
        lambda: one.download("/x"),
    ):
        with pytest.raises(ProtocolError, match=r"/x answered 403 \(text/html\).*No entry"):
            call()


def test_gateways_failure_is_tried_again(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A gateway whose service is away for a moment is asked again, by every kind of request."""
    seen: list[str] = []

    def script(peer: Any) -> None:
        while request := peer.request():
            peer.body(request.length)
            seen.append(request.method)
            if seen.count(request.method) < 3:
                peer.answer(502, b"<html>Bad Gateway</html>", "text/html")
            else:
                peer.answer(200, {})

    one = transport(scripted(script).url, QUICK)

    assert one.json("POST", "/x").data == {}
    assert one.upload("/x", body_of(b"x")).data == {}
    with one.retrying(lambda _: one.download("/x")) as download:
        assert download.length == 2
    assert seen == ["POST"] * 3 + ["PUT"] * 3 + ["GET"] * 3


#: An answer of the service, to be cut at each byte.
ANSWER = (
    b"HTTP/1.1 200 OK\r\ndate: Sat, 28 Nov 2026 13:00:00 GMT\r\ncontent-type: application/json\r\n"
    b'content-length: 11\r\netag: "1.0"\r\n\r\n{"step": 1}'
)


@pytest.mark.parametrize("by_reset", [False, True])
def test_answer_cut_anywhere_is_a_lost_connection(
    scripted: Scripted, transport: Callable[..., Transport], by_reset: bool
) -> None:
    """Wherever in an answer the connection ends, the request has no answer, and may be made again."""
    cuts = iter(range(len(ANSWER)))

    def script(peer: Any) -> None:
        request = peer.request()
        peer.body(request.length)
        peer.send(ANSWER[: next(cuts)])
        if by_reset:
            peer.reset()

    one = transport(scripted(script).url)

    def read_whole() -> None:
        with one.download("/x") as download:
            download.readinto(memoryview(bytearray(11)))

    calls = [lambda: one.json("GET", "/x"), lambda: one.upload("/x", body_of(b"x")), read_whole]
    for call in calls:
        cuts = iter(range(len(ANSWER)))
        for _ in range(len(ANSWER)):
            with pytest.raises(ConnectionLost):
                call()


def test_refusal_cut_inside_its_head(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """The answer to a large body that was announced and not sent yet is no answer either where its head is cut."""
    cuts = iter(range(1, 40))

    def script(peer: Any) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"[: next(cuts)])

    one = transport(scripted(script).url)
    for _ in range(1, 40):
        with pytest.raises(ConnectionLost):
            one.upload("/x", body_of(b"x" * LARGE))


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


def test_head_is_a_status(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """What a GET would be answered with, without its body, and with as much patience as is asked of the service."""

    def script(peer: Any) -> None:
        asked = peer.request()
        assert (asked.method, asked.target) == ("HEAD", "/x?min_step=3")
        peer.send(b"HTTP/1.1 409 Conflict\r\nContent-Length: 99\r\n\r\n")

    assert transport(scripted(script).url).head("/x", query={"min_step": 3}, patience=1.0) == 409


# --- nothing listens --------------------------------------------------------------------------------------------------


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


def test_tries_that_bring_something_do_not_count(transport: Callable[..., Transport], free_url: str) -> None:
    """The policy counts anew after a try that brought more than any before; what is brought again is nothing more."""
    tries: list[int] = []
    bytes_there = [5, 9, 3, 10, 10, 10]

    def operation(number: int) -> None:
        tries.append(number)
        raise ServiceUnreachable("gone")

    with pytest.raises(ServiceUnreachable):
        transport(free_url, QUICK).retrying(operation, brought=lambda: bytes_there[len(tries)])

    # After 9 bytes, more than the 5 at the beginning, 3 are nothing new; 10 are, and two tries more bring nothing.
    assert tries == [0, 1, 2, 3, 4]


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


# --- retries ----------------------------------------------------------------------------------------------------------


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


# --- secrets and ends -------------------------------------------------------------------------------------------------


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


def test_unix_socket(scripted: Scripted, transport: Callable[..., Transport], tmp_path: Path) -> None:
    """Control, upload and download work over a Unix socket."""
    one = transport(scripted(ok, path=str(tmp_path / "s.sock")).url)

    assert one.json("GET", "/x").data == {}
    assert one.upload("/x", body_of(b"x" * LARGE)).data == {}
    with one.download("/x") as download:
        received = bytearray(download.length)
        download.readinto(memoryview(received))
    assert received == b"{}"
