"""Parts of an update over a real server: several connections at once, ranks that die, answers and refusals.

Knows bodies of the safetensors library and the answers. Does not know the server's code; every way of cutting a model
up is in tests/service/runs/test_parts.py.
"""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

MakeRun = Callable[..., "PlainRun"]
Model = Callable[[int], dict[str, Tensor]]


def rows(tensors: dict[str, Tensor], index: int, of: int) -> bytes:
    """The body of one rank: a chunk of each tensor's first dimension; what has none is the first rank's."""
    data, slices = {}, {}
    for name, tensor in tensors.items():
        if tensor.dim() == 0:
            if index == 0:
                data[name] = tensor
            continue
        chunks = tensor.chunk(of)
        start = sum(len(chunk) for chunk in chunks[:index])
        if index < len(chunks) and chunks[index].numel():
            data[name] = chunks[index].contiguous()
            slices[name] = [[[start, start + len(chunks[index])], *([0, size] for size in tensor.shape[1:])]]
    return save(data, {"ema.slices": json.dumps(slices)})


def put(run: PlainRun, what: str, index: int, of: int, body: bytes, **query: Any) -> httpx.Response:
    return run.http.put(f"{run.path}/{what}/parts/{index}", content=body, params={"of": of, **query})


def test_initial_weights_and_update_in_parts(server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    """Weights and updates sent in parts give what the same sent whole give; each answer says what is there."""
    whole, parts = plain_run(server, model(0)), plain_run(server, name=f"parts-{random.getrandbits(32)}")
    parts.create(model(0))
    waiting = put(parts, "weights", 1, 2, rows(model(0), 1, 2), num_updates=7)
    assert (waiting.status_code, waiting.json()) == (
        202,
        {"step": 0, "state": "staged", "parts": [1], "digest": None, "digests": []},
    )
    ready = put(parts, "weights", 0, 2, rows(model(0), 0, 2), num_updates=7)
    assert (ready.status_code, ready.json()["num_updates"], ready.json()["version"]) == (200, 7, "1.0")
    assert put(parts, "weights", 1, 2, rows(model(0), 1, 2), num_updates=7).json() == ready.json()
    whole.push(1, model(1))

    waiting = put(parts, "updates/1", 2, 3, rows(model(1), 2, 3))
    assert (waiting.status_code, waiting.json()) == (
        202,
        {"step": 1, "state": "staged", "parts": [2], "digest": None, "digests": []},
    )
    put(parts, "updates/1", 0, 3, rows(model(1), 0, 3))
    status = parts.http.get(f"{parts.path}/updates/1").json()
    assert status == {"step": 1, "state": "staged", "parts": [0, 2], "digest": None, "digests": []}
    result = put(parts, "updates/1", 1, 3, rows(model(1), 1, 3))
    assert (result.status_code, result.json()["applied"], result.json()["num_updates"]) == (200, True, 8)
    again = put(parts, "updates/1", 0, 3, rows(model(1), 0, 3))
    assert again.json() == {**result.json(), "applied": False}
    told = parts.http.get(f"{parts.path}/updates/1").json()
    assert len(told.pop("digest")) == 32
    assert told == {"step": 1, "state": "applied", "parts": [], "digests": []}
    assert parts.push(1, model(1)).json()["applied"] is False  # the same bytes, unsharded


def test_raced_parts_equal_the_whole(server: ServerProcess, plain_run: MakeRun) -> None:
    """Parts raced over eight connections, each sent twice, some broken off: every step is applied once, bit for bit."""

    def tensors(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {n: torch.randn(513, 257, generator=generator).to(d) for n, d in DTYPES.items()}

    whole, parts = plain_run(server, tensors(0)), plain_run(server, tensors(0), name=f"race-{random.getrandbits(32)}")
    address = urlsplit(server.url)
    shuffle = random.Random(0)

    def send(step: int, index: int, broken: bool) -> int:
        body = rows(tensors(step), index, 4)
        if broken:
            head = f"PUT {parts.path}/updates/{step}/parts/{index}?of=4 HTTP/1.1\r\nHost: localhost\r\n"
            with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
                connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[: len(body) // 2])
        for _ in range(20):
            answer = put(parts, f"updates/{step}", index, 4, body)
            if answer.status_code != 503:  # the same part, on its way on another connection
                break
            time.sleep(0.05)
        return answer.status_code

    with ThreadPoolExecutor(8) as threads:
        for step in range(1, 6):
            order = [index for index in range(4) for _ in range(2)]
            shuffle.shuffle(order)
            codes = list(threads.map(lambda index, step=step: send(step, index, index == step % 4), order))  # type: ignore[misc]
            assert set(codes) <= {200, 202}, codes
            assert parts.info()["step"] == step
            whole.push(step, tensors(step))
    assert parts.info()["num_updates"] == 5
    assert {n: t.tolist() for n, t in parts.weights().items()} == {n: t.tolist() for n, t in whole.weights().items()}


DTYPES = {"w": torch.float32, "h": torch.bfloat16, "f": torch.float16}


def test_a_rank_that_dies(start_server: Callable[..., ServerProcess], plain_run: MakeRun, model: Model) -> None:
    """Where a part never comes the EMA stays, staging is given back after --body-timeout, the log names the part."""
    server = start_server("--body-timeout", "1", memory=True)
    run = plain_run(server, model(0))
    before = run.pull().content
    for index in (0, 2):
        assert put(run, "updates/1", index, 3, rows(model(1), index, 3)).status_code == 202
    assert "ema_partial_updates 1.0" in run.http.get("/metrics").text
    deadline = time.monotonic() + 20
    while run.http.get(f"{run.path}/updates/1").json()["state"] == "staged":
        assert time.monotonic() < deadline
        time.sleep(0.05)

    metrics = run.http.get("/metrics").text
    assert "ema_staging_bytes 0.0" in metrics
    assert 'ema_updates_total{result="expired"} 1.0' in metrics
    assert "step 1 was given up: of 3 parts, 1 did not come" in server.log
    assert run.pull().content == before
    assert run.push(1, model(1)).json()["applied"]


def test_refusals(server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    """What a part can be refused for: each has its code, and the update still comes about."""
    run = plain_run(server, model(0))
    good = [rows(model(1), index, 2) for index in range(2)]
    assert put(run, "updates/1", 0, 2, good[0]).status_code == 202

    def refused(index: int, of: int, body: bytes, step: int = 1, **query: Any) -> tuple[int, str]:
        answer = put(run, f"updates/{step}", index, of, body, **query)
        return answer.status_code, answer.json()["code"]

    assert refused(2, 2, good[0]) == (422, "invalid_request")
    assert refused(0, 0, good[0]) == (422, "invalid_request")
    assert refused(1, 3, good[1]) == (409, "step_conflict")
    assert refused(0, 2, rows(model(2), 0, 2)) == (409, "step_conflict")
    assert refused(1, 2, good[0]) == (422, "layout_mismatch")
    assert refused(1, 2, good[1] + b"x") == (422, "malformed_body")
    assert refused(1, 2, save({"emb": torch.ones(2, 2)})) == (422, "layout_mismatch")
    assert refused(1, 2, b"\xff" * 4096) == (422, "malformed_body")
    assert run.http.put(f"{run.path}/updates/1/parts/0", content=good[0]).status_code == 422  # without of
    assert put(run, "updates/1", 1, 2, good[1]).json()["applied"]
    run.push(2, model(2))
    assert refused(0, 2, good[0]) == (409, "stale_step")


@pytest.mark.parametrize("part", [True, False], ids=["a part", "a whole push"])
def test_run_deleted_meanwhile(part: bool, server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    """A part that is on its way when its run is deleted is answered 404, as a whole push is."""
    run = plain_run(server, model(0))
    body = rows(model(1), 0, 2) if part else save(model(1))

    def slowly() -> Iterator[bytes]:
        yield body[:-8]
        run.http.delete(run.path).raise_for_status()
        yield body[-8:]

    path = "updates/1/parts/0?of=2" if part else "updates/1"
    with server.http() as http:
        answer = http.put(f"{run.path}/{path}", content=slowly())
    assert (answer.status_code, answer.json()["code"]) == (404, "run_not_found")


def test_no_room_for_parts(start_server: Callable[..., ServerProcess], plain_run: MakeRun) -> None:
    """Parts of all steps count against the staging budget: beyond it a part of a further step is 503, at once."""
    server = start_server("--staging-bytes", str(5 << 20), memory=True)
    tensors = {"w": torch.zeros(1 << 20)}
    run = plain_run(server, tensors)
    assert put(run, "updates/1", 0, 2, rows(tensors, 0, 2)).status_code == 202
    full = put(run, "updates/2", 0, 2, rows(tensors, 0, 2))
    assert (full.status_code, full.json()["code"]) == (503, "overloaded")
    assert put(run, "updates/1", 1, 2, rows(tensors, 1, 2)).json()["applied"]
    assert put(run, "updates/2", 0, 2, rows(tensors, 0, 2)).status_code == 202


@pytest.mark.parametrize("chunked", [False, True])
def test_both_ways_of_receiving(chunked: bool, server: ServerProcess, plain_run: MakeRun) -> None:
    """Columns of a matrix, which lie scattered, come right by the fast path and by a chunked body."""
    before, after = {"w": torch.zeros(300, 1000)}, {"w": torch.randn(300, 1000)}
    run = plain_run(server, before, decay=0.0, use_num_updates=False)
    for index in range(4):
        columns = after["w"].chunk(4, dim=1)[index].contiguous()
        slices = {"w": [[[0, 300], [250 * index, 250 * (index + 1)]]]}
        body = save({"w": columns}, {"ema.slices": json.dumps(slices)})
        content = (body[i : i + 10_007] for i in range(0, len(body), 10_007)) if chunked else body
        answer = run.http.put(f"{run.path}/updates/1/parts/{index}", content=content, params={"of": 4})
    assert answer.json()["applied"]
    assert torch.equal(run.weights()["w"], after["w"])
