"""Pulls through EmaClient from the real service, and over ways to it that lose answers.

Knows what a pull gives. Does not know how large weights are parted (test_halves.py), or slices (test_slices.py).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ema_client import AverageConfig, EmaClient
from ema_client.errors import AverageNotFound, SnapshotExists, SnapshotNotFound, StepNotReached, UsageError
from ema_client.http.transport import Transport
from ema_client.reading.asked import Asked
from ema_client.reading.pulls import Pulls
from tests.client.states import QUICK, STATE, assert_equal, first_only, plus


@pytest.fixture
def run(client: EmaClient, run_name: str) -> str:
    """A run of STATE with decay 0.5 and no counter: each update halves the way to the parameters."""
    client.create_run(run_name, STATE, decay=0.5, use_num_updates=False)
    return run_name


def test_pull_by_dtype_and_prefix(client: EmaClient, run: str) -> None:
    """The service casts and selects."""
    halves = client.pull(run, dtype=torch.bfloat16, prefix="a.")

    assert_equal(halves, {name: STATE[name].bfloat16() for name in ("a.weight", "a.bias")})
    assert client.pull(run, dtype="F64")["scale"].dtype == torch.float64


def test_pull_into_given_tensors(client: EmaClient, run: str) -> None:
    """``out`` is filled in place and is what the answer holds."""
    out = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}

    weights = client.pull(run, out=out)

    assert all(weights[name] is out[name] for name in out)
    assert_equal(out, STATE)


def test_pull_into_tensors_that_do_not_fit(client: EmaClient, run: str) -> None:
    """``out`` must be of the answer's names and shapes: each fault is named and nothing is written."""
    out = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(3), "more": torch.zeros(1)}

    with pytest.raises(UsageError, match=r"'scale' is missing; 'more' is not among.*; 'a\.bias' has shape \(3,\)"):
        client.pull(run, out=out)
    assert torch.equal(out["a.weight"], torch.zeros(2, 3))


def test_pull_of_several_averages(client: EmaClient, run_name: str) -> None:
    """Each average is pulled by its name; the first is the default."""
    averages = [AverageConfig("slow", decay=0.75), AverageConfig("fast", decay=0.0)]
    client.create_run(run_name, STATE, use_num_updates=False, averages=averages)
    client.push(run_name, plus(1))

    assert_equal(client.pull(run_name, average="fast"), plus(1))
    assert client.pull(run_name).info.average == "slow"
    assert_equal(client.pull(run_name), plus(0.25))
    with pytest.raises(AverageNotFound):
        client.pull(run_name, average="none")


def test_pull_waits_for_a_step(client: EmaClient, server: Any, run: str) -> None:
    """min_step with wait returns as soon as another trainer has reached the step."""
    with EmaClient(server.url) as trainer:
        timer = threading.Timer(0.3, lambda: trainer.push(run, plus(1), step=5))
        timer.start()
        weights = client.pull(run, min_step=5, wait=30.0)
        timer.join(10)

    assert weights.info.step == 5
    assert_equal(weights, plus(0.5))


@pytest.mark.parametrize("wait", [None, 0.2])
def test_pull_does_not_wait_longer(client: EmaClient, run: str, wait: float | None) -> None:
    """A step that is not reached in time is an error, after that time and not after several of it."""
    before = time.monotonic()
    with pytest.raises(StepNotReached):
        client.pull(run, min_step=1, wait=wait)

    assert (wait or 0.0) <= time.monotonic() - before < (wait or 0.0) + 5.0


def test_pull_waits_longer_than_one_request_may(server: Any, run: str) -> None:
    """A wait beyond what the service holds a request for is several requests."""
    with EmaClient(server.url) as trainer, contextlib.closing(Transport(server.url)) as transport:
        pulls = Pulls(transport, longest_wait=0.1)
        timer = threading.Timer(0.5, lambda: trainer.push(run, plus(1), step=5))
        timer.start()
        assert pulls.pull(Asked(run, min_step=5), wait=30.0).info.step == 5
        timer.join(10)


def test_broken_pull_is_tried_again(relay: Callable[..., Any], run: str) -> None:
    """A body that breaks off in the middle is pulled anew, and the tensors are whole."""
    out = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    with EmaClient(relay(first_only("GET"), after=600).url, retry=QUICK) as shaky:
        shaky.pull(run, out=out)

    assert_equal(out, STATE)


def test_copy_to_fills_a_module(client: EmaClient, run_name: str) -> None:
    """The EMA goes into the module's own trained parameters; frozen ones and buffers stay."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    frozen = model[1].weight.clone()
    client.create_run(run_name, {"0.weight": torch.ones(2, 2), "0.bias": torch.zeros(2)})
    address = model[0].weight.data_ptr()

    info = client.copy_to(run_name, nn.DataParallel(model))

    assert info.run == run_name
    assert model[0].weight.data_ptr() == address
    assert torch.equal(model[0].weight, torch.ones(2, 2))
    assert torch.equal(model[1].weight, frozen)


def test_copy_to_another_model_is_refused(client: EmaClient, run: str) -> None:
    """A model of other names is refused whole."""
    model = nn.Linear(3, 2)
    before = model.weight.clone()

    with pytest.raises(UsageError, match=r"'a\.weight' is missing"):
        client.copy_to(run, model)
    assert torch.equal(model.weight, before)


# --- snapshots -----------------------------------------------------------------------------------------------------


def test_snapshot_keeps_a_version(client: EmaClient, run: str, tmp_path: Any) -> None:
    """A snapshot stays as it was taken: pulled, copied and downloaded, whatever is pushed after it."""
    client.push(run, plus(1))
    taken = client.snapshot(run, "best")
    client.push(run, plus(9))

    pulled = client.pull(run, snapshot="best")
    assert_equal(pulled, plus(0.5))
    assert (pulled.info.version, pulled.info.snapshot) == (taken.version, "best")
    assert client.download(run, tmp_path / "best.safetensors", snapshot="best") == pulled.info
    assert client.snapshots(run) == (taken,)


def test_snapshot_names(client: EmaClient, run: str) -> None:
    """The same version under the same name is the same snapshot; another version is refused; a deleted one is gone."""
    taken = client.snapshot(run, "best")
    assert client.snapshot(run, "best") == taken
    client.push(run, plus(1))
    with pytest.raises(SnapshotExists):
        client.snapshot(run, "best")

    client.delete_snapshot(run, "best")
    assert client.snapshots(run) == ()
    with pytest.raises(SnapshotNotFound):
        client.delete_snapshot(run, "best")
    with pytest.raises(SnapshotNotFound):
        client.pull(run, snapshot="best")
