"""Waiting for what another thread or process does. Knows the clock, and what tells that a ring is stored, or that a
service measures."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ema_client import EmaClient

__all__ = ["measures", "settled", "wait_until"]

#: Longer than anything takes on a machine that runs three tests at once, and shorter than the time of a test.
_SECONDS = 60.0


def wait_until(true: Callable[[], object], what: str = "what the test waits for", seconds: float = _SECONDS) -> None:
    """Return once ``true()`` is; fail with ``what`` where it is not within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.01)


def measures(client: EmaClient) -> None:
    """Return once the service measures distances: the loops for that are compiled beside its first updates."""
    run, state, steps = f"measured-{uuid.uuid4().hex[:8]}", {"w": torch.ones(2)}, itertools.count(1)
    client.create_run(run, state)

    def measured() -> bool:
        client.push(run, state, step=next(steps))
        return client.distances(run).version is not None

    wait_until(measured, "the service to measure", 2 * _SECONDS)
    client.delete_run(run)


def settled(client: EmaClient, run: str, but_for: int = 0) -> None:
    """Return once the ring of a run holds what is due: updates without pauses come faster than a disk syncs.

    but_for: how many snapshots of the ring may still wait, or be under way.
    """

    def stored() -> bool:
        ring = client.run(run).ring
        return ring is not None and ring.waiting <= but_for

    wait_until(stored, f"the ring of run {run!r}")
