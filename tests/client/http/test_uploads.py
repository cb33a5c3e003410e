"""Large bodies on their way to servers that refuse, reset or say nothing. Knows scripts of raw HTTP."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from ema_client.errors import ConnectionLost, EmaError, LayoutMismatch
from ema_client.http import connection, uploads
from ema_client.http.body import Body
from ema_client.http.connection import Timeouts
from ema_client.http.memfd import SharedBody
from ema_client.http.transport import Transport
from ema_client.tensors.body import encode
from tests.client.http.scripts import LARGE, Scripted, body_of, ok


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


def test_large_body_to_this_host_goes_without_a_digest(
    scripted: Scripted, transport: Callable[..., Transport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no wire in between; a small body goes with its digest all the same."""
    small, large = encode({"w": torch.zeros(10)}), encode({"w": torch.zeros(1000)})
    monkeypatch.setattr(uploads, "_DIGEST_UP_TO", small.length)
    seen = []

    def script(peer: Any) -> None:
        while request := peer.request():
            seen.append("ema-digest" in request.headers)
            peer.body(request.length)
            peer.answer(200, {})

    one = transport(scripted(script).url)
    one.upload("/x", small)
    one.upload("/x", large)

    assert seen == [True, False]


def test_all_tries_of_a_push_have_one_key(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """Hosts that have some of it know the rest for the same push; another push has another key."""
    seen = []

    def script(peer: Any) -> None:
        while request := peer.request():
            seen.append(request.headers["ema-push"])
            peer.body(request.length)
            peer.answer(503 if len(seen) == 1 else 200, {})

    one, body = transport(scripted(script).url), body_of(b"x")
    with contextlib.suppress(EmaError):
        one.upload_once("/x", body)
    one.upload_once("/x", body)
    one.upload_once("/x", body_of(b"x"))
    assert seen[0] == seen[1] != seen[2]


class Unwanted(Exception):
    """What ends the sending of a body in the tests below."""


@pytest.mark.parametrize("taken", [0, 64 << 20])
def test_a_body_that_is_not_wanted_any_more_ends(
    scripted: Scripted, transport: Callable[..., Transport], taken: int
) -> None:
    """Whoever looks ends it, although the service takes no byte, or has all of them and says nothing."""
    reached, ended = threading.Event(), threading.Event()
    moved = [time.monotonic()]

    def script(peer: Any) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        peer.body(taken)
        reached.set()
        ended.wait(60)

    def look() -> None:
        if reached.is_set() and time.monotonic() > moved[-1] + 0.5:
            raise Unwanted

    body = replace(body_of(bytes(64 << 20)), moved=lambda _: moved.append(time.monotonic()), look=look)
    one = transport(scripted(script).url, timeouts=Timeouts(transfer=50.0))
    with pytest.raises(Unwanted):
        one.upload_once("/x", body)
    ended.set()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memfd_create on this system")
def test_a_hand_over_that_is_not_wanted_any_more_ends(scripted: Scripted, transport: Callable[..., Transport]) -> None:
    """Of a body that the service was to read out of shared memory, and says nothing to."""
    reached, ended = threading.Event(), threading.Event()

    def script(peer: Any) -> None:
        peer.request()
        reached.set()
        ended.wait(60)

    def look() -> None:
        if reached.is_set():
            raise Unwanted

    shared = SharedBody(b"", 2 << 20)
    one = transport(scripted(script).url, timeouts=Timeouts(transfer=50.0))
    with pytest.raises(Unwanted):
        one.upload_once("/x", Body(shared.length, lambda: [shared.data], shared, look=look))
    ended.set()
