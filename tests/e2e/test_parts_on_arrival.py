"""Parts of several blocks over a real server, averaged as they come: what whole pushes make, bit for bit.

Knows the wire, ranks as senders in this process, and how a server ends. Does not know the server's code; what may come
between two parts is in tests/service/runs/test_gathering.py.
"""

from __future__ import annotations

import json
import random
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from ema_client import EmaClient
from ema_client.protocol import DIGEST_FOLLOWS, HEADER_DIGEST, TensorSpec
from ema_client.training.buffers import UpdateBuffers
from ema_client.training.plan import ShardedPlan
from ema_client.training.publisher import Publisher
from ema_client.training.rounds import SendPolicy
from ema_client.wire import Box
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import ServerProcess

PATIENCE = 60.0
#: Two rows make a block of the digest, or four of bf16, and ranks' rows begin in the middle of one.
COLUMNS, ROWS = 1 << 20, [(0, 3), (3, 7), (7, 9)]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def whole(step: int, dtype: str = "float32") -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(step)
    return {"w": torch.randn(ROWS[-1][1], COLUMNS, generator=source).to(DTYPES[dtype])}


def part(step: int, number: int, dtype: str = "float32") -> tuple[dict[str, Tensor], dict[str, tuple[Box, ...]]]:
    rows = ROWS[number]
    return {"w": whole(step, dtype)["w"][slice(*rows)].clone()}, {"w": ((rows, (0, COLUMNS)),)}


def raw(step: int, number: int, dtype: str = "float32") -> bytes:
    tensors, slices = part(step, number, dtype)
    return save(tensors, {"ema.slices": json.dumps(slices)})


class Sender:
    """Sends parts of one run's updates, each over a connection of its own."""

    def __init__(self, server: ServerProcess, run: str, dtype: str = "float32", **config: Any) -> None:
        self.server, self.run, self.dtype = server, run, dtype
        with EmaClient(server.url) as client:
            client.create_run(run, whole(0, dtype), **config)

    def path(self, step: int) -> str:
        return f"/v1/runs/{self.run}/updates/{step}"

    def send(self, step: int, number: int, body: bytes | Iterator[bytes] | None = None, **head: str) -> httpx.Response:
        content = raw(step, number, self.dtype) if body is None else body
        with httpx.Client(base_url=self.server.url, timeout=PATIENCE) as http:
            query = {"of": len(ROWS), "group": "g"}
            return http.put(f"{self.path(step)}/parts/{number}", params=query, content=content, headers=head)

    def begin(self, step: int, number: int, share: bytes, group: str = "g") -> socket.socket:
        """A connection that has sent the head of a part, and a share of its bytes."""
        length, address = len(raw(step, number, self.dtype)), urlsplit(self.server.url)
        connection = socket.create_connection((address.hostname, address.port), timeout=PATIENCE)
        target = f"{self.path(step)}/parts/{number}?of={len(ROWS)}&group={group}"
        head = f"PUT {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode() + share)
        return connection

    def break_off(self, step: int, number: int, share: float) -> None:
        body = raw(step, number, self.dtype)
        self.begin(step, number, body[: int(len(body) * share)]).close()

    def staged(self, step: int) -> tuple[str, list[int]]:
        with self.server.http() as http:
            said = http.get(self.path(step)).json()
        return said["state"], said["parts"]


def assert_as_whole(server: ServerProcess, run: str, steps: list[int], dtype: str = "float32", **config: Any) -> None:
    """The run is bit for bit what the same updates, pushed whole, make."""
    with EmaClient(server.url) as client:
        client.create_run(f"{run}-whole", whole(0, dtype), **config)
        for step in steps:
            client.push(f"{run}-whole", whole(step, dtype), step=step)
        assert torch.equal(client.pull(run)["w"], client.pull(f"{run}-whole")["w"])
        assert client.run(run).num_updates == len(steps)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess]) -> Iterator[ServerProcess]:
    """One for all tests; those that end it start it again."""
    folder = tmp_path_factory.mktemp("arrival")
    running = server_class(folder, ("--body-timeout", "20"), folder / "data").start()
    yield running
    running.kill()


