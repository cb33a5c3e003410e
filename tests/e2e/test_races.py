"""Pushes that race for one step, and steps in no order: each changes the run once or not at all.

Knows connections that push at the same moment. Does not know the server's code.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest
import torch
from safetensors.torch import save

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

ANSWER_SECONDS = 20.0
TENSORS = {
    "big": torch.tensor([1.5, -2.5], dtype=torch.float64),
    "a.weight": torch.arange(12.0).reshape(4, 3),
    "emb": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.bfloat16),
}


def _race(target: PlainRun, server: ServerProcess, bodies: list[bytes], step: int) -> list[httpx.Response]:
    """Push all bodies at one step at the same moment, each on a connection of its own."""
    gate = threading.Barrier(len(bodies))

    def push(payload: bytes) -> httpx.Response:
        with server.http() as http:
            http.get("/healthz")
            gate.wait(ANSWER_SECONDS)
            return http.put(f"{target.path}/updates/{step}", content=payload)

    with ThreadPoolExecutor(len(bodies)) as threads:
        return list(threads.map(push, bodies))


@pytest.fixture
def racers(plain_run: Callable[..., PlainRun], server: ServerProcess) -> PlainRun:
    return plain_run(server, TENSORS, decay=0.5, use_num_updates=False)


def test_one_step_raced_with_the_same_bytes(racers: PlainRun, server: ServerProcess) -> None:
    """Eight pushes of the same bytes at one step: all are answered 200, exactly one of them is applied."""
    for step in range(1, 5):
        payload = save({name: tensor * step for name, tensor in TENSORS.items()})
        answers = _race(racers, server, [payload] * 8, step)

        assert [answer.status_code for answer in answers] == [200] * 8
        assert sorted(answer.json()["applied"] for answer in answers) == [False] * 7 + [True]
        assert racers.info()["version"] == f"1.{step}"


def test_one_step_raced_with_other_bytes(racers: PlainRun, server: ServerProcess) -> None:
    """Eight pushes of different bytes at one step: one is applied, and the weights are its; the others conflict."""
    for step in range(1, 5):
        before = racers.weights()
        tensors = [{name: tensor * (step + i) for name, tensor in TENSORS.items()} for i in range(8)]
        answers = _race(racers, server, [save(each) for each in tensors], step)

        won = [i for i, answer in enumerate(answers) if answer.status_code == 200]
        codes = {answer.json()["code"] for answer in answers if answer.status_code != 200}
        assert (len(won), codes) == (1, {"step_conflict"})
        for name, weights in racers.weights().items():
            expected = before[name] - 0.5 * (before[name] - tensors[won[0]][name].to(weights.dtype))
            assert torch.equal(weights, expected)


def test_reordered_steps(racers: PlainRun, server: ServerProcess) -> None:
    """Sixteen steps pushed at once, in no order: each is applied or stale, and steps only grow."""
    bodies = {step: save({name: tensor * step for name, tensor in TENSORS.items()}) for step in range(1, 17)}
    gate = threading.Barrier(len(bodies))

    def push(step: int) -> str:
        with server.http() as http:
            http.get("/healthz")
            gate.wait(ANSWER_SECONDS)
            # Who is superseded sends again, as often as others can come first.
            for _ in bodies:
                answer = http.put(f"{racers.path}/updates/{step}", content=bodies[step])
                if answer.status_code != 503:
                    break
            return str(answer.json().get("code", "applied"))

    with ThreadPoolExecutor(len(bodies)) as threads:
        results = dict(zip(bodies, threads.map(push, bodies), strict=True))

    applied = [step for step, what in results.items() if what == "applied"]
    assert set(results.values()) <= {"applied", "stale_step"}
    assert racers.info()["version"] == f"1.{len(applied)}"
    assert racers.info()["step"] == max(applied) == 16
