"""When a gateway asks hosts again for an average that they work out; hosts that answer by hand."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import Counter

from ema_client.errors import EmaError, Overloaded, Superseded, VersionGone
from ema_service.cluster.gateway.hosts import Hosts
from ema_service.cluster.gateway.worked_out import agreed


@pytest.fixture
def hosts() -> Hosts:
    counters = {name: Counter(f"ema_{name}", name, registry=None) for name in ("apart", "disagreed")}
    return cast("Hosts", SimpleNamespace(metrics=SimpleNamespace(**counters)))


@pytest.mark.parametrize("kind", [Superseded, VersionGone])
def test_hosts_that_go_on_meanwhile(hosts: Hosts, kind: type[EmaError]) -> None:
    """A host that has another ring, or version, by now is asked anew; where that goes on the reader is told to wait."""
    answers: list[Any] = [kind("version 1.2 is not here, or no more"), "weights"]

    async def ask() -> str:
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(found, EmaError):
            raise found
        return str(found)

    assert asyncio.run(agreed(hosts, ask)) == "weights"
    answers[:] = [kind("version 1.3 is not here, or no more")]
    with pytest.raises(Overloaded, match=r"1\.3"):
        asyncio.run(agreed(hosts, ask))
