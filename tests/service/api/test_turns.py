"""One run starves no other: whoever waits for a run's lock takes none of the threads that others need.

Knows servers whose disk is slow, or hangs. Does not know their threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from ema_client import EmaClient
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

TENSORS = {"w": torch.ones(500_000)}
SNAPSHOTS = 16
#: A server whose disk takes half a second for a snapshot.
SLOW = """
import time
from ema_service.storage.store import Store
at_once = Store.save_snapshot
def slowly(*arguments):
    time.sleep(0.5)
    at_once(*arguments)
Store.save_snapshot = slowly
from ema_service.cli import main
main()
"""
#: A server whose disk hangs for checkpoints of the run ``stuck``, from the file ``gate`` on, which is then ``shut``.
HANGING = """
import os, pathlib, time
gate, at_once = pathlib.Path(__file__).with_name("gate"), os.fdatasync
def hanging(descriptor):
    while gate.exists() and "/runs/stuck." in os.readlink(f"/proc/self/fd/{descriptor}"):
        gate.write_text("shut")
        time.sleep(0.02)
    at_once(descriptor)
os.fdatasync = hanging
from ema_service.cli import main
main()
"""


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess]) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("slow")
    (folder / "slow.py").write_text(SLOW)
    running = server_class(folder, (), folder / "data", program=(str(folder / "slow.py"),)).start()
    yield running
    running.stop()


def test_snapshots_of_one_run_hold_up_no_other(
    slow: ServerProcess, plain_run: Callable[..., PlainRun], run_name: str
) -> None:
    """While many snapshots of one run wait for each other, others push, are steered, pull, and are created."""
    busy = plain_run(slow, TENSORS)
    other = plain_run(slow, TENSORS, name=f"{run_name}-other")
    with EmaClient(slow.uds) as client, ThreadPoolExecutor(SNAPSHOTS) as threads:
        state = client.shared_state(TENSORS)
        client.push(other.name, state, step=1)
        taken = [threads.submit(busy.http.put, f"{busy.path}/snapshots/s{n}") for n in range(SNAPSHOTS)]
        time.sleep(0.5)
        began = time.monotonic()
        client.push(other.name, state, step=2)
        assert "shared memory" in client.link
        assert other.http.patch(other.path, json={"decay": 0.5}).status_code == 200
        assert other.pull().status_code == 200
        plain_run(slow, TENSORS, name=f"{run_name}-third")
        # Nor is the busy run itself held up by what only its snapshots wait for.
        assert busy.http.post(f"{busy.path}/writers").status_code == 201
        assert sum(each.done() for each in taken) < SNAPSHOTS - 2, "there was nothing to wait for"
        assert time.monotonic() - began < SNAPSHOTS * 0.5 / 2
        assert {each.result().status_code for each in taken} == {201}


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """While this file is there, checkpoints of the run ``stuck`` hang."""
    yield tmp_path / "gate"
    (tmp_path / "gate").unlink(missing_ok=True)


@pytest.fixture
def hanging(tmp_path: Path, server_class: type[ServerProcess], gate: Path) -> Iterator[ServerProcess]:
    (tmp_path / "hanging.py").write_text(HANGING)
    often = "--checkpoint-interval", "0.1"
    running = server_class(tmp_path, often, tmp_path / "data", program=(str(tmp_path / "hanging.py"),)).start()
    yield running
    gate.unlink(missing_ok=True)
    running.stop()


def test_a_checkpoint_that_hangs_holds_up_no_other(
    hanging: ServerProcess, gate: Path, plain_run: Callable[..., PlainRun]
) -> None:
    """While averages wait to be added behind a run's checkpoint, others are created, changed, pushed to and deleted."""
    few = {"w": torch.ones(1000)}
    stuck = plain_run(hanging, few, name="stuck", durability="memory")
    gate.touch()
    stuck.push(1, few)
    wait_until(gate.read_text, "a checkpoint that hangs")
    with ThreadPoolExecutor(SNAPSHOTS) as threads:
        averages = [{"name": f"a{n}", "decay": 0.5} for n in range(10)]
        added = [threads.submit(stuck.http.post, f"{stuck.path}/averages", json=each) for each in averages]
        time.sleep(0.5)
        began = time.monotonic()
        free = plain_run(hanging, few, name="free")
        assert free.http.post(f"{free.path}/averages", json=averages[0]).status_code == 201
        assert free.push(1, few).status_code == 200
        assert free.http.put(f"{free.path}/snapshots/s").status_code == 201
        assert free.http.delete(free.path).status_code == 204
        # Nor is the run itself held up by what only its averages wait for.
        assert stuck.push(2, few).status_code == 200
        assert stuck.create(few, durability="memory").status_code == 200
        assert time.monotonic() - began < 15
        assert not any(each.done() for each in added), "there was nothing to wait for"
        gate.unlink()
        assert {each.result().status_code for each in added} == {201}
