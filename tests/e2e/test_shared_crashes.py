"""Shared memory and the deaths of either side: no memory stays, no run is harmed.

Trainers are processes of their own, killed by SIGKILL. Knows what must be left. Does not know how memory is shared.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_client import EmaClient, RetryPolicy
from ema_client.errors import TransportError
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memfd_create on this system")

ELEMENTS = 12_000_000
PATIENCE = 60.0

#: Pushes states of all 1.0, all 2.0 and so on, from shared memory, until it is killed; says so before each.
TRAINER = f"""
import sys, torch
from ema_client import EmaClient
client = EmaClient(sys.argv[1])
shared = client.shared_state({{"w": torch.zeros({ELEMENTS})}})
client.create_run(sys.argv[2], shared, decay=0.0, use_num_updates=False)
for step in range(1, 1_000_000):
    shared["w"].fill_(float(step))
    print(step, flush=True)
    client.push(sys.argv[2], shared, step=step)
    assert client.link == "shared memory"
"""


def start_trainer(url: str, run: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", TRAINER, url, run], stdout=subprocess.PIPE, text=True)


def held_by(pid: int) -> list[str]:
    """Segments that a process has mapped or open."""
    found = [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "memfd:ema-push" in line]
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found += [str(link)] if "memfd:ema-push" in str(link.readlink()) else []
    return found


@pytest.mark.parametrize(
    "delay", [pytest.param(0.0, marks=pytest.mark.soak), 0.01, pytest.param(0.03, marks=pytest.mark.soak)]
)
def test_trainer_is_killed(server: Any, run_name: str, delay: float) -> None:
    """A trainer killed in the middle of a hand-over: its update is applied whole or not at all, and its memory is gone
    once the server has let go of it, which it does by itself."""
    with start_trainer(server.url, run_name) as trainer:
        assert trainer.stdout
        for _ in range(3):
            step = int(trainer.stdout.readline())
        time.sleep(delay)  # somewhere in the hand-over; each of these moments must do
        trainer.kill()
        trainer.wait(PATIENCE)
        step = max([step, *map(int, trainer.stdout.read().split())])

    wait_until(lambda: not held_by(server.process.pid), "the server to let go of a dead trainer's memory")
    with EmaClient(server.url) as client:
        weights = client.pull(run_name)
        value = float(weights["w"][0])
        assert torch.equal(weights["w"], torch.full((ELEMENTS,), value))
        assert value == weights.info.step
        assert value in (step - 1, step)
        after = client.shared_state({"w": torch.full((ELEMENTS,), 7.0)})
        assert client.push(run_name, after, step=step + 1).applied
        assert client.link == "shared memory"
        client.delete_run(run_name)


def push_on(client: EmaClient, shared: Mapping[str, Tensor]) -> None:
    for step in itertools.count(1):
        shared["w"].fill_(float(step))
        client.push("run", shared, step=step)


def test_server_is_killed(start_server: Callable[..., Any]) -> None:
    """A server killed in the middle of a hand-over: the trainer is told, keeps its memory, and goes on with the next
    server; what it was told is applied is there."""
    server = start_server(memory=True)
    state = {"w": torch.zeros(ELEMENTS)}
    with EmaClient(server.url, retry=RetryPolicy(attempts=1)) as client:
        shared = client.shared_state(state)
        client.create_run("run", shared, decay=0.0, use_num_updates=False)
        killer = subprocess.Popen(
            [sys.executable, "-c", f"import os, time; time.sleep(0.5); os.kill({server.process.pid}, 9)"]
        )
        with pytest.raises(TransportError):
            push_on(client, shared)
        assert killer.wait(PATIENCE) == 0
    server.process.wait(PATIENCE)
    step = int(shared["w"].min())
    assert step == int(shared["w"].max()) > 0

    successor = start_server(memory=True)
    with EmaClient(successor.url) as client:
        client.create_run("run", shared, decay=0.0, use_num_updates=False)
        assert client.push("run", shared, step=step).applied
        assert client.link == "shared memory"
        assert float(client.pull("run")["w"][0]) == step


@pytest.mark.parametrize("durability", ["process", "disk"])
def test_what_was_acknowledged_survives(start_server: Callable[..., Any], durability: str) -> None:
    """A version made from shared memory is on disk before the answer, as any other: it comes back after kill -9."""
    server = start_server()
    random = torch.Generator().manual_seed(1)
    state = {"w": torch.randn(5_000_003, generator=random), "b": torch.randn(700_001).bfloat16()}
    with EmaClient(server.url) as client:
        shared = client.shared_state(state)
        client.create_run("run", shared, decay=0.5, durability=durability)
        for step in range(1, 4):
            shared["w"].mul_(1.25)
            assert client.push("run", shared, step=step).durable_step == step
        assert client.link == "shared memory"
        before = client.pull("run")
    server.kill()
    server.start()
    with EmaClient(server.url) as client:
        after = client.pull("run")
        assert after.info.step == 3
        assert all(torch.equal(after[name], before[name]) for name in state)
        assert client.push("run", state | {"w": shared["w"]}, step=3).applied is False
