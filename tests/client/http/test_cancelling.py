"""Requests that another thread ends: whatever they wait for, at once, and no other request with them.

Knows scripts of raw HTTP. Does not know who cancels, or why.
"""

from __future__ import annotations

import http.client
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from ema_client.errors import ConnectionLost
from ema_client.http.cancelling import Cancellation
from ema_client.http.connection import Timeouts
from ema_client.http.transport import Transport
from tests.client.http.scripts import LARGE, Scripted, body_of, ok
from tests.waiting import wait_until

#: Longer than a test may take.
SILENCE = Timeouts(transfer=300.0, kept=300.0, expect=300.0)
SOON = 30.0


class Thread:
    """Does something on another thread, until it is cancelled."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.cancellation = Cancellation()
        self.fault: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self.cancellation:
                self._work()
        except ConnectionLost as fault:
            self.fault = fault

    def assert_ends(self) -> None:
        self.cancellation.cancel()
        self._thread.join(SOON)
        assert not self._thread.is_alive()
        assert isinstance(self.fault, ConnectionLost)


@pytest.mark.parametrize(("secure", "kept"), [(False, 0), (False, 1), (True, 0)], ids=["new", "kept", "tls"])
@pytest.mark.parametrize("stands", ["ask", "body", "answer"])
def test_an_upload(
    stands: str,
    secure: bool,
    kept: int,
    scripted: Scripted,
    transport: Callable[..., Transport],
    request: pytest.FixtureRequest,
) -> None:
    """Ends while it waits to be asked for its body, while nobody takes the body, and while nobody answers."""
    stood, over = threading.Event(), threading.Event()

    def script(peer: Any) -> None:
        for _ in range(kept):
            peer.body(peer.request().length)
            peer.answer(200, {})
        head = peer.request()
        if stands != "ask":
            peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if stands == "answer":
            peer.body(head.length)
        stood.set()
        over.wait(SOON)

    tls: dict[str, ssl.SSLContext] = {"tls": request.getfixturevalue("tls")} if secure else {}
    one = transport(scripted(script, **tls).url, timeouts=SILENCE)
    for _ in range(kept):
        one.upload_once("/x", body_of(b"x"))
    body = body_of(bytes(LARGE))
    thread = Thread(lambda: one.upload_once("/x", body))
    assert stood.wait(SOON)
    # Until the kernel takes no more.
    time.sleep(0.2)
    thread.assert_ends()
    over.set()


@pytest.mark.parametrize("stands", ["head", "body"])
def test_a_download(stands: str, scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """Ends while it waits for the answer, and in the middle of the answer."""
    stood, over = threading.Event(), threading.Event()

    def script(peer: Any) -> None:
        peer.request()
        if stands == "body":
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        stood.set()
        over.wait(SOON)

    one = transport(scripted(script).url, timeouts=SILENCE)

    def read() -> None:
        with one.download("/x") as body:
            body.readinto(memoryview(bytearray(100)))

    thread = Thread(read)
    assert stood.wait(SOON)
    thread.assert_ends()
    over.set()


def test_a_download_that_is_handed_over(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """Is that of the thread that reads on, and ends with that thread's work."""
    over = threading.Event()

    def script(peer: Any) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        over.wait(SOON)

    one, reads = transport(scripted(script).url, timeouts=SILENCE), threading.Event()
    with one.download("/x") as body:

        def read_on() -> None:
            body.hand_over()
            reads.set()
            body.readinto(memoryview(bytearray(100)))

        thread = Thread(read_on)
        assert reads.wait(SOON)
        thread.assert_ends()
    over.set()


def test_a_connection_that_is_being_opened(
    scripted: Scripted, transport: Callable[..., Transport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is closed once it is open: nothing is asked over it."""
    connecting, connects, asked = threading.Event(), http.client.HTTPConnection.connect, list[Any]()
    cancelled = threading.Event()

    def connect(self: http.client.HTTPConnection) -> None:
        connecting.set()
        assert cancelled.wait(SOON)
        connects(self)

    one = transport(scripted(lambda peer: asked.append(peer.request())).url, timeouts=SILENCE)
    monkeypatch.setattr(http.client.HTTPConnection, "connect", connect)
    thread = Thread(lambda: one.upload_once("/x", body_of(b"x")))
    assert connecting.wait(SOON)
    thread.cancellation.cancel()
    cancelled.set()
    thread.assert_ends()
    wait_until(lambda: asked)
    assert asked == [None]


def test_other_requests_go_on(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """A connection that a cancelled thread has given back is somebody else's."""
    server = scripted(ok)
    one = transport(server.url, timeouts=SILENCE)
    with Cancellation() as cancellation:
        one.upload_once("/x", body_of(b"x"))
        cancellation.cancel()
    one.upload_once("/x", body_of(b"x"))
    assert server.connections == 1


def test_nothing_is_asked_any_more(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """Of a thread that was cancelled between two requests."""
    server = scripted(ok)
    one = transport(server.url, timeouts=SILENCE)
    with Cancellation() as cancellation:
        cancellation.cancel()
        with pytest.raises(ConnectionLost):
            one.upload_once("/x", body_of(b"x"))
    assert server.connections == 0


def test_idle_connections_stay(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """What was cancelled says nothing of the service."""
    stood, over, begun = threading.Event(), threading.Event(), threading.Event()

    def first(peer: Any) -> None:
        request = peer.request()
        peer.body(request.length)
        begun.wait(SOON)
        peer.answer(200, {})
        ok(peer)

    def silent(peer: Any) -> None:
        peer.request()
        begun.set()
        stood.set()
        over.wait(SOON)

    server = scripted(first, silent)
    one = transport(server.url, timeouts=SILENCE)
    kept = threading.Thread(target=lambda: one.upload_once("/x", body_of(b"x")))
    kept.start()
    while server.connections < 1:
        time.sleep(0.01)
    thread = Thread(lambda: one.upload_once("/x", body_of(b"y")))
    assert stood.wait(SOON)
    kept.join(SOON)
    thread.assert_ends()
    one.upload_once("/x", body_of(b"x"))
    assert server.connections == 2
    over.set()
