"""Charts of a run: what TensorBoard, wandb and a function are given, and that no training waits for any of them.

Knows the names of the charts, TensorBoard's own reader, and the records of wandb's file. Does not know how the service
measures.
"""

from __future__ import annotations

import logging
import os
import struct
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ema_client import EmaClient, RemoteEma
from ema_client.errors import UsageError
from tests.waiting import measures

#: Every name, and what it has at the end of eight updates of one sender that all were applied.
AT_THE_END = {"ema/decay": 0.5, "ema/num_updates": 8.0, "ema/lag": 0.0, "ema/durable_lag": 0.0}
STEPS = 8


@pytest.fixture(autouse=True)
def measuring(client: EmaClient) -> None:
    """Charts of the distance begin once the service measures."""
    measures(client)


@dataclass
class Drawn:
    """What a function was given, by chart: (step, value) in order; and by which threads."""

    charts: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    threads: set[str] = field(default_factory=set)

    def __call__(self, values: dict[str, float], step: int) -> None:
        self.threads.add(threading.current_thread().name)
        for name, value in values.items():
            self.charts[name].append((step, value))


def _train(ema: RemoteEma, model: nn.Module, steps: int = STEPS) -> None:
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        ema(model)
        # Of updates that come without pause the service measures few, or none.
        time.sleep(0.1)


def _check(charts: dict[str, list[tuple[int, float]]], *, first: int = 1, last: int = STEPS) -> None:
    """All charts are there, within the training's steps, each step once; the end is what the run is."""
    assert set(charts) == {*AT_THE_END, "ema/distance"}
    for name, points in charts.items():
        steps = [step for step, _ in points]
        assert set(steps) <= set(range(first, last + 1)), name
        assert name == "ema/lag" or steps == sorted(set(steps)), name
    for name, value in AT_THE_END.items():
        assert charts[name][-1] == (last, value - STEPS + last if name == "ema/num_updates" else value), name
    assert all(value > 0 for _, value in charts["ema/distance"])


def test_a_function_is_given_steps_and_values(client: EmaClient, run_name: str) -> None:
    """By a thread of its own; a training that goes on draws nothing of before; a copy leaves the function behind."""
    model, first, then = nn.Linear(3, 2), Drawn(), Drawn()
    with RemoteEma(model, 0.5, False, run=f"{run_name}-off", client=client, log_to=Drawn()) as ema:
        _train(ema, model, 1)
    with RemoteEma(model, 0.5, run=run_name, client=client, log_to=first) as ema:
        _train(ema, model)
        assert ema.__getstate__()["_setup"].log_to is None
    assert first.threads == {f"ema-charts-{run_name}"}
    _check(first.charts)

    with RemoteEma(model, 0.5, run=run_name, client=client, resume=True, log_to=then) as ema:
        _train(ema, model)
    _check(then.charts, first=9, last=16)
    assert not [thread for thread in threading.enumerate() if thread.name == f"ema-charts-{run_name}"]


def test_no_training_waits_for_a_logger_or_ends_by_it(
    client: EmaClient, run_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Updates are applied while a function hangs; what it raises is told once, and later values are tried."""
    model, hanging, going_on = nn.Linear(3, 2), threading.Event(), threading.Event()
    calls = []

    def hangs_then_raises(values: dict[str, float], step: int) -> None:
        calls.append((values, step))
        hanging.set()
        going_on.wait(30)
        raise SystemError("the tracker is down")

    ema = RemoteEma(model, 0.5, run=run_name, client=client, log_to=hangs_then_raises)
    _train(ema, model, 1)
    assert hanging.wait(30)
    _train(ema, model)
    ema.flush(30)
    assert len(calls) == 1
    going_on.set()
    with caplog.at_level(logging.WARNING, "ema_client"):
        ema.close()
    assert client.run(run_name).step == STEPS + 1
    assert len(calls) > 2
    assert [record.getMessage() for record in caplog.records] == [
        f"run {run_name!r}: its charts could not be drawn: SystemError: the tracker is down"
    ]


def test_what_names_no_logger_is_refused(
    client: EmaClient, run_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is made; a package that is missing is named."""
    for log_to in ("mlflow", "", 3):
        with pytest.raises(UsageError, match=r"log_to=.* is unknown"):
            RemoteEma(nn.Linear(2, 1), run=run_name, client=client, log_to=log_to)  # type: ignore[arg-type]
    # Only a folder of its name is there, such as wandb's own beside a training.
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    (tmp_path / "tensorboard").mkdir()
    with pytest.raises(UsageError, match="needs tensorboard") as refusal:
        RemoteEma(nn.Linear(2, 1), run=run_name, client=client, log_to="tensorboard:here")
    assert refusal.value.hint == "pip install tensorboard"
    assert run_name not in {info.run for info in client.runs()}


# --- TensorBoard ----------------------------------------------------------------------------------------------------


def _tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All charts of a folder, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [(point.step, point.value) for point in read.Scalars(name)] for name in read.Tags()["scalars"]}


