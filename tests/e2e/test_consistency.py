"""Readers beside a writer: every body is one version, whole, and versions only grow.

Knows a run whose weights tell their step. Does not know how versions are kept apart.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from ema_service.api.reading import LINGER_SECONDS

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

UPDATES = 200
#: 3 MB in several tensors and dtypes: more than the server hands to a socket at once.
SHAPES = {"big": (300_000,), "conv": (64, 32, 3, 3), "bias": (7,), "emb": (200_000,), "wide": (50_000,)}
DTYPES = {"emb": torch.float16, "wide": torch.float64}
#: decay 0: the average is the latest parameters. The other forgets half at each update.
DECAYS = {"now": 0.0, "half": 0.5}
AVERAGES: list[dict[str, object]] = [
    {"name": name, "decay": decay, "schedule": "constant"} for name, decay in DECAYS.items()
]


def constant(step: int) -> dict[str, Tensor]:
    """Parameters that all have the value ``step``, which fp16 and every sum of halves of it hold exactly."""
    return {n: torch.full(shape, float(step), dtype=DTYPES.get(n, torch.float32)) for n, shape in SHAPES.items()}


@pytest.fixture
def run(plain_run: Callable[..., PlainRun], server: ServerProcess) -> PlainRun:
    return plain_run(server, constant(0), averages=AVERAGES)


class Reader:
    """Pulls until told to stop and notes the step of each body it got."""

    def __init__(self, server: ServerProcess, run: PlainRun, average: str) -> None:
        self.steps: list[int] = []
        self._server = server
        self._path = f"{run.path}/weights?average={average}"
        self._expected = [0.0]
        for step in range(1, UPDATES + 1):
            self._expected.append(float(step) if average == "now" else (self._expected[-1] + step) / 2)

    def read(self, stop: threading.Event) -> None:
        with self._server.http() as http:
            while not stop.is_set():
                self._one(http.get(self._path).raise_for_status())

    def _one(self, answer: httpx.Response) -> None:
        step = int(answer.headers.get("Ema-Step", 0))
        values = {float(end) for tensor in load(answer.content).values() for end in (tensor.min(), tensor.max())}
        # Float32 and float64 round apart, by far less than two steps differ.
        assert list(values) == [pytest.approx(self._expected[step], rel=1e-5)] * len(values), f"not all of step {step}"
        assert answer.headers["Ema-Version"] == f"1.{step}"
        assert f'"ema_step":"{step}"'.encode() in answer.content[:1000] or step == 0
        self.steps.append(step)


def test_every_body_is_one_version(run: PlainRun, server: ServerProcess) -> None:
    """Four readers beside 200 updates: each body is of one step in all its tensors, and no reader goes back in time."""
    stop = threading.Event()
    readers = [Reader(server, run, average) for average in (*DECAYS, *DECAYS)]
    with ThreadPoolExecutor(len(readers)) as threads:
        reading = [threads.submit(reader.read, stop) for reader in readers]
        try:
            for step in range(1, UPDATES + 1):
                run.push(step, constant(step)).raise_for_status()
        finally:
            stop.set()
        for future in reading:
            future.result(60)

    for reader in readers:
        assert reader.steps == sorted(reader.steps)
        assert len(set(reader.steps)) > 3, "the reader never saw the run move"


def test_slow_reader_gets_the_version_it_began(run: PlainRun, server: ServerProcess) -> None:
    """A body begun before ten updates ends with the version it began with, and the updates do not wait for it."""
    with server.http() as http, http.stream("GET", f"{run.path}/weights") as answer:
        chunks = answer.iter_raw()
        begun = [next(chunks)]
        for step in range(1, 11):
            run.push(step, constant(step)).raise_for_status()
        weights = load(b"".join([*begun, *chunks]))

    assert {float(end) for tensor in weights.values() for end in (tensor.min(), tensor.max())} == {0.0}
    assert run.info()["version"] == "1.10"


def test_parts_pinned_by_if_range_are_of_one_version(run: PlainRun) -> None:
    """A download in parts goes on while the version stands, and a moment longer; then If-Range gives the new version
    whole."""
    first = run.http.get(f"{run.path}/weights", headers={"Range": "bytes=0-99999"})
    pinned = {"Range": "bytes=100000-", "If-Range": first.headers["etag"]}
    second = run.http.get(f"{run.path}/weights", headers=pinned)

    assert (first.status_code, second.status_code) == (206, 206)
    assert first.content + second.content == run.pull().content
    run.push(1, constant(1)).raise_for_status()
    still = run.http.get(f"{run.path}/weights", headers=pinned)
    assert still.status_code == 200 or still.content == second.content
    moved = still
    for _ in range(20):
        if moved.status_code == 200:
            break
        time.sleep(1.2 * LINGER_SECONDS)  # each request for the old version keeps it for as long
        moved = run.http.get(f"{run.path}/weights", headers=pinned)
    assert (moved.status_code, moved.headers["Ema-Version"]) == (200, "1.1")
    assert moved.content == run.pull().content
