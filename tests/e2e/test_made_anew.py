"""A run that never had weights gives way to its creator, whatever broke off in between, and to one creator whole.

Knows how creations fail and what is there afterwards. Does not know how a run is forgotten
(tests/service/runs/test_registry.py).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor, nn

import ema_client.client as module
from ema_client import EmaClient, RemoteEma
from ema_client.errors import (
    AwaitingWeights,
    EmaError,
    Forbidden,
    LayoutMismatch,
    NonFinite,
    RunExists,
    RunNotFound,
    Superseded,
)
from ema_client.http.retry import RetryPolicy
from ema_client.lifecycle import Lifecycle
from ema_client.protocol import RunConfig, TensorSpec
from ema_client.training.joining import Resume
from ema_client.training.plan import ShardedPlan
from ema_service.tokens import create_token
from tests.forked import Forked
from tests.waiting import wait_until

_HALFWAY = Path(__file__).parent / "processes" / "halfway.py"
_ONCE = RetryPolicy(attempts=1)
_SECONDS = 30.0
#: By then a request of another thread has come to the server and waits there.
_LISTENING_SECONDS = 0.3
#: More than sockets hold: a sender of so many bytes is in the middle while the server has not read on.
_WIDE = 1 << 22


@pytest.fixture
def client(server: Any) -> Iterator[EmaClient]:
    with EmaClient(server.url) as made:
        yield made


def model(width: int = 3, value: float = 1.0) -> nn.Linear:
    made = nn.Linear(width, 2, bias=False)
    nn.init.constant_(made.weight, value)
    return made


def of(client: EmaClient, run: str) -> tuple[float, float]:
    """The decay of a run and its first weight: whose the run is."""
    return round(client.run(run).decay, 6), float(next(iter(client.pull(run).values())).flatten()[0])


@pytest.fixture
def in_between(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Have something done once between a creation's two requests: the run is there and its weights are not sent."""

    def arrange(act: Callable[[], object]) -> None:
        whole = module.body_of

        def body(*words: Any) -> module.Body:
            monkeypatch.setattr(module, "body_of", whole)
            act()
            return whole(*words)

        monkeypatch.setattr(module, "body_of", body)

    return arrange


