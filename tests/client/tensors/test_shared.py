"""State in shared memory: pushed without being sent, and sent where that cannot be.

Knows the client's calls, its log, and what they leave behind in the real service. Does not know how a service reads the
memory (tests/service/api/test_segment.py).
"""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor, nn

from ema_client import EmaClient, RemoteEma, RetryPolicy
from ema_client.errors import NonFinite, UsageError
from ema_client.protocol import DIGEST_BYTES, TensorSpec
from ema_client.training.buffers import UpdateBuffers

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memfd_create on this system"),
    pytest.mark.one_server("its own count of pushes"),
]

#: Above the size from which a state is handed over.
ELEMENTS = 600_000


def state(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((ELEMENTS,), value), "b": torch.full((3,), value, dtype=torch.bfloat16)}


@pytest.fixture
def client(server: Any) -> Iterator[EmaClient]:
    with EmaClient(server.url, retry=RetryPolicy(attempts=1)) as made:
        yield made


@pytest.fixture
def run(client: EmaClient, run_name: str) -> str:
    client.create_run(run_name, state(0.0), decay=0.5, use_num_updates=False)
    return run_name


def metric(client: EmaClient, line: str) -> float:
    text = httpx.get(f"{client.url}/metrics").text
    return next((float(found.split()[-1]) for found in text.splitlines() if found.startswith(line)), 0.0)


def handed_over(client: EmaClient) -> float:
    return metric(client, 'ema_pushes_total{link="shared memory"}')


def sent(client: EmaClient) -> float:
    return metric(client, 'ema_pushes_total{link="TCP on this host"}')


@pytest.mark.parametrize("way", ["url", "uds"])
def test_shared_state_is_handed_over(server: Any, client: EmaClient, run: str, way: str) -> None:
    """What lies in shared memory is not sent, by TCP and by a Unix socket; the average is the same to the bit."""
    with EmaClient(getattr(server, way)) as pusher:
        shared, before = pusher.shared_state(state(1.0)), handed_over(client)
        result = pusher.push(run, shared, step=1)

        assert result.applied
        assert (handed_over(client) - before, pusher.link) == (1, "shared memory")
    weights = client.pull(run)
    assert torch.equal(weights["w"], torch.full((ELEMENTS,), 0.5))
    assert torch.equal(weights["b"], torch.full((3,), 0.5))
    assert client.push(run, state(1.0), step=1).applied is False
    assert client.run(run).link == "TCP on this host"


def test_filled_again(client: EmaClient, run: str) -> None:
    """The one memory takes state after state: in place, and by fill(), which casts."""
    shared = client.shared_state(state(1.0))
    client.push(run, shared, step=1)
    shared["w"].fill_(2.0)
    shared["b"].fill_(2.0)
    client.push(run, shared, step=2)
    shared.fill({name: tensor.double() for name, tensor in state(3.0).items()})
    client.push(run, shared, step=3)

    assert torch.equal(client.pull(run)["w"], torch.full((ELEMENTS,), 2.125))
    assert client.link == "shared memory"


def test_run_begins_from_shared_memory(client: EmaClient, run_name: str) -> None:
    """The initial weights are handed over as well."""
    before = handed_over(client)
    client.create_run(run_name, client.shared_state(nn.Linear(600, 600)))

    assert handed_over(client) - before == 1
    assert set(client.pull(run_name)) == {"weight", "bias"}


def test_plain_push_is_sent(client: EmaClient, run: str) -> None:
    """push() of tensors that lie elsewhere makes no copy of them, so it sends them."""
    before = sent(client)
    client.push(run, state(1.0), step=1)

    assert (sent(client) - before, client.link) == (1, "TCP")


def test_little_is_sent(client: EmaClient, run_name: str) -> None:
    """A small state is sent: that is as quick."""
    before = sent(client)
    client.create_run(run_name, client.shared_state({"w": torch.ones(3), "none": torch.ones(0)}))

    assert sent(client) - before == 1


def test_refusals_are_the_same(client: EmaClient, run: str) -> None:
    """An update that is refused is no reason to send it: NaN is NaN."""
    shared, before = client.shared_state(state(float("nan"))), sent(client)
    with pytest.raises(NonFinite):
        client.push(run, shared, step=1)
    shared.fill(state(1.0))
    client.push(run, shared, step=1)

    assert (sent(client) - before, client.link) == (0, "shared memory")


def test_fill_checks_first() -> None:
    """fill() of another model is refused, and nothing is written."""
    with EmaClient("http://127.0.0.1:1") as client:
        shared = client.shared_state(state(1.0))
        for other in ({"w": state(2.0)["w"]}, {**state(2.0), "w": torch.zeros(2)}):
            with pytest.raises(UsageError, match="other tensors"):
                shared.fill(other)

    assert float(shared["w"][0]) == 1.0


