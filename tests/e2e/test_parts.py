"""What comes between the parts of an update costs nothing, or is told to the ranks: SIGKILL, a stop, a disk that fails.

Knows ranks as senders in this process, and the real server. Does not know how a model is sharded (test_sharded.py), or
how parts are put together (tests/service/runs/test_parts.py).
"""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import httpx
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from ema_client import EmaClient
from ema_client.errors import StaleStep
from ema_client.tensors.body import encode
from ema_client.training import sender
from ema_client.training.plan import ShardedPlan
from ema_client.training.publisher import Publisher
from ema_client.training.rounds import SendPolicy
from ema_client.training.tally import Stats
from ema_client.training.updates import Update
from ema_client.wire import Box

if TYPE_CHECKING:
    from tests.conftest import ServerProcess

PATIENCE = 60.0
ROWS = [(0, 3), (3, 8)]


def whole(step: int) -> dict[str, Tensor]:
    return {"w": torch.randn(8, 5, generator=torch.Generator().manual_seed(step))}


def part(step: int, number: int) -> tuple[dict[str, Tensor], dict[str, tuple[Box, ...]]]:
    rows = ROWS[number]
    return {"w": whole(step)["w"][slice(*rows)].clone()}, {"w": ((rows, (0, 5)),)}


class Rank:
    """One rank's sender, as RemoteEma has it."""

    def __init__(self, server: ServerProcess, run: str, number: int) -> None:
        self.client = EmaClient(server.uds)
        self._number = number
        plan = ShardedPlan((), number, 2, "one start")
        push, fate = partial(plan.push, self.client, run, None), partial(plan.fate, self.client, run)
        self.publisher = Publisher(push, SendPolicy(self.client.retry), name=f"rank {number}", fate=fate)

    def push(self, step: int) -> None:
        assert self.publisher.room(wait=True)
        self.publisher.submit(Update(step, encode(*part(step, self._number)), lambda: None, lambda: None))

    def close(self) -> None:
        self.publisher.close()
        self.client.close()


@pytest.fixture
def server(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    return start_server("--body-timeout", "20")


@pytest.fixture
def ranks(server: ServerProcess, run_name: str) -> Iterator[list[Rank]]:
    made = [Rank(server, run_name, number) for number in range(2)]
    yield made
    for rank in made:
        rank.close()


def wait_for_parts(client: EmaClient, run: str, step: int, parts: tuple[int, ...]) -> None:
    deadline = time.monotonic() + PATIENCE
    while client.update_status(run, step).parts != parts:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_as_whole(client: EmaClient, run: str, steps: list[int]) -> None:
    """The run is bit for bit what the same updates, pushed whole, make."""
    client.create_run(f"{run}-whole", whole(0))
    for step in steps:
        client.push(f"{run}-whole", whole(step), step=step)
    assert torch.equal(client.pull(run)["w"], client.pull(f"{run}-whole")["w"])
    assert client.run(run).num_updates == len(steps)


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_server_ends_between_two_parts(end: str, server: ServerProcess, ranks: list[Rank], run_name: str) -> None:
    """The rank whose part was answered sends it again to the next server, and the update is applied once, whole."""
    first, second = ranks
    first.client.create_run(run_name, whole(0))
    for step in (1, 2):
        first.push(step)
    wait_for_parts(second.client, run_name, 1, (0,))
    server.kill() if end == "kill" else server.stop()
    server.start()
    for step in (1, 2):
        second.push(step)
    for rank in ranks:
        rank.publisher.flush(PATIENCE)

    assert_as_whole(first.client, run_name, [1, 2])
    assert [rank.publisher.stats.sent for rank in ranks] == [2, 2]


def test_update_that_nobody_completes_is_told(ranks: list[Rank], run_name: str) -> None:
    """A part of a step that the run went past is a failure of the rank that sent it, although it was answered."""
    first, second = ranks
    first.client.create_run(run_name, whole(0))
    second.push(1)
    wait_for_parts(first.client, run_name, 1, (1,))
    for rank in ranks:
        rank.push(2)
    first.publisher.flush(PATIENCE)
    with pytest.raises(StaleStep):
        second.publisher.flush(PATIENCE)

    assert_as_whole(first.client, run_name, [2])
    assert (second.publisher.stats.sent, second.publisher.stats.failed) == (1, 1)


def test_update_that_one_rank_skipped_is_skipped(
    server: ServerProcess, ranks: list[Rank], run_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server was away, and a rank left an update out that the other sent: that one counts it as skipped too, and
    goes on."""
    monkeypatch.setattr(sender, "_AWAY_SECONDS", 0.2)
    first, second = ranks
    first.client.create_run(run_name, whole(0))
    server.process.send_signal(signal.SIGSTOP)
    for rank in ranks:
        rank.push(1)
    time.sleep(0.5)
    server.process.send_signal(signal.SIGCONT)
    second.push(2)
    wait_for_parts(first.client, run_name, 2, (1,))
    for rank in ranks:
        rank.push(3)
    for rank in ranks:
        rank.publisher.flush(PATIENCE)

    assert_as_whole(first.client, run_name, [1, 3])
    assert [rank.publisher.stats for rank in ranks] == [Stats(sent=2), Stats(sent=2, skipped=1)]


@pytest.mark.parametrize("durability", ["process", "disk"])
def test_last_part_that_cannot_be_written(durability: str, server: ServerProcess, run_name: str) -> None:
    """What was gathered stays, of the initial weights and of an update: the last part alone is sent again."""
    path = f"/v1/runs/{run_name}"
    assert server.data_dir is not None
    with server.http() as http:
        layout = [{"name": "w", "shape": [8, 5], "dtype": "F32"}]
        http.post("/v1/runs", json={"run": run_name, "layout": layout, "durability": durability}).raise_for_status()
        for step, where in ((0, f"{path}/weights"), (1, f"{path}/updates/1")):
            bodies = [_raw(step, number) for number in range(2)]
            send = partial(_send, http, where)
            assert send(0, bodies[0]).status_code == 202
            with _locked(server):
                refused = send(1, bodies[1])
                assert (refused.status_code, refused.json()["code"]) == (503, "storage_failed")
                refused = send(0, bodies[0])
                assert refused.status_code == 503
            assert send(1, bodies[1]).status_code == 200
    with EmaClient(server.url) as client:
        assert_as_whole(client, run_name, [1])


def _raw(step: int, number: int) -> bytes:
    tensors, slices = part(step, number)
    return save(tensors, {"ema.slices": json.dumps(slices)})


def _send(http: httpx.Client, where: str, number: int, body: bytes) -> httpx.Response:
    return http.put(f"{where}/parts/{number}", params={"of": 2, "group": "g"}, content=body)


class _locked:
    """The server's catalog, locked by another process for a while."""

    def __init__(self, server: ServerProcess) -> None:
        assert server.data_dir is not None
        self._other = sqlite3.connect(server.data_dir / "catalog.db", isolation_level=None)

    def __enter__(self) -> None:
        self._other.execute("BEGIN IMMEDIATE")

    def __exit__(self, *_: object) -> None:
        self._other.execute("ROLLBACK")
        self._other.close()
