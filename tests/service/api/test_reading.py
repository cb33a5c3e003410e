"""Versions that are being read: found by others of the same run, let go of at the right time. No sockets."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from ema_service.api import reading
from ema_service.api.reading import Reading, Readings


def made(etag: str) -> Any:
    return Reading(SimpleNamespace(etag=etag, length=100), object())  # type: ignore[arg-type]


def test_while_it_is_read_and_a_moment_after(monkeypatch: Any) -> None:
    """By its owner and ETag; the data is let go of once for each reading, of a stretch a moment later."""
    monkeypatch.setattr(reading, "LINGER_SECONDS", 0.05)
    released: list[str] = []

    async def live() -> None:
        readings, version = Readings(), made("1")
        ends = [readings.begin("run", version, lambda: released.append("x"), (0, 40)) for _ in range(2)]
        assert readings.find("run", "1") is version
        assert (readings.find("other", "1"), readings.find("run", "2"), readings.find("run", None)) == (None,) * 3
        ends[0]()
        await asyncio.sleep(0.1)
        assert (len(released), readings.find("run", "1")) == (1, version)
        ends[1]()
        assert (len(released), readings.find("run", "1")) == (1, version)
        await asyncio.sleep(0.1)
        assert (len(released), readings.find("run", "1")) == (2, None)

        readings.begin("run", version, lambda: released.append("whole"), None)()
        assert (len(released), readings.find("run", "1")) == (3, None)

    asyncio.run(live())


def test_no_longer_than_until_all_was_asked_for() -> None:
    """The last stretch that somebody could ask for lets go of all: of two readers, the last stretch of both."""
    released: list[str] = []

    async def live() -> None:
        readings, version = Readings(), made("1")

        def begin(start: int, stop: int) -> Any:
            return readings.begin("run", version, lambda: released.append(f"{start}-{stop}"), (start, stop))

        begin(0, 40)()
        assert not released
        second, third = begin(40, 70), begin(70, 100)
        third()
        assert (released, readings.find("run", "1")) == (["0-40", "70-100"], version)
        second()
        assert (released[2:], readings.find("run", "1")) == (["40-70"], None)

        released.clear()
        one, other = begin(0, 60), begin(0, 60)
        begin(60, 100)()
        one(), other()
        assert (released, readings.find("run", "1")) == ([], version)
        begin(60, 100)()
        assert (len(released), readings.find("run", "1")) == (4, None)

    asyncio.run(live())


def test_room_for_others() -> None:
    """What nobody is being sent any more goes at once; what somebody is being sent stays."""
    released: list[str] = []

    async def live() -> None:
        readings = Readings()
        readings.begin("run", made("at work"), lambda: released.append("at work"), (0, 40))
        readings.begin("run", made("ended"), lambda: released.append("ended"), (0, 40))()
        readings.let_go()
        assert (released, readings.find("run", "ended")) == (["ended"], None)
        assert readings.find("run", "at work") is not None

    asyncio.run(live())