_WITHOUT_CLOSE = """
import sys, torch
from ema_client import RemoteEma

model = torch.nn.Linear(3, 2)
ema = RemoteEma(model, 0.5, run=sys.argv[1], log_to="tensorboard:training")
for _ in range(8):
    with torch.no_grad():
        model.weight.add_(1.0)
    ema(model)
"""


def test_tensorboard_of_a_training_and_of_a_watch(client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """The end of a program draws the last values; ``ema watch`` draws the same later, as it tells the run's past."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install -e '.[integrations]'")
    env = {**os.environ, "EMA_SERVICE_URL": client.url}
    subprocess.run([sys.executable, "-c", _WITHOUT_CLOSE, run_name], cwd=tmp_path, env=env, check=True, timeout=60)
    drawn = _tensorboard(tmp_path / "training")
    _check(drawn)

    command = [sys.executable, "-m", "ema_client", "watch", run_name, "--once", "--log-to", "tensorboard"]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=60, capture_output=True)
    watched = _tensorboard(tmp_path / "runs" / run_name)
    assert set(watched) == set(drawn) - {"ema/lag"}
    assert all(watched[name][-1] == points[-1] for name, points in drawn.items() if name in watched)
    command[-1] = "nowhere"
    refused = subprocess.run(command, cwd=tmp_path, env=env, timeout=60, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "--log-to 'nowhere' is unknown" in refused.stderr


# --- wandb ----------------------------------------------------------------------------------------------------------

_WITH_WANDB = """
import sys, time, torch, wandb
from ema_client import RemoteEma

url, name = sys.argv[1:]
model = torch.nn.Linear(3, 2)
own = wandb.init(project="training", name="training")
drawn = RemoteEma(model, 0.5, run=name, url=url, log_to="wandb")
apart = RemoteEma(model, 0.5, run=name + "-apart", url=url, log_to="wandb:apart")
for step in (10, 20, 30, 40):
    own.log({"loss": 1 / step}, step=step)
    for ema in (drawn, apart):
        for _ in range(2):
            ema(model)
    time.sleep(0.4)
    own.log({"accuracy": step}, step=step)
drawn.close()
apart.close()
own.finish()
"""


def _wandb(path: Path) -> tuple[list[Any], str]:
    """The records of a file of wandb's, which are those of a log of LevelDB, and the project of its run."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for data in _levels(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        records.append(record)
    return records, next(record.run.project for record in records if record.WhichOneof("record_type") == "run")


def _levels(data: bytes) -> Iterator[bytes]:
    """The records of a log of LevelDB, which has them in pieces of blocks of 32 KiB; wandb's begins with 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        left_in_block = 32768 - at % 32768
        if left_in_block < 7 or kind == 0:
            at += left_in_block
            continue
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the only piece, or the last
            yield whole
            whole = b""


@pytest.mark.soak
@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed: pip install -e '.[integrations]'")
def test_wandb_in_the_runs_of_a_program_and_in_one_of_its_own(client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """No row that the program logs by its own step is lost; the charts' axis is the trainer's step."""
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}
    command = [sys.executable, "-c", _WITH_WANDB, client.url, run_name]
    done = subprocess.run(command, cwd=tmp_path, env=env, timeout=100, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {}
    for path in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        records, project = _wandb(path)
        metrics = {
            record.metric.glob_name: record.metric.step_metric for record in records if record.HasField("metric")
        }
        assert metrics["ema/*"] == "ema/step"
        rows = [
            {"/".join(item.nested_key) or item.key: float(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        found[project] = rows
    own, apart = found["training"], found["apart"]
    assert {row["_step"]: (row.get("loss"), row.get("accuracy")) for row in own if "loss" in row} == {
        step: (1 / step, step) for step in (10, 20, 30, 40)
    }
    assert max(row["ema/step"] for row in own if "ema/step" in row) == 8.0
    by_step = {row["ema/step"]: row for row in apart if "ema/num_updates" in row}
    assert all(step == row["ema/num_updates"] for step, row in by_step.items())
    assert max(by_step) == 8.0
