"""Memory that another process reads: its secret, its seals, its turns. Knows /proc, as a service does."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ema_client.errors import ConnectionLost
from ema_client.http.body import Body
from ema_client.http.memfd import SharedBody
from ema_client.http.retry import RetryPolicy
from ema_client.http.transport import Transport
from ema_client.protocol import Segment

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memfd_create on this system")


def test_secret_is_there_only_while_it_is_offered() -> None:
    """Whoever gives up may fill the memory anew: a service that still reads it finds the secret gone."""
    body = SharedBody(b"h" * 16, 8192)
    with body.offered() as first:
        assert _in_segment(first, 0, 32) == first.secret
        assert _in_segment(first, first.offset, 16) == b"h" * 16
    with pytest.raises(ZeroDivisionError), body.offered() as second:
        raise ZeroDivisionError

    assert first.secret != second.secret
    assert _in_segment(first, 0, 32) == bytes(32)
    assert (second.offset + 16) % 4096 == 0
    assert second.length == body.length == 16 + 8192


def _in_segment(at: Segment, offset: int, count: int) -> bytes:
    with Path(f"/proc/{at.pid}/fd/{at.fd}").open("rb") as file:
        file.seek(offset)
        return file.read(count)


def test_secret_is_gone_after_a_lost_answer(scripted: Callable[..., Any]) -> None:
    """A push whose answer never came leaves nothing that a service could still take."""
    seen: list[Segment] = []

    def script(peer: Any) -> None:
        request = peer.request()
        seen.append(Segment.from_header(request.headers["ema-segment"]))
        assert _in_segment(seen[-1], 0, 32) == seen[-1].secret
        peer.reset()

    shared = SharedBody(b"", 2 << 20)
    with contextlib.closing(Transport(scripted(script).url, retry=RetryPolicy(attempts=1))) as transport:
        with pytest.raises(ConnectionLost):
            transport.upload("/x", Body(shared.length, lambda: [shared.data], shared))
        assert _in_segment(seen[-1], 0, 32) == bytes(32)


def test_two_threads_take_turns() -> None:
    """One memory is offered to one push at a time."""
    body, begun, order = SharedBody(b"", 10), threading.Event(), []

    def second() -> None:
        begun.set()
        with body.offered():
            order.append("second")

    with body.offered():
        thread = threading.Thread(target=second)
        thread.start()
        assert begun.wait(20)
        order.append("first")
    thread.join(20)

    assert order == ["first", "second"]


def test_memory_is_sealed() -> None:
    """A service must not meet memory that is gone: the file can neither shrink nor grow."""
    with SharedBody(b"", 10).offered() as offered:
        for size in (10, 100_000):
            with pytest.raises(PermissionError):
                os.truncate(f"/proc/{offered.pid}/fd/{offered.fd}", size)
