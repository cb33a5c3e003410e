"""A push is cut while it comes in, in this process: how much of it is there at once, and who hears of a refusal.

Knows bodies and layouts. Does not know HTTP (test_gateway).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import torch
from safetensors.torch import load, save

from ema_client.errors import DigestMismatch, EmaError, Overloaded, RequestTimeout, StaleStep
from ema_client.protocol import DIGEST_BYTES, DIGEST_FOLLOWS, TensorSpec
from ema_service.averaging.digest import Digest
from ema_service.cluster import LayoutMap
from ema_service.cluster.gateway import pushes
from ema_service.cluster.gateway.pushes import Slice, Splitting
from ema_service.memory import Layout

TENSORS = {"w": torch.randn(400, 50), "v": torch.randn(3)}
SHARDS = LayoutMap(Layout([TensorSpec("w", (400, 50), "F32"), TensorSpec("v", (3,), "F32")]), 3)


class Sender:
    """A body that comes in pieces. taken: how many have been taken. stop: before which it falls silent."""

    def __init__(self, size: int = 1000, stop: int | None = None) -> None:
        body = save(TENSORS)
        self.pieces = [body[at : at + size] for at in range(0, len(body), size)]
        self.taken = 0
        self.stop = stop

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for number, piece in enumerate(self.pieces):
            await asyncio.sleep(3600 if number == self.stop else 0)
            self.taken += 1
            yield piece


async def _read(part: Slice) -> bytes:
    return b"".join([chunk async for chunk in part.body()])


def test_hosts_have_the_whole_together() -> None:
    """Each a body of its own, as long as was announced."""
    parts: dict[int, bytes] = {}

    async def send(part: Slice) -> int:
        parts[part.place] = body = await _read(part)
        assert len(body) == part.length
        return part.place

    sender = Sender()
    answers = asyncio.run(Splitting(SHARDS, send, None, None).run(aiter(sender)))
    assert answers == [0, 1, 2]
    rows = [load(parts[place])["w"] for place in range(3)]
    assert torch.equal(torch.cat(rows), TENSORS["w"])


def test_a_slow_host_has_the_sender_wait() -> None:
    """No more of a body is held than a few pieces."""

    async def run() -> int:
        async def send(_: Slice) -> None:
            await asyncio.sleep(3600)

        sender = Sender()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(Splitting(SHARDS, send, None, None).run(aiter(sender)), 0.5)
        return sender.taken

    assert asyncio.run(run()) <= 4


@pytest.mark.parametrize("fault", [StaleStep("old"), Overloaded("full")])
def test_a_refusal_ends_all(fault: EmaError) -> None:
    """At once: the rest of the body is not waited for, and no host is left waiting."""
    ended: list[int] = []

    async def send(part: Slice) -> None:
        if part.place == 1:
            raise fault
        try:
            await _read(part)
            await asyncio.sleep(3600)
        finally:
            ended.append(part.place)

    sender = Sender()
    with pytest.raises(type(fault)):
        asyncio.run(asyncio.wait_for(Splitting(SHARDS, send, None, None).run(aiter(sender)), 5))
    assert ended == [0]
    assert sender.taken < len(sender.pieces)


@pytest.mark.parametrize("stop", [0, 5])
def test_a_silent_sender_is_left(stop: int) -> None:
    """Before the header and in the middle, and the hosts with it."""

    async def send(part: Slice) -> None:
        await _read(part)

    splitting = Splitting(SHARDS, send, None, None, silence=0.2)
    with pytest.raises(RequestTimeout):
        asyncio.run(asyncio.wait_for(splitting.run(aiter(Sender(stop=stop))), 5))


def test_a_refusal_is_heard_while_the_sender_is_silent() -> None:
    """Nobody waits for bytes that no host will take."""

    async def send(_: Slice) -> None:
        raise StaleStep("old")

    with pytest.raises(StaleStep):
        asyncio.run(asyncio.wait_for(Splitting(SHARDS, send, None, None).run(aiter(Sender(stop=5))), 5))


def _digested(*, right: bool) -> bytes:
    """The whole body, with the digest that a sender puts behind it, or another."""
    body = save(TENSORS)
    digest = Digest()
    digest.update(memoryview(body)[8 + int.from_bytes(body[:8], "little") :])
    return body + (digest.digest() if right else bytes(DIGEST_BYTES))


@pytest.mark.parametrize("right", [True, False])
def test_a_body_is_checked_before_a_host_has_its_slice(right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that had all of a damaged slice would vote for it. Meanwhile it hears that the sender is there, and has
    what was sent in the end."""
    monkeypatch.setattr(pushes, "_SIGN_OF_LIFE", 0.01)
    body, come, ended = _digested(right=right), [bytearray() for _ in range(3)], list[int]()

    async def send(part: Slice) -> int:
        async for chunk in part.body():
            come[part.place] += chunk
        ended.append(part.place)
        return part.place

    async def sender() -> AsyncIterator[bytes]:
        for at in range(0, len(body) - DIGEST_BYTES, 1000):
            yield body[at : min(at + 1000, len(body) - DIGEST_BYTES)]
        await asyncio.sleep(0.2)
        before = len(come[0])
        await asyncio.sleep(0.2)
        assert len(come[0]) > before, "a sign of life"
        assert ended == []
        yield body[-DIGEST_BYTES:]

    splitting = Splitting(SHARDS, send, len(body), DIGEST_FOLLOWS)
    if right:
        asyncio.run(splitting.run(aiter(sender())))
        assert torch.equal(torch.cat([load(bytes(each[:-DIGEST_BYTES]))["w"] for each in come]), TENSORS["w"])
    else:
        with pytest.raises(DigestMismatch):
            asyncio.run(splitting.run(aiter(sender())))
        assert ended == []