@pytest.mark.parametrize("durability", ["process", pytest.param("disk", marks=pytest.mark.soak)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_raced_parts(dtype: str, durability: str, server: ServerProcess, run_name: str) -> None:
    """Parts raced, some broken off before and sent twice, make each step once; and so it is found after a kill."""
    sender, shuffle = Sender(server, run_name, dtype, durability=durability), random.Random(1)
    with ThreadPoolExecutor(4) as threads:
        for step in range(1, 4):
            sender.break_off(step, step % 3, 0.8)
            numbers = [*range(3), step % 3]
            shuffle.shuffle(numbers)
            codes = [answer.status_code for answer in threads.map(partial(sender.send, step), numbers)]
            assert set(codes) <= {200, 202, 503}, codes
            while sender.staged(step)[0] != "applied":
                for number in {*range(3)} - {*sender.staged(step)[1]}:
                    sender.send(step, number)
    server.kill()
    server.start()

    assert_as_whole(server, run_name, [1, 2, 3], dtype)


def at_once(sender: Sender, number: int) -> None:
    assert sender.send(1, number).status_code == 202


def in_chunks(sender: Sender, number: int) -> None:
    body = raw(1, number)
    chunks = (body[start : start + (1 << 20)] for start in range(0, len(body), 1 << 20))
    assert sender.send(1, number, chunks).status_code == 202


def in_shared_memory(sender: Sender, number: int) -> None:
    tensors, slices = part(1, number)
    specs = (TensorSpec("w", tensors["w"].shape, "F32"),)
    buffers = UpdateBuffers(specs, pinned=False, slices=slices, shared=lambda: True)
    with EmaClient(sender.server.uds) as client:
        body = buffers.copied(1, [tensors["w"]], hooked=False).body
        assert not client.push_part_once(sender.run, body, step=1, part=number, of=len(ROWS), group="g")
        assert client.link == "shared memory"


@pytest.mark.parametrize("send", [at_once, in_chunks, in_shared_memory])
def test_run_that_changes_meanwhile(send: Callable[[Sender, int], None], server: ServerProcess, run_name: str) -> None:
    """A part that was averaged as it came is not there any more once the run has changed, and comes again."""
    sender = Sender(server, run_name)
    send(sender, 0)
    assert sender.staged(1) == ("staged", [0])
    with EmaClient(server.url) as client:
        client.set_decay(run_name, 0.25)
    assert sender.staged(1) == ("unknown", [])
    for number in (1, 0):
        send(sender, number)

    assert sender.send(1, 2).json()["applied"]
    assert_as_whole(server, run_name, [1], decay=0.25)


def test_run_that_changes_while_a_part_comes(server: ServerProcess, run_name: str) -> None:
    """A block is averaged while the rest of its part is on the way: the part is told that the run has changed since."""
    sender, body = Sender(server, run_name), raw(1, 0)
    for pause in (0.1, 0.5, 2.0, 8.0):
        with EmaClient(server.url) as client, sender.begin(1, 0, body[: 10 << 20], group=f"after-{pause}") as coming:
            time.sleep(pause)
            client.set_decay(run_name, pause / 10)
            coming.sendall(body[10 << 20 :])
            answer = b"".join(iter(partial(coming.recv, 1 << 16), b""))
        if answer.startswith(b"HTTP/1.1 503") and b"superseded" in answer:
            break
        assert answer.startswith(b"HTTP/1.1 202"), answer
    else:
        pytest.fail("nothing was averaged while the part came")


def test_a_flipped_bit(server: ServerProcess, run_name: str) -> None:
    """A damaged part is refused, though its blocks were averaged; the others stay, and it comes again, right."""
    sender = Sender(server, run_name)
    assert sender.send(1, 0).status_code == 202
    data = part(1, 1)[0]["w"].numpy().tobytes()
    digest = xxhash.xxh3_128(xxhash.xxh3_128(data).digest()).digest()
    bad = bytearray(raw(1, 1))
    bad[len(bad) // 2] ^= 1
    refused = sender.send(1, 1, bytes(bad) + digest, **{HEADER_DIGEST: DIGEST_FOLLOWS})
    assert (refused.status_code, refused.json()["code"]) == (422, "digest_mismatch")
    assert sender.staged(1) == ("staged", [0])
    assert sender.send(1, 1, raw(1, 1) + digest, **{HEADER_DIGEST: DIGEST_FOLLOWS}).status_code == 202
    assert sender.send(1, 2).json()["applied"]

    assert_as_whole(server, run_name, [1])


@pytest.mark.parametrize("durability", ["process", "disk"])
def test_last_part_that_cannot_be_written(durability: str, server: ServerProcess, run_name: str) -> None:
    """What was averaged of the others stays, and the last part alone is sent again."""
    sender = Sender(server, run_name, durability=durability)
    for number in (0, 1):
        assert sender.send(1, number).status_code == 202
    with _locked(server):
        refused = sender.send(1, 2)
        assert (refused.status_code, refused.json()["code"]) == (503, "storage_failed")
    assert sender.staged(1) == ("staged", [0, 1, 2])
    assert sender.send(1, 2).json()["applied"]

    assert_as_whole(server, run_name, [1])


@contextmanager
def _locked(server: ServerProcess) -> Iterator[None]:
    """The server's catalog, locked by another process for a while."""
    assert server.data_dir is not None
    other = sqlite3.connect(server.data_dir / "catalog.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield
    other.execute("ROLLBACK")
    other.close()


# --- ranks ----------------------------------------------------------------------------------------------------------


class Rank:
    """One rank's sender, as RemoteEma has it. shared: whether the parts lie in shared memory."""

    def __init__(self, url: str, run: str, number: int, *, shared: bool) -> None:
        self.client, self._number = EmaClient(url), number
        specs, slices = (TensorSpec("w", part(0, number)[0]["w"].shape, "F32"),), part(0, number)[1]
        self._buffers = UpdateBuffers(specs, pinned=False, slices=slices, shared=lambda: shared)
        plan = ShardedPlan((), number, len(ROWS), "one start")
        push, fate = partial(plan.push, self.client, run, None), partial(plan.fate, self.client, run)
        self.publisher = Publisher(push, SendPolicy(self.client.retry), name=f"rank {number}", fate=fate)

    def push(self, step: int) -> None:
        assert self.publisher.room(wait=True)
        self.publisher.submit(self._buffers.copied(step, [part(step, self._number)[0]["w"]], hooked=False))

    def close(self) -> None:
        self.publisher.close()
        self.client.close()


@pytest.fixture(params=["socket", "shared memory"])
def ranks(request: pytest.FixtureRequest, server: ServerProcess, run_name: str) -> Iterator[list[Rank]]:
    with ExitStack() as made:
        shared = request.param == "shared memory"
        ranks = [Rank(server.uds, run_name, number, shared=shared) for number in range(len(ROWS))]
        for rank in ranks:
            made.callback(rank.close)
        yield ranks


def test_ranks_send_again_what_was_given_up(server: ServerProcess, ranks: list[Rank], run_name: str) -> None:
    """By themselves, where the run changes between their parts."""
    ranks[0].client.create_run(run_name, whole(0))
    for rank in ranks[:2]:
        rank.push(1)
    wait_until(lambda: ranks[2].client.update_status(run_name, 1).parts == (0, 1))
    ranks[2].client.set_decay(run_name, 0.25)
    wait_until(lambda: ranks[2].client.update_status(run_name, 1).parts == (0, 1))
    ranks[2].push(1)
    for rank in ranks:
        rank.publisher.flush(PATIENCE)

    assert [rank.publisher.stats.sent for rank in ranks] == [1, 1, 1]
    assert_as_whole(server, run_name, [1], decay=0.25)


@pytest.mark.parametrize("end", ["kill", pytest.param("stop", marks=pytest.mark.soak)])
def test_server_ends_between_parts(end: str, server: ServerProcess, ranks: list[Rank], run_name: str) -> None:
    """Parts that were averaged in a server that ended come again to the next one, and each step is applied once."""
    ranks[0].client.create_run(run_name, whole(0))
    for step in (1, 2):
        ranks[0].push(step)
        ranks[1].push(step)
    wait_until(lambda: ranks[2].client.update_status(run_name, 1).parts == (0, 1))
    server.kill() if end == "kill" else server.stop()
    server.start()
    for step in (1, 2):
        ranks[2].push(step)
    for rank in ranks:
        rank.publisher.flush(PATIENCE)

    assert_as_whole(server, run_name, [1, 2])


@pytest.mark.parametrize("after", [pytest.param(0.02, marks=pytest.mark.soak), 0.1])
def test_server_is_killed_at_any_time(after: float, server: ServerProcess, ranks: list[Rank], run_name: str) -> None:
    """While parts arrive and are averaged, and while the step is applied: each step is applied once."""
    ranks[0].client.create_run(run_name, whole(0))
    for step in (1, 2):
        for rank in ranks:
            rank.push(step)
        time.sleep(after)
        server.kill()
        server.start()
    for rank in ranks:
        rank.publisher.flush(PATIENCE)

    assert_as_whole(server, run_name, [1, 2])
