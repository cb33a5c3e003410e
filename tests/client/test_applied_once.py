"""Calls whose answer is lost while others go on: each write is applied once, and undoes nothing that came after it.

Knows the real service, and a relay that loses the answer to a first try. Does not know how a write is recognised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ema_client import EmaClient
from ema_client.errors import SnapshotNotFound
from ema_client.schedules import power

STATE = {"w": torch.zeros(8)}
Meanwhile = Callable[[], object]


@pytest.fixture
def run(client: EmaClient, run_name: str) -> str:
    """A run after five updates."""
    client.create_run(run_name, STATE, decay=0.9)
    for _ in range(5):
        client.push(run_name, STATE)
    return run_name


@pytest.fixture
def losing(relay: Callable[..., Any]) -> Iterator[Callable[..., EmaClient]]:
    """Make a client that loses the answer to its first call with a method; ``meanwhile`` is done before the second."""
    made: list[EmaClient] = []

    def make(method: str, meanwhile: Meanwhile) -> EmaClient:
        lost: list[str] = []

        def loses(request: Any) -> bool:
            if request.method != method or lost:
                return False
            lost.append(request.target)
            meanwhile()
            return True

        made.append(EmaClient(relay(loses).url))
        return made[-1]

    yield make
    for client in made:
        client.close()


def push_three(client: EmaClient, run: str) -> Meanwhile:
    return lambda: [client.push(run, STATE) for _ in range(3)]


def test_reset(client: EmaClient, run: str, losing: Callable[..., EmaClient]) -> None:
    """Updates after a reset keep their count."""
    far = losing("POST", push_three(client, run))

    assert far.reset_num_updates(run).num_updates == 3
    assert client.run(run).num_updates == 3


def test_decay(client: EmaClient, run: str, losing: Callable[..., EmaClient]) -> None:
    """A decay that someone set after it stays."""
    far = losing("PATCH", lambda: client.set_decay(run, 0.7))

    assert far.set_decay(run, 0.5).decay == pytest.approx(0.7)
    assert client.run(run).decay == pytest.approx(0.7)


def test_add_average(client: EmaClient, run: str, losing: Callable[..., EmaClient]) -> None:
    """An average that someone removed after it stays away."""
    far = losing("POST", lambda: client.remove_average(run, "long"))

    assert [each.name for each in far.add_average(run, "long", power(0.1)).averages] == ["ema"]
    assert len(client.run(run).averages) == 1


def test_remove_average(client: EmaClient, run: str, losing: Callable[..., EmaClient]) -> None:
    """An average of the name that someone added after it stays."""
    client.add_average(run, "long", power(0.1))
    far = losing("DELETE", lambda: client.add_average(run, "long", power(0.2)))

    far.remove_average(run, "long")
    assert client.run(run).averages[1].sigma_rel == pytest.approx(0.2)


def test_snapshot(client: EmaClient, run: str, losing: Callable[..., EmaClient]) -> None:
    """The answer is the snapshot that the first try took, not that its name is taken."""
    version = client.run(run).version
    far = losing("PUT", push_three(client, run))

    assert far.snapshot(run, "best").version == version
    assert client.run(run).version != version


def test_rewind(client: EmaClient, run: str, losing: Callable[..., EmaClient]) -> None:
    """Updates after a rewind are not undone."""
    client.snapshot(run, "good")
    push_three(client, run)()
    far = losing("POST", push_three(client, run))

    assert far.rewind(run, "good").version == "2.3"
    assert client.run(run).version == "2.3"


def test_rewind_to_a_snapshot_that_is_gone_by_then(
    client: EmaClient, run: str, losing: Callable[..., EmaClient]
) -> None:
    """What was done needs nothing any more of what it was done with."""
    client.snapshot(run, "good")
    far = losing("POST", lambda: client.delete_snapshot(run, "good"))

    assert far.rewind(run, "good").version == "2.0"


def test_attach(client: EmaClient, run: str, losing: Callable[..., EmaClient]) -> None:
    """A trainer that attached after it is not fenced off."""
    numbers: list[int] = []
    far = losing("POST", lambda: numbers.append(client.attach(run)))

    assert far.attach(run) == numbers[0] - 1
    assert client.push(run, STATE, writer=numbers[0]).applied


def test_delete_snapshot(client: EmaClient, run: str, losing: Callable[..., EmaClient]) -> None:
    """Another snapshot of that name, taken since, stays."""
    client.snapshot(run, "best")
    far = losing("DELETE", lambda: client.snapshot(run, "best"))
    far.delete_snapshot(run, "best")

    assert [each.name for each in client.snapshots(run)] == ["best"]
    client.delete_snapshot(run, "best")
    with pytest.raises(SnapshotNotFound):
        client.delete_snapshot(run, "best")


def test_delete_run(client: EmaClient, run: str, losing: Callable[..., EmaClient]) -> None:
    """Another run of that name, made since, stays."""
    far = losing("DELETE", lambda: client.create_run(run, STATE))
    far.delete_run(run)

    assert client.run(run).num_updates == 0
