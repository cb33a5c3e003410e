"""A soup of a run on several hosts: each of them sums its rows of the same snapshots.

Knows what is asked of the hosts, which are none here. Does not know how a body is put together.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Request
from fastapi.responses import Response

from ema_client.protocol import SnapshotInfo, SnapshotList
from ema_service.cluster.counting import GatewayMetrics
from ema_service.cluster.gateway.asking import Asking
from ema_service.cluster.gateway.routes import weights
from ema_service.cluster.gateway.routes.weights import WeightsRoutes


def test_a_snapshot_that_was_replaced_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts may have opened different ones of its name, of one version even: all are asked again. Another snapshot
    that comes and goes is nobody's affair."""
    given: list[Response] = []
    told = iter([(1.0, 5.0), (2.0, 5.0), (2.0, 6.0), (2.0, 7.0)])

    async def send(*_: Any) -> Response:
        given.append(Response())
        return given[-1]

    async def each(*_: Any) -> list[SnapshotList]:
        a, other = next(told)
        made = [SnapshotInfo("r", name, "1.1", 1, 1, ("ema",), 9, at) for name, at in [("a", a), ("other", other)]]
        return [SnapshotList(tuple(made))] * 2

    asking = Asking(SimpleNamespace(metrics=GatewayMetrics()))  # type: ignore[arg-type]
    monkeypatch.setattr(asking, "each", each)
    monkeypatch.setattr(weights, "send_weights", send)
    request = Request({"type": "http", "query_string": b"soup=a:1", "headers": []})
    answer = asyncio.run(WeightsRoutes(asking, None).weights("r", request))  # type: ignore[arg-type]
    assert len(given) == 2
    assert answer is given[1]
