"""Routes that take weights in, over a real server.

Knows bodies of the safetensors library and the answers. Does not know the server's code; how bodies are cut on their
way is in transfer/test_filling.py, hostile ones are in tests/fuzz/attacks/.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle, PlainRun, ServerProcess

MakeRun = Callable[..., "PlainRun"]
Model = Callable[[int], dict[str, Tensor]]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


# --- initial weights ------------------------------------------------------------------------------------------------


def test_initial_weights(server: ServerProcess, plain_run: MakeRun, model: Model, litema: type[LitEmaOracle]) -> None:
    """The initial weights become the shadow, widened to float32; the run is ready at version 1.0."""
    run = plain_run(server)
    run.create(model(0))
    answer = run.begin(model(0))

    assert (answer.status_code, answer.json()) == (200, run.info())
    assert (run.info()["status"], run.info()["version"]) == ("ready", "1.0")
    assert_equal(run.weights(), litema(model(0)).shadow)


def test_initial_weights_again(server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    """The same initial weights again are 200 and change nothing; others, or the same after an update, are 409."""
    run = plain_run(server, model(0))
    before = run.info()
    assert run.begin(model(0)).json() == before
    assert run.begin(model(1)).json()["code"] == "weights_exist"
    run.push(1, model(1))

    refused = run.begin(model(0))
    assert (refused.status_code, refused.json()["code"]) == (409, "weights_exist")


def test_existing_ema_is_carried_on(server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    """?num_updates= and ?step= carry on an EMA that began elsewhere: the warm-up and the steps go on from there."""
    run = plain_run(server)
    run.create(model(0))
    info = run.begin(model(0), num_updates=500, step=2000).json()
    assert (info["num_updates"], info["step"]) == (500, 2000)
    assert run.push(2000, model(1)).json()["code"] == "stale_step"
    result = run.push(2001, model(1)).json()

    assert result["num_updates"] == 501
    assert result["effective_decay"] == torch.div(502, torch.tensor(511.0)).item()


def test_counter_where_there_is_none(server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    """?num_updates= is 422 where use_num_updates is off."""
    run = plain_run(server)
    run.create(model(0), use_num_updates=False)
    answer = run.begin(model(0), num_updates=1)

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


@pytest.mark.parametrize("counter", [2**63 - 1, 2**63 - 9])
def test_counter_at_its_end(counter: int, server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    """The largest counters either are refused or go on averaging: no 500, no decay outside 0..1."""
    run = plain_run(server)
    run.create(model(0))
    if run.begin(model(0), num_updates=counter).status_code == 422:
        return
    answer = run.push(1, model(1))

    assert answer.status_code == 200
    assert 0.0 <= answer.json()["effective_decay"] <= 1.0


# --- updates --------------------------------------------------------------------------------------------------------


def test_updates_are_litemas(
    server: ServerProcess, plain_run: MakeRun, model: Model, litema: type[LitEmaOracle]
) -> None:
    """Updates of a model with every dtype equal an in-process LitEma to the bit, in two averages at once."""
    run = plain_run(server, model(0), averages=[{"name": "slow"}, {"name": "fast", "decay": 0.3}])
    oracles = {"slow": litema(model(0)), "fast": litema(model(0), 0.3)}
    for step in range(1, 12):
        result = run.push(step, model(step)).json()
        for name, oracle in oracles.items():
            oracle.update(model(step))
            assert_equal(run.weights(average=name), oracle.shadow)
        assert result == {
            "applied": True,
            "step": step,
            "num_updates": step,
            "effective_decay": torch.div(1 + step, torch.tensor(10.0 + step)).item(),
            "version": f"1.{step}",
            "durable_step": step,
        }


@pytest.mark.parametrize("piece", [1_000_003, 65_537])
def test_large_update_in_odd_pieces(
    piece: int, server: ServerProcess, plain_run: MakeRun, litema: type[LitEmaOracle]
) -> None:
    """A large update of mixed dtypes, arriving in pieces cut inside elements, is averaged to the bit and repeatable."""

    def tensors(seed: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(seed)
        return {
            n: torch.randn(1 << 22, generator=random).to(d) for n, d in (("w", torch.float32), ("h", torch.bfloat16))
        }

    run, oracle = plain_run(server, tensors(0)), litema(tensors(0))
    address = urlsplit(server.url)
    for step in range(1, 6):
        oracle.update(tensors(step))
        body = save(tensors(step))
        head = f"PUT {run.path}/updates/{step} HTTP/1.1\r\nHost: localhost\r\nX: {'x' * step}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
            connection.sendall(head.encode())
            for at in range(0, len(body), piece):
                connection.sendall(body[at : at + piece])
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")

        assert_equal(run.weights(), oracle.shadow)
        again = run.http.put(f"{run.path}/updates/{step}", content=body)
        assert (again.status_code, again.json().get("applied")) == (200, False)


def test_repeated_update(server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    """The same bytes at the latest step, in any order, under any header, are answered applied false."""
    run = plain_run(server, model(0))
    first = run.push(5, model(5)).json()
    before = run.pull().content
    path = f"{run.path}/updates/5"
    bodies: list[bytes] = [save(model(5)), save(model(5), {"note": "again"}), _reordered(model(5))]
    for body in bodies:
        answer = run.http.put(path, content=body)
        assert (answer.status_code, answer.json()) == (200, {**first, "applied": False})

    assert run.pull().content == before
    assert run.push(5, model(6)).json()["code"] == "step_conflict"
    assert run.push(4, model(4)).json()["code"] == "stale_step"


def _reordered(tensors: dict[str, Tensor]) -> bytes:
    """A well-formed body whose tensors lie in reversed order."""
    names = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    header, data = {}, b""
    for name, tensor in reversed(tensors.items()):
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    table = json.dumps(header).encode()
    return struct.pack("<Q", len(table)) + table + data


def test_body_in_any_order(server: ServerProcess, plain_run: MakeRun, model: Model, litema: type[LitEmaOracle]) -> None:
    """A body whose tensors lie in another order is the same update."""
    run, oracle = plain_run(server, model(0)), litema(model(0))
    oracle.update(model(1))
    run.http.put(f"{run.path}/updates/1", content=_reordered(model(1))).raise_for_status()

    assert_equal(run.weights(), oracle.shadow)


def test_chunked_body(server: ServerProcess, plain_run: MakeRun, model: Model, litema: type[LitEmaOracle]) -> None:
    """A body of unannounced length, in chunks, is the same update."""
    run, oracle = plain_run(server, model(0)), litema(model(0))
    oracle.update(model(1))

    def chunks() -> Iterator[bytes]:
        body = save(model(1))
        yield from (body[at : at + 100] for at in range(0, len(body), 100))

    run.http.put(f"{run.path}/updates/1", content=chunks()).raise_for_status()
    assert_equal(run.weights(), oracle.shadow)


def test_gap_of_steps(server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    """With decay_per step the decay is the product over the steps since the last update; num_updates counts steps."""
    run = plain_run(server, model(0), decay=0.5, decay_per="step", use_num_updates=False)
    run.push(10, model(1))
    assert run.push(13, model(2)).json()["effective_decay"] == pytest.approx(0.125)
    counting = plain_run(server, model(0), name=f"{run.name}-counting", decay_per="step")
    counting.push(10, model(1))

    assert counting.push(15, model(2)).json()["num_updates"] == 6


def test_status_of_an_update(server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    """GET updates/{step} says applied for a step that was, and unknown for others."""
    run = plain_run(server, model(0))
    run.push(3, model(3))

    for step, state in ((3, "applied"), (2, "unknown"), (4, "unknown")):
        answer = run.http.get(f"{run.path}/updates/{step}")
        told = answer.json()
        assert (told.pop("digest") is not None) == (state == "applied")
        assert (answer.status_code, told) == (200, {"step": step, "state": state, "parts": [], "digests": []})


@pytest.mark.parametrize("parts", [False, True])
def test_refused_updates_are_told(server: ServerProcess, plain_run: MakeRun, parts: bool) -> None:
    """The run says why its latest push was refused, until an update is applied: else a trainer of NaN only looks
    slow."""
    run = plain_run(server, {"w": torch.zeros(3)})
    assert run.info()["refused"] is None
    bad = {"w": torch.tensor([1.0, float("nan"), 1.0])}
    if parts:
        body = save(bad, {"ema.slices": json.dumps({"w": [[[0, 3]]]})})
        answer = run.http.put(f"{run.path}/updates/1/parts/0?of=1", content=body)
    else:
        answer = run.push(1, bad)

    assert answer.json()["code"] == "non_finite"
    assert run.info()["refused"] == answer.json()["detail"]
    run.push(2, {"w": torch.ones(3)}).raise_for_status()
    assert run.info()["refused"] is None


def test_nan_where_it_is_allowed(server: ServerProcess, plain_run: MakeRun) -> None:
    """A run that allows NaN takes it, as LitEma would."""
    run = plain_run(server, {"w": torch.zeros(3)}, non_finite="allow")
    run.push(1, {"w": torch.tensor([1.0, float("nan"), float("inf")])}).raise_for_status()

    assert run.weights()["w"].isfinite().tolist() == [True, False, False]


def test_runs_do_not_wait_for_each_other(
    server: ServerProcess, plain_run: MakeRun, model: Model, litema: type[LitEmaOracle], run_name: str
) -> None:
    """Eight trainers push to eight runs at once; each run is its own EMA."""
    runs = [plain_run(server, model(i), name=f"{run_name}-{i}") for i in range(8)]

    def train(number: int) -> bool:
        oracle = litema(model(number))
        for step in range(1, 20):
            oracle.update(model(number * 100 + step))
            runs[number].push(step, model(number * 100 + step)).raise_for_status()
        return all(torch.equal(value, oracle.shadow[name]) for name, value in runs[number].weights().items())

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(train, range(8)))


def test_run_that_changes_under_an_update(server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    """An update whose run changed while it was received is 503 superseded, to be sent again; it was not applied."""
    run = plain_run(server, model(0))
    body = save(model(1))
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        head = f"PUT {run.path}/updates/1 HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nConnection: close\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 100")
        run.http.patch(run.path, json={"decay": 0.5}).raise_for_status()
        connection.sendall(body)
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).lower()

    assert answer.startswith(b"http/1.1 503")
    assert b'"superseded"' in answer
    assert b"retry-after: 0" in answer
    assert run.info()["version"] == "1.0"
    assert run.push(1, model(1)).json()["applied"]
