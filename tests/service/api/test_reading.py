"""Versions that are being read: found by others of the same run, let go of at the right time. No sockets."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from ema_service.api import reading
from ema_service.api.reading import Reading, Readings


def made(etag: str) -> Any:
    return Reading(SimpleNamespace(etag=etag), object())  # type: ignore[arg-type]


def test_while_it_is_read_and_a_moment_after(monkeypatch: Any) -> None:
    """By its owner and ETag; the data is let go of once for each reading, of a stretch a moment later."""
    monkeypatch.setattr(reading, "LINGER_SECONDS", 0.05)
    released: list[str] = []

    async def live() -> None:
        readings, version = Readings(), made("1")
        ends = [readings.begin("run", version, lambda: released.append("x"), stretch=True) for _ in range(2)]
        assert readings.find("run", "1") is version
        assert (readings.find("other", "1"), readings.find("run", "2"), readings.find("run", None)) == (None,) * 3
        ends[0]()
        await asyncio.sleep(0.1)
        assert (len(released), readings.find("run", "1")) == (1, version)
        ends[1]()
        assert (len(released), readings.find("run", "1")) == (1, version)
        await asyncio.sleep(0.1)
        assert (len(released), readings.find("run", "1")) == (2, None)

        readings.begin("run", version, lambda: released.append("whole"), stretch=False)()
        assert (len(released), readings.find("run", "1")) == (3, None)

    asyncio.run(live())


def test_room_for_others() -> None:
    """What nobody is being sent any more goes at once; what somebody is being sent stays."""
    released: list[str] = []

    async def live() -> None:
        readings = Readings()
        readings.begin("run", made("at work"), lambda: released.append("at work"), stretch=True)
        readings.begin("run", made("ended"), lambda: released.append("ended"), stretch=True)()
        readings.let_go()
        assert (released, readings.find("run", "ended")) == (["ended"], None)
        assert readings.find("run", "at work") is not None

    asyncio.run(live())