def test_remote_ema_hands_its_copies_over(server: Any, client: EmaClient, run_name: str, litema: Any) -> None:
    """RemoteEma copies the parameters all the same: into shared memory, and then nothing is sent. LitEma's bits."""
    model = nn.Linear(700, 700)
    oracle, before, was_sent = litema(dict(model.named_parameters())), handed_over(client), sent(client)
    with RemoteEma(model, run=run_name, url=server.url) as ema, torch.no_grad():
        for _ in range(5):
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            ema(model)
            oracle.update({name: parameter.detach() for name, parameter in model.named_parameters()})
    weights = client.pull(run_name)

    assert all(torch.equal(weights[name], shadow) for name, shadow in oracle.shadow.items())
    assert (handed_over(client) - before, sent(client) - was_sent) == (5, 1)  # the initial weights are sent
    assert client.run(run_name).link == "shared memory"


def test_parts_are_handed_over(client: EmaClient, run: str) -> None:
    """The ranks of a sharded trainer hand their slices over, each its own memory."""
    half, before = ELEMENTS // 2, handed_over(client)
    for part, start in enumerate((0, half)):
        specs = (TensorSpec("w", (half,), "F32"),)
        slices = {"w": [((start, start + half),)]}
        tensors = [torch.full((half,), 2.0 + part)]
        if part == 0:
            specs, tensors = (*specs, TensorSpec("b", (3,), "BF16")), [*tensors, state(2.0)["b"]]
        buffers = UpdateBuffers(specs, pinned=False, slices=slices, shared=lambda: True)
        body = buffers.copied(1, tensors, hooked=False).body
        last = client.push_part_once(run, body, step=1, part=part, of=2)
        assert last is (part == 1)

    weights = client.pull(run)
    assert torch.equal(weights["w"], torch.cat([torch.full((half,), 1.0), torch.full((half,), 1.5)]))
    assert torch.equal(weights["b"], torch.full((3,), 1.0))
    assert handed_over(client) - before == 2
    assert client.link == "shared memory"


# --- where it cannot be ---------------------------------------------------------------------------------------------


def test_refused_by_the_service(
    client: EmaClient,
    run: str,
    server: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As in a container with processes of its own numbers: the push is sent, once and for all, and that is told."""
    monkeypatch.setattr(os, "getpid", lambda: 1 << 30)
    shared = client.shared_state(state(1.0))
    refusals = metric(client, 'ema_errors_total{code="segment_unusable"}')
    with caplog.at_level(logging.WARNING, "ema_client"):
        assert client.push(run, shared, step=1).applied
        assert client.push(run, shared, step=2).applied

    assert metric(client, 'ema_errors_total{code="segment_unusable"}') - refusals == 1
    told = [record.getMessage() for record in caplog.records if record.name == "ema_client"]
    assert len(told) == 1
    assert "cannot be opened" in told[0]
    assert client.link.startswith("TCP; shared memory was refused: ")
    assert "shared memory was refused: " in (client.run(run).link or "")
    shown = subprocess.run(
        [sys.executable, "-m", "ema_client", "show", run, "--url", server.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "TCP on this host; shared memory was refused: " in shown.stdout


def test_without_memfd(
    client: EmaClient, run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a system without such memory a shared state is an ordinary one, and that is told."""
    monkeypatch.delattr(os, "memfd_create")
    with caplog.at_level(logging.WARNING, "ema_client"):
        shared, before = client.shared_state(state(1.0)), sent(client)
    client.push(run, shared, step=1)

    assert (sent(client) - before, client.link) == (1, "TCP")
    assert "no shared memory" in caplog.text


def test_service_that_knows_nothing_of_it(scripted: Callable[..., Any]) -> None:
    """An older service, or one behind a proxy that drops the header, finds an empty body: then a full one is sent."""
    requests, got = [], []

    def script(peer: Any) -> None:
        while request := peer.request():
            if request.method == "GET":
                peer.answer(200, {"run": "r", "layout": []})
                continue
            requests.append(request)
            if request.length == 0:
                peer.problem(422, "malformed_body")
                continue
            peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            got.append(peer.body(request.length))
            result = {"applied": True, "step": 1, "num_updates": 1, "effective_decay": 0.5, "version": "1.1"}
            peer.answer(200, {**result, "durable_step": None})

    with EmaClient(scripted(script).url, retry=RetryPolicy(attempts=1)) as client:
        shared = client.shared_state(state(1.0))
        client.push("r", shared, step=1)
        client.push("r", shared, step=1)

    assert [("ema-segment" in request.headers, request.length > 0) for request in requests] == [
        *((True, False), (False, True), (False, True))
    ]
    assert got[0][:-DIGEST_BYTES] == b"".join(shared.body.pieces())


# --- the memory itself ----------------------------------------------------------------------------------------------


def test_memory_is_freed_with_its_last_tensor() -> None:
    """No mapping and no descriptor outlives the state and its tensors."""

    def mine() -> int:
        links = [str(link) for link in map(_link, Path("/proc/self/fd").iterdir()) if "memfd:ema-push" in str(link)]
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:ema-push" in line]
        return len(links) + len(maps)

    gc.collect()
    before = mine()
    with EmaClient("http://127.0.0.1:1") as client:
        shared = client.shared_state(state(1.0))
    tensor = shared["w"]
    del shared
    assert mine() > before
    assert float(tensor.sum()) == ELEMENTS
    del tensor

    assert mine() == before


def _link(path: Path) -> Path | None:
    try:
        return path.readlink()
    except OSError:
        return None
