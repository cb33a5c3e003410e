"""Requests over TLS, and where TLS cannot be. Knows scripts of raw HTTP and a certificate of the test's own."""

from __future__ import annotations

import random
import ssl
from collections.abc import Callable
from typing import Any

import pytest

from ema_client.errors import LayoutMismatch, NonFinite, ProtocolError
from ema_client.http.transport import Transport
from tests.client.http.scripts import LARGE, QUICK, Scripted, body_of


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
