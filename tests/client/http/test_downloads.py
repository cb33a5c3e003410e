"""Answers that are read as they come: large bodies, and streams of lines. Knows scripts of raw HTTP."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ema_client.errors import ConnectionLost, ProtocolError, RunNotFound
from ema_client.http.connection import Timeouts
from ema_client.http.transport import Transport
from tests.client.http.scripts import TIMEOUTS, Scripted

# --- large bodies -----------------------------------------------------------------------------------------------------


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


# --- answers without end ----------------------------------------------------------------------------------------------


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