@pytest.fixture
def on_the_way(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Have something done once in the middle of the next body that this process sends."""

    def arrange(act: Callable[[], object]) -> None:
        whole = module.body_of

        def body(*words: Any) -> module.Body:
            monkeypatch.setattr(module, "body_of", whole)
            acted = threading.Event()

            def moved(_: int) -> None:
                if not acted.is_set():
                    acted.set()
                    act()

            return replace(whole(*words), moved=moved)

        monkeypatch.setattr(module, "body_of", body)

    return arrange


# --- what failed, mended --------------------------------------------------------------------------------------------

#: What the trainer is that comes back: the options of RemoteEma.
MENDED: dict[str, dict[str, Any]] = {
    "another decay": {"decay": 0.5},
    "no warm-up": {"use_num_updates": False},
    "other averages": {"averages": [module.AverageConfig("slow")]},
    "another layout": {"model": model(5)},
    "a counter of steps": {"decay_per": "step"},
}


@pytest.mark.parametrize("resume", [False, True, "auto"])
@pytest.mark.parametrize("case", MENDED)
def test_mended_model_takes_its_run(server: Any, client: EmaClient, run_name: str, case: str, resume: Resume) -> None:
    """A constructor that met a NaN leaves no obstacle: the mended model has the run, as it means it, and trains."""
    with pytest.raises(NonFinite):
        RemoteEma(model(value=float("nan")), 0.9, run=run_name, url=server.url)
    with pytest.raises(AwaitingWeights):
        client.pull(run_name)
    options = {"model": model(), "decay": 0.9, **MENDED[case]}
    mended = options["model"]
    with RemoteEma(run=run_name, url=server.url, resume=resume, **options) as ema:
        ema(mended)
        ema.flush()
        info = client.run(run_name)
    assert (round(info.decay, 6), info.step, info.status) == (options["decay"], 1, "ready")
    assert info.averages[0].name == ("slow" if case == "other averages" else "ema")
    assert client.layout(run_name).layout[0].shape == tuple(mended.weight.shape)
    with pytest.raises(RunExists):
        RemoteEma(mended, 0.25, run=run_name, url=server.url)


def test_push_token_suffices(start_server: Callable[..., Any], tmp_path: Path, in_between: Callable[..., None]) -> None:
    """A token that may push, and neither read nor delete, takes its run again; another's pattern does not fit. Such a
    trainer is told of another that was quicker."""
    file = tmp_path / "tokens"
    mine, other = create_token(file, ["push"], "mine*"), create_token(file, ["push"], "other*")
    admin = create_token(file, ["admin"], "*")
    url = start_server("--token-file", str(file)).url
    with EmaClient(url, token=mine) as client, pytest.raises(NonFinite):
        RemoteEma(model(value=float("nan")), 0.9, run="mine", client=client)
    with EmaClient(url, token=other) as client, pytest.raises(Forbidden):
        client.create_run("mine", model(), decay=0.25)
    with EmaClient(url, token=mine) as client:
        RemoteEma(model(), 0.5, run="mine", client=client).close()
        with pytest.raises(RunExists):
            client.create_run("mine", model(), decay=0.25)
    with EmaClient(url, token=admin) as client:
        assert of(client, "mine") == (0.5, 1.0)
        in_between(lambda: client.create_run("mine-2", model(value=2.0)))
        with EmaClient(url, token=mine) as pushing, pytest.raises(RunExists, match="is at step None"):
            pushing.create_run("mine-2", model())
        assert of(client, "mine-2")[1] == 2.0


def test_failed_branch(client: EmaClient, run_name: str) -> None:
    """A branch that was refused for another layout is made anew: as a branch that fits, or with weights of its own."""
    client.create_run(run_name, model(value=2.0), decay=0.9)
    client.snapshot(run_name, "kept")
    branch = f"{run_name}-branch"
    for mended in ({"state": model(), "from_snapshot": (run_name, "kept")}, {"state": model(4), "decay": 0.5}):
        with pytest.raises(LayoutMismatch):
            client.create_run(branch, model(5), from_snapshot=(run_name, "kept"))
        client.create_run(branch, **mended)  # type: ignore[arg-type]
        assert of(client, branch) == ((0.9, 2.0) if "from_snapshot" in mended else (0.5, 1.0))
        client.delete_run(branch)


# --- what broke off -------------------------------------------------------------------------------------------------


def test_ctrl_c(server: Any, client: EmaClient, run_name: str, on_the_way: Callable[..., None]) -> None:
    """Ctrl-C in the middle of the initial weights leaves a name that is free at once."""
    on_the_way(partial(os.kill, os.getpid(), signal.SIGINT))
    with EmaClient(server.url) as ours:
        with pytest.raises(KeyboardInterrupt):
            RemoteEma(model(_WIDE), 0.9, run=run_name, client=ours)
        assert client.run(run_name).status == "awaiting_weights"
        RemoteEma(model(), 0.5, run=run_name, client=ours).close()
    assert of(client, run_name) == (0.5, 1.0)


def test_killed_trainer(server: Any, client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """So does a trainer that is killed in the middle."""
    log = tmp_path / "log"
    log.touch()
    assert Forked([str(_HALFWAY), server.url, run_name, "0.9"], log).wait(_SECONDS) == -signal.SIGKILL, log.read_text()
    assert client.run(run_name).status == "awaiting_weights"
    RemoteEma(model(), 0.5, run=run_name, url=server.url, resume="auto").close()
    assert of(client, run_name) == (0.5, 1.0)


@pytest.mark.parametrize("durability", ["memory", "process", "disk"])
def test_outlives_the_server(start_server: Callable[..., Any], durability: Any) -> None:
    """After kill -9 the run is the one that was made last; writers are counted on, so that no number is given twice."""
    server = start_server()
    with EmaClient(server.url) as client:
        client.declare_run(RunConfig("r", (TensorSpec("w", (3,), "F32"),)))
        assert [client.attach("r"), client.attach("r")] == [1, 2]
        made = client.create_run("r", model(), decay=0.5, durability=durability)
        assert made.writer == 2
        client.declare_run(RunConfig("empty", (TensorSpec("w", (3,), "F32"),)))
        client.declare_run(RunConfig("empty", (TensorSpec("w", (4,), "F32"),), durability=durability))
    server.kill()
    server.start()
    with EmaClient(server.url) as client:
        assert {info.run for info in client.runs()} == {"r", "empty"}
        assert (client.run("r").created_at, client.attach("r")) == (made.created_at, 3)
        assert client.layout("empty").layout[0].shape == (4,)
        assert durability == "memory" or of(client, "r") == (0.5, 1.0)


# --- sharded ranks --------------------------------------------------------------------------------------------------


class Ranks:
    """Two ranks of a sharded trainer, each of which has half of a tensor; started as ``group``."""

    def __init__(self, client: EmaClient, run: str, group: str, decay: float) -> None:
        self.config = RunConfig(run, (TensorSpec("w", (4,), "F32"),), decay=decay)
        self._client = client
        self._group = group
        self._values: list[Any] = [None, None]
        self._barrier = threading.Barrier(2, timeout=_SECONDS)

    def _gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def create(self, halves: tuple[float, float]) -> list[type[EmaError] | None]:
        """Make the run on both ranks; what each of them raised."""

        def one(rank: int) -> type[EmaError] | None:
            boxes = {"w": (((2 * rank, 2 * rank + 2),),)}
            plan = ShardedPlan(self.config.layout, rank, 2, self._group, boxes, partial(self._gather, rank))
            initial: Callable[[], Mapping[str, Tensor]] = lambda: {"w": torch.full((2,), halves[rank])}  # noqa: E731
            try:
                plan.create(self._client, self.config, initial)
            except EmaError as fault:
                return type(fault)
            return None

        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(one, range(2)))


def test_sharded_ranks(client: EmaClient, run_name: str) -> None:
    """A NaN on one rank, or a rank that died with its part unsent: the next start has the run, with its own decay; a
    part of an earlier start is not taken into it."""
    nan = float("nan")
    assert NonFinite in Ranks(client, run_name, "first", 0.9).create((1.0, nan))
    died = client.declare_run(RunConfig(run_name, (TensorSpec("w", (4,), "F32"),), decay=0.8))
    part = partial(client.send_weights_part, run_name, of=2, group="second", created_at=died.created_at)
    assert part({"w": torch.full((2,), 7.0)}, slices={"w": [((0, 2),)]}, part=0) is False

    assert Ranks(client, run_name, "third", 0.5).create((1.0, 2.0)) == [None, None]
    with pytest.raises(RunExists, match="made anew by another trainer"):
        part({"w": torch.full((2,), 7.0)}, slices={"w": [((2, 4),)]}, part=1)
    assert of(client, run_name)[0] == 0.5
    assert client.pull(run_name)["w"].tolist() == [1.0, 1.0, 2.0, 2.0]


def test_every_rank_is_told(client: EmaClient, run_name: str) -> None:
    """Where another trainer has the run, both ranks raise RunExists."""
    client.create_run(run_name, model())
    assert Ranks(client, run_name, "first", 0.5).create((1.0, 2.0)) == [RunExists, RunExists]


# --- two creators ---------------------------------------------------------------------------------------------------


def test_weights_go_to_the_run_they_were_made_for(
    client: EmaClient, run_name: str, in_between: Callable[..., None]
) -> None:
    """A creator whose run another took over between its two requests is told, and its weights are not taken."""
    others = RunConfig(run_name, (TensorSpec("weight", (2, 3), "F32"),), decay=0.5)
    in_between(lambda: client.declare_run(others))
    with pytest.raises(RunExists, match="made anew by another trainer"):
        client.create_run(run_name, model(), decay=0.9)
    assert (client.run(run_name).status, round(client.run(run_name).decay, 6)) == ("awaiting_weights", 0.5)
    client.create_run(run_name, model(value=2.0), decay=0.5)
    assert of(client, run_name) == (0.5, 2.0)


def test_who_has_the_run_may_train(
    server: Any, client: EmaClient, run_name: str, in_between: Callable[..., None]
) -> None:
    """A trainer that found the run without weights, and made it, is not fenced off by one that attached meanwhile."""
    client.declare_run(RunConfig(run_name, (TensorSpec("weight", (2, 3), "F32"),), decay=0.5))
    in_between(lambda: client.attach(run_name))
    with RemoteEma(model(), 0.9, run=run_name, url=server.url, resume="auto") as ema:
        ema(model())
        ema.flush()
        assert client.run(run_name).step == 1


def test_branch_goes_to_the_run_it_was_made_for(
    client: EmaClient, run_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is a creator that branches from a snapshot."""
    client.create_run(run_name, model(value=2.0), decay=0.9)
    client.snapshot(run_name, "kept")
    branch, rewind = f"{run_name}-branch", Lifecycle.rewind

    def late(self: Lifecycle, *words: Any) -> Any:
        client.declare_run(RunConfig(branch, (TensorSpec("weight", (2, 3), "F32"),), decay=0.5))
        return rewind(self, *words)

    monkeypatch.setattr(Lifecycle, "rewind", late)
    with pytest.raises(RunExists, match="made anew by another trainer"):
        client.create_run(branch, model(), from_snapshot=(run_name, "kept"))
    assert client.run(branch).status == "awaiting_weights"


@pytest.mark.parametrize("breaks", [False, True])
def test_who_sends_has_the_run(
    server: Any, client: EmaClient, run_name: str, on_the_way: Callable[..., None], breaks: bool
) -> None:
    """While initial weights arrive nobody takes the run away; where they break off it is free, where they come whole
    it is theirs."""
    sending, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        sending.set()
        go_on.wait(_SECONDS)
        if breaks:
            raise ValueError("broken off")

    on_the_way(wait)
    with ThreadPoolExecutor(1) as thread, EmaClient(server.url, retry=_ONCE) as other:
        first = thread.submit(client.create_run, run_name, model(_WIDE), decay=0.9)
        assert sending.wait(_SECONDS)
        with pytest.raises(Superseded, match="initial weights are being received") as told:
            other.create_run(run_name, model(), decay=0.5)
        assert "choose another name" in told.value.hint
        go_on.set()
        if breaks:
            with pytest.raises(ValueError, match="broken off"):
                first.result(_SECONDS)
    with EmaClient(server.url) as patient:
        if breaks:
            patient.create_run(run_name, model(), decay=0.5)
        else:
            with pytest.raises(RunExists):
                patient.create_run(run_name, model(), decay=0.5)
    assert of(client, run_name) == ((0.5, 1.0) if breaks else (0.9, 1.0))


@pytest.mark.parametrize("resume", [False, "auto"])
def test_two_creators_at_once(server: Any, client: EmaClient, run_name: str, resume: Resume) -> None:
    """Of two trainers that make one run, with other configurations and weights, one has it whole and can train; the
    other is told, and what the server had taken for its weights goes back."""
    staged = _staged(server)
    per: dict[float, Any] = {0.25: "update", 0.75: "step"}
    barrier = threading.Barrier(2, timeout=_SECONDS)

    def told(run: str, decay: float) -> EmaError | None:
        mine = model(1 << 14, value=decay)
        barrier.wait()
        try:
            with RemoteEma(mine, decay, run=run, url=server.url, resume=resume, decay_per=per[decay]) as ema:
                ema(mine)
        except EmaError as fault:
            return fault
        return None

    for run in (f"{run_name}-{turn}" for turn in range(6)):
        with ThreadPoolExecutor(2) as threads:
            faults = dict(zip(per, threads.map(partial(told, run), per), strict=True))
        [winner] = [decay for decay, fault in faults.items() if fault is None]
        assert of(client, run) == (winner, winner)
        assert (client.run(run).decay_per, client.run(run).step) == (per[winner], 1)
    wait_until(lambda: _staged(server) == staged, "the memory of pushes that came too late")


def _staged(server: Any) -> float:
    """Bytes of pushes in flight."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("ema_staging_bytes ")))


# --- who waits for the run ------------------------------------------------------------------------------------------


def test_who_waits_sees_the_new_run(server: Any, client: EmaClient, run_name: str) -> None:
    """A watcher and a reader that wait for the first version of a run get that of the run that was made anew; only a
    deletion ends the watching."""
    client.declare_run(RunConfig(run_name, (TensorSpec("w", (3,), "F32"),)))
    with ThreadPoolExecutor(1) as thread, EmaClient(server.url) as evaluator:
        events = evaluator.watch(run_name, kinds={"version", "run_deleted"}, timeout=_SECONDS)
        first = thread.submit(next, events)
        time.sleep(_LISTENING_SECONDS)
        client.create_run(run_name, model(value=2.0), decay=0.5, step=1)
        assert (first.result(_SECONDS).kind, first.result().step) == ("version", 1)
        client.delete_run(run_name)
        assert next(events).kind == "run_deleted"
    with pytest.raises(RunNotFound):
        client.run(run_name)

    client.declare_run(RunConfig(run_name, (TensorSpec("w", (3,), "F32"),)))
    with ThreadPoolExecutor(1) as thread, EmaClient(server.url) as evaluator:
        pulled = thread.submit(evaluator.pull, run_name, min_step=1, wait=_SECONDS)
        time.sleep(_LISTENING_SECONDS)
        client.create_run(run_name, model(value=2.0), decay=0.5, step=1)
        assert pulled.result(_SECONDS).info.step == 1
