"""Who asks that hosts have one ring, and what follows from the answers: without sockets, hosts or files.

Knows the coordinator's answers. Does not know what a ring consists of (test_shard_ring).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from ema_client.errors import InvalidRequest, Overloaded
from ema_service.cluster import Answer, Change, RingKept, decode
from ema_service.cluster.hosting.rings import Rings
from ema_service.cluster.reasons import lacking, reason_of
from tests.waiting import wait_until


class Ring:
    """A ring that is to have snapshots until all hosts have them, but for those that are given up."""

    def __init__(self, *versions: str) -> None:
        self.versions = list(versions)
        self.given_up: list[tuple[str, ...]] = []
        self.is_unsettled = True

    def wanted(self) -> tuple[int, tuple[str, ...]] | None:
        return (1, tuple(self.versions)) if self.is_unsettled else None

    def give_up(self, versions: Sequence[str], _: str) -> None:
        self.given_up.append(tuple(versions))
        self.versions = [each for each in self.versions if each not in versions]


def asked(ring: Ring, answers: Sequence[Answer], *, asks: bool = True, until: Callable[[], bool]) -> list[RingKept]:
    """What the hosts are asked for until something is so, where they answer so, one after the other."""
    said: list[RingKept] = []
    left = list(answers)

    async def ask(talk: str, change: Change) -> Answer:
        assert talk == "r@1"
        said.append(decode(change.change, RingKept))
        answer = left.pop(0)
        if answer.committed:
            ring.is_unsettled = False
        return answer

    async def go() -> None:
        shard: Any = SimpleNamespace(ring=ring, talk="r@1")
        rings = Rings(lambda: {"r": shard}, lambda _: asks, ask)
        rings.start()
        rings.moved(ring)  # type: ignore[arg-type]
        try:
            await asyncio.to_thread(wait_until, until)
        finally:
            await rings.close()

    asyncio.run(go())
    return said


def test_what_a_host_lacks_is_given_up() -> None:
    """And all are asked again at once, for the rest; a host that is still writing is asked again later."""
    ring = Ring("1.1", "1.2", "1.3")
    writing = Answer("k", committed=False, reason=reason_of(Overloaded("still being written", retry_after=0.1)))
    superseded = Answer("k", committed=False)
    answers = [writing, superseded, Answer("k", committed=False, reason=lacking(["1.2"])), Answer("k", committed=True)]
    said = asked(ring, answers, until=lambda: not ring.is_unsettled)
    assert [each.versions for each in said] == ["1.1 1.2 1.3"] * 3 + ["1.1 1.3"]
    assert {each.epoch for each in said} == {1}
    assert ring.given_up == [("1.2",)]


def test_a_refusal_ends_a_try(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged; the next look asks anew."""
    ring = Ring("1.1")
    refused = Answer("k", committed=False, reason=reason_of(InvalidRequest("the run went back")))
    said = asked(ring, [refused, Answer("k", committed=True)], until=lambda: not ring.is_unsettled)
    assert len(said) == 2
    assert "the run went back" in caplog.text


def test_one_host_asks() -> None:
    """The first of those that count: any other leaves its ring as it is."""
    looked: list[int] = []

    def until() -> bool:
        looked.append(1)
        return len(looked) > 20

    assert asked(Ring("1.1"), [], asks=False, until=until) == []
