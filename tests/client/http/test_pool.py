"""Connections between two requests. Knows scripts of raw HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ema_client.http.transport import Transport
from tests.client.http.scripts import ONCE, Scripted, body_of, ok


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
