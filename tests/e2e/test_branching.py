"""A run branches from another run's snapshot: on the server, bit for bit, and only where that makes sense.

Knows the client's calls and what an update does. Does not know how a snapshot is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ema_client import AverageConfig, EmaClient, RemoteEma
from ema_client.errors import (
    AverageNotFound,
    Forbidden,
    InvalidRequest,
    LayoutMismatch,
    RunExists,
    RunNotFound,
    SnapshotNotFound,
    UsageError,
)
from ema_service.tokens import create_token


@pytest.fixture
def client(server: Any) -> Iterator[EmaClient]:
    with EmaClient(server.url) as made:
        yield made


def train(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def grown(client: EmaClient, run: str, model: nn.Module, updates: int = 5, **config: Any) -> None:
    """A run with some updates, a snapshot `kept` of them, and updates after it."""
    client.create_run(run, model, **config)
    for step in range(1, updates + 1):
        train(model, step)
        client.push(run, model, step=step)
    client.snapshot(run, "kept")


def equal(client: EmaClient, left: str, right: str, average: str | None = None) -> bool:
    ours, theirs = client.pull(left, average=average), client.pull(right, average=average)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


CONFIGS: dict[str, dict[str, Any]] = {
    "warm-up": {"decay": 0.9},
    "no counter": {"decay": 0.9, "use_num_updates": False},
    "two averages, one tensor copied": {
        "averages": [AverageConfig(decay=0.5), AverageConfig("slow", "constant", 0.99)],
        "copied": ["bias"],
    },
    "on disk": {"durability": "disk"},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_branch_goes_on_as_its_origin(client: EmaClient, run_name: str, case: str) -> None:
    """create_run(from_snapshot=) has the snapshot's weights, counter, step and decays, and the same updates do the same
    to both, bit for bit, although the branch began when the origin had gone on."""
    config, model = CONFIGS[case], nn.Linear(3, 2)
    grown(client, run_name, model, **config)
    at_snapshot = copy.deepcopy(model)
    for step in (6, 7):
        train(model, step)
        client.push(run_name, model, step=step)

    branch = f"{run_name}-branch"
    client.set_decay(run_name, 0.125)
    info = client.create_run(branch, model, from_snapshot=(run_name, "kept"), **config)
    kept = client.snapshots(run_name)[0]
    assert (info.num_updates, info.step, info.version) == (kept.num_updates, kept.step, "1.0")
    assert info.decay != 0.125
    for step in (6, 7):
        train(at_snapshot, step)
        client.push(branch, at_snapshot, step=step)
    for average in info.averages:
        assert equal(client, branch, run_name, average.name)


def test_a_branch_outlives_the_server_and_its_origin(start_server: Callable[..., Any]) -> None:
    """Answered is kept: after kill -9 the branch has its weights, also where its origin is gone."""
    server = start_server()
    with EmaClient(server.url) as client:
        grown(client, "origin", nn.Linear(3, 2))
        client.create_run("branch", nn.Linear(3, 2), from_snapshot=("origin", "kept"))
        client.delete_run("origin")
        before = dict(client.pull("branch"))
    server.kill()
    server.start()
    with EmaClient(server.url) as client:
        after = client.pull("branch")
        assert after.info.step == 5
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_nothing_is_sent_but_names_and_shapes(server: Any, client: EmaClient, run_name: str) -> None:
    """Of the state only the layout travels: the server has received no more bytes of tensors than before."""
    model = nn.Linear(300, 200)
    grown(client, run_name, model, updates=1)

    def received() -> str:
        with server.http() as http:
            lines = http.get("/metrics").text.splitlines()
        return next(line for line in lines if line.startswith("ema_received_bytes_total"))

    before = received()
    client.create_run(f"{run_name}-b", model, from_snapshot=(run_name, "kept"))
    assert received() == before
    assert equal(client, run_name, f"{run_name}-b")


def test_a_checkpoints_state_goes_into_another_run(server: Any, client: EmaClient, run_name: str) -> None:
    """RemoteEma.load_state_dict(branch=True) brings a run to another run's state; that run stays as it is, and both go
    on alike. Without branch= another run's state is refused, with the way."""
    first, model = f"{run_name}-first", nn.Linear(3, 2)
    with RemoteEma(model, 0.9, run=first, url=server.url) as ema:
        train(model, 1)
        ema(model)
        state = ema.state_dict()
    again = copy.deepcopy(model)
    with RemoteEma(nn.Linear(3, 2), 0.9, run=run_name, url=server.url) as branched:
        branched(nn.Linear(3, 2))
        with pytest.raises(UsageError, match="the state is of run") as refused:
            branched.load_state_dict(state)
        assert "branch=True" in refused.value.hint
        branched.load_state_dict(state, branch=True)
        assert equal(client, run_name, first)
        train(again, 2)
        branched(again)
        assert branched.num_updates == 2
        # Its own state, with branch=True as without.
        own = branched.state_dict()
        branched(nn.Linear(3, 2))
        branched.load_state_dict(own, branch=True)
    assert client.run(first).step == 1
    with RemoteEma(model, 0.9, run=first, url=server.url, resume=True) as ema:
        train(model, 2)
        ema(model)
    assert equal(client, run_name, first)
    with (
        RemoteEma(nn.Linear(3, 2), run=f"{run_name}-3", url=server.url) as third,
        pytest.raises(UsageError, match="of which there is no snapshot"),
    ):
        third.load_state_dict({**state, "snapshot": None}, branch=True)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another model": ({"state": nn.Linear(4, 2)}, LayoutMismatch, "do not hold the same tensors: 'weight'"),
    "another counter": ({"use_num_updates": False}, InvalidRequest, "has use_num_updates=False"),
    "another average": ({"averages": [AverageConfig("slow")]}, AverageNotFound, "has no average 'slow'; it has ema"),
    "no such snapshot": ({"from_snapshot": ("{run}", "none")}, SnapshotNotFound, "no snapshot 'none'"),
    "no such run": ({"from_snapshot": ("nobody", "kept")}, RunNotFound, "no run 'nobody'"),
    "a counter as well": ({"num_updates": 3}, UsageError, "with from_snapshot"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_branched_says_why(client: EmaClient, run_name: str, case: str) -> None:
    """Other tensors, another counter, a missing average, snapshot or run: refused by name, and no weights are there."""
    options, kind, words = REFUSED[case]
    grown(client, run_name, nn.Linear(3, 2), updates=1)
    options = {"state": nn.Linear(3, 2), "from_snapshot": (run_name, "kept"), **options}
    options["from_snapshot"] = tuple(word.format(run=run_name) for word in options["from_snapshot"])
    branch = f"{run_name}-branch"
    with pytest.raises(kind, match=words):
        client.create_run(branch, options.pop("state"), **options)
    there = [info for info in client.runs() if info.run == branch]
    assert all(info.status == "awaiting_weights" for info in there)
    if case in ("no such snapshot", "no such run", "a counter as well"):
        assert there == []


def test_a_run_that_has_weights_is_not_branched_over(client: EmaClient, run_name: str) -> None:
    """create_run() never replaces weights: RunExists, or the run as it is; rewind(from_run=) is the way to go back."""
    grown(client, run_name, nn.Linear(3, 2), updates=1)
    branch, model = f"{run_name}-branch", nn.Linear(3, 2)
    client.create_run(branch, model)
    with pytest.raises(RunExists):
        client.create_run(branch, model, from_snapshot=(run_name, "kept"))
    info = client.create_run(branch, model, from_snapshot=(run_name, "kept"), exist_ok=True)
    assert info.step is None
    assert client.rewind(branch, "kept", from_run=run_name).step == 1
    assert equal(client, branch, run_name)


def test_reading_the_origin_needs_a_right(start_server: Callable[..., Any], tmp_path: Path) -> None:
    """Who may write a run but not read the other does not get the other's weights by branching."""
    file = tmp_path / "tokens"
    admin, mine = create_token(file, ["admin"], "*"), create_token(file, ["push", "pull"], "mine*")
    server = start_server("--token-file", str(file))
    with EmaClient(server.url, token=admin) as client:
        grown(client, "secret", nn.Linear(3, 2), updates=1)
    with EmaClient(server.url, token=mine) as client:
        client.create_run("mine", nn.Linear(3, 2))
        with pytest.raises(Forbidden, match="'pull' for run 'secret'"):
            client.rewind("mine", "kept", from_run="secret")
        assert client.run("mine").step is None
