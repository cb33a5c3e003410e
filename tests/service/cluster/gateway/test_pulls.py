"""What becomes of a reader that takes nothing, in this process.

Knows ASGI. Does not know hosts (test_gateway).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from ema_service.cluster.gateway import pulls


def test_a_reader_that_takes_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it was to be sent is closed: hosts keep its version until then."""
    monkeypatch.setattr(pulls, "SILENCE", 0.1)
    closed: list[bool] = []

    async def chunks() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"x"
        finally:
            closed.append(True)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(3600)

    async def run() -> None:
        answer = pulls.Streaming(chunks(), status_code=200, headers={})
        scope = {"type": "http", "path": "/", "asgi": {"spec_version": "2.4"}}
        await asyncio.wait_for(answer(scope, asyncio.Event().wait, send), 5)  # type: ignore[arg-type]

    asyncio.run(run())
    assert closed == [True]
