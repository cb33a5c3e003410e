"""Lives with lanes over a network that cuts and stalls connections: every update once, every pull one version, whole.

Knows a real service behind a proxy that breaks connections at random. Does not know how a body is divided.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ema_client import EmaClient, RetryPolicy
from ema_client.http.connection import Timeouts
from ema_client.http.transport import Transport
from ema_client.pushing import Pushes
from ema_client.reading.asked import Asked
from ema_client.reading.pulls import Pulls
from ema_client.tensors.body import encode
from tests.relays import Breaking

LANES = 4
#: Of 40 MiB, of which no tensor ends where a stretch does.
SIZES = {"a": 1_000_003, "b": 7, "c": 9_500_000}
STEPS = 3


def state_of(step: int) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(step)
    return {name: torch.randn(size, generator=dice) for name, size in SIZES.items()}


@pytest.fixture
def way(server: Any, request: pytest.FixtureRequest) -> Iterator[Breaking]:
    with contextlib.closing(Breaking(server.url, random.Random(request.param), troubles=8)) as made:
        yield made


SOON, LATER = [1], range(2, 101)


@pytest.mark.parametrize("way", [*SOON, *(pytest.param(seed, marks=pytest.mark.soak) for seed in LATER)], indirect=True)
def test_a_life(server: Any, way: Breaking, run_name: str, tmp_path: Path) -> None:
    """Updates, pulls and a file by four lanes: the shadow is that of as many updates over one connection."""
    # A call gives up once it has waited, in pauses or in silence, for as long as its pauses would be at their longest.
    patient = RetryPolicy(attempts=50, base=0.01, cap=0.5)
    transport = Transport(way.url, retry=patient, lanes=LANES, timeouts=Timeouts(transfer=1.0, kept=1.0))
    with EmaClient(server.url, lanes=1) as plain, contextlib.closing(transport):
        for name in (run_name, f"{run_name}-plain"):
            plain.create_run(name, state_of(0), decay=0.75, use_num_updates=False)
        pushes, pulls = Pushes(transport, stretched_above=1 << 20), Pulls(transport, split_above=1 << 20)
        for step in range(1, STEPS + 1):
            pushes.push(run_name, step, encode(state_of(step)), {}, once=False)
            plain.push(f"{run_name}-plain", state_of(step), step=step)
            came, expected = pulls.pull(Asked(run_name)), plain.pull(f"{run_name}-plain")
            assert (came.info.version, came.info.num_updates) == (expected.info.version, expected.info.num_updates)
            assert all(torch.equal(came[name], tensor) for name, tensor in expected.items())
        with EmaClient(way.url, retry=patient, lanes=LANES) as client:
            client.download(run_name, tmp_path / "w.safetensors")
        saved = load_file(tmp_path / "w.safetensors")
        assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
        # A hundred lives' runs are more than the memory of a small machine.
        for name in (run_name, f"{run_name}-plain"):
            plain.delete_run(name)
