"""One run starves no other: whoever waits for a run's lock takes none of the threads that others need.

Knows a server whose disk is slow. Does not know its threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch

from ema_client import EmaClient

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
