"""Slices of a body that lies in shared memory: each server finds its own, under one secret that ends with the push.

Knows /proc, as a server does. Does not know sockets, or hosts (those of a cluster: test_direct_shared.py).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from ema_client.hosts.slicing import Slices, offered
from ema_client.http.body import Body
from ema_client.http.memfd import SharedBody
from ema_client.protocol import SECRET_BYTES, Segment
from ema_client.wire import PartCut

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memfd_create on this system")

HEADER = b"whole"
CUTS = (PartCut(b"first", ((0, 3),), ()), PartCut(b"second", ((3, 7),), ()), PartCut(b"rest", ((7, 8), (9, 10)), ()))


@pytest.fixture
def body() -> Body:
    shared = SharedBody(HEADER, 10)
    shared.data[:] = b"0123456789"
    return Body(shared.length, lambda: (memoryview(HEADER), shared.data), shared, data=lambda: (shared.data,))


def read(at: Segment, start: int, count: int) -> bytes:
    with Path(f"/proc/{at.pid}/fd/{at.fd}").open("rb") as file:
        file.seek(start)
        return file.read(count)


def test_each_finds_its_own(body: Body) -> None:
    """What is in front of the data is sent; the data are the slice's bytes and no others."""
    found = []
    with offered(body, wanted=True) as segment:
        slices = Slices(body, CUTS, segment=segment)
        for place in (0, 1):
            one = slices.of(place)
            assert one.shared is not None
            with one.shared.offered() as at:
                assert read(at, 0, SECRET_BYTES) == at.secret
                found.append((one.shared.head, read(at, at.offset, at.length)))
                assert one.length == one.shared.length == len(b"".join(one.pieces()))
        assert slices.of(2).shared is None, "of two spans, which are sent"
    assert found == [(b"first", b"012"), (b"second", b"3456")]


def test_one_that_has_answered_leaves_the_secret_to_the_others(body: Body) -> None:
    """The secret ends with the whole push, by whatever end."""
    with contextlib.suppress(ZeroDivisionError), offered(body, wanted=True) as segment:
        assert segment is not None
        slices = Slices(body, CUTS, segment=segment)
        for place in (0, 1):
            one = slices.of(place).shared
            assert one is not None
            with one.offered():
                pass
            assert read(segment, 0, SECRET_BYTES) == segment.secret
        raise ZeroDivisionError
    assert segment is not None
    assert read(segment, 0, SECRET_BYTES) == bytes(SECRET_BYTES)


def test_nobody_wants_it(body: Body) -> None:
    """Then it is not offered, and two pushes of one memory do not wait for each other."""
    with offered(body, wanted=False) as first, offered(body, wanted=False) as second:
        assert (first, second) == (None, None)
        assert Slices(body, CUTS, segment=first).of(0).shared is None
