"""Who asks that hosts have one ring, and what follows from the answers: without sockets, hosts or files.

Knows the coordinator's answers. Does not know what a ring consists of (test_shard_ring).
"""

from __future__ import annotations

import asyncio
import time
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
        self.ended = 0

    def wanted(self) -> tuple[int, tuple[str, ...]] | None:
        return (1, tuple(self.versions)) if self.is_unsettled else None

    def give_up(self, versions: Sequence[str], _: str) -> None:
        self.given_up.append(tuple(versions))
        self.versions = [each for each in self.versions if each not in versions]


def asked(ring: Ring, answers: Sequence[Answer], *, turn: int | None = 0, until: Callable[[], bool]) -> list[RingKept]:
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
        rings = Rings(lambda: {"r": shard}, lambda _: turn, ask)
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


def looks(count: int) -> Callable[[], bool]:
    """Whether it was asked so often."""
    looked: list[int] = []

    def until() -> bool:
        looked.append(1)
        return len(looked) > count

    return until


def test_one_host_asks() -> None:
    """The first of those that count: any other leaves its ring as it is."""
    assert asked(Ring("1.1"), [], turn=1, until=looks(20)) == []
    assert asked(Ring("1.1"), [], turn=None, until=looks(20)) == []


def test_the_next_host_asks_for_what_the_first_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once nothing has come of its ring for a while; not while something does, and not where it was left behind."""
    monkeypatch.setattr("ema_service.cluster.hosting.rings._LOOK_SECONDS", 0.01)
    monkeypatch.setattr("ema_service.cluster.hosting.rings._TURN_SECONDS", 0.05)
    ring = Ring("1.1", "1.2")
    answers = [Answer("k", committed=False, reason=lacking(["1.2"])), Answer("k", committed=True)]
    said = asked(ring, answers, turn=1, until=lambda: not ring.is_unsettled)
    assert [each.versions for each in said] == ["1.1 1.2", "1.1"]
    assert asked(Ring("1.1"), [], turn=None, until=looks(50)) == []
    monkeypatch.setattr(Ring, "ended", property(lambda _: time.monotonic(), lambda *_: None), raising=False)
    assert asked(Ring("1.1"), [], turn=1, until=looks(50)) == []


def test_what_moves_at_the_end_of_a_try_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: no look at all rings is waited for."""
    monkeypatch.setattr("ema_service.cluster.hosting.rings._LOOK_SECONDS", 600.0)
    tried: list[int] = []

    class Moving(Ring):
        """Moves once while it is found to want nothing."""

        tell: Callable[[], None]

        def wanted(self) -> tuple[int, tuple[str, ...]] | None:
            found = super().wanted()
            if found is None and not tried:
                tried.append(1)
                self.is_unsettled = True
                self.tell()
                time.sleep(0.1)  # the watcher looks meanwhile
            return found

    ring = Moving("1.1")

    async def go() -> None:
        async def ask(_: str, __: Change) -> Answer:
            ring.is_unsettled = False
            return Answer("k", committed=True)

        shard: Any = SimpleNamespace(ring=ring, talk="r@1")
        rings = Rings(lambda: {"r": shard}, lambda _: 0, ask)
        ring.tell = lambda: rings.moved(ring)  # type: ignore[arg-type]
        rings.start()
        ring.tell()
        try:
            await asyncio.to_thread(wait_until, lambda: tried and not ring.is_unsettled)
        finally:
            await rings.close()

    asyncio.run(go())
