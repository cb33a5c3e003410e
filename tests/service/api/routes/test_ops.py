"""What whoever runs the server asks: liveness, readiness, metrics.

Knows Prometheus' text format. Does not know who counts.
"""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from ema_client import EmaClient, __version__
from ema_service.api.app import create_app
from ema_service.metrics import MOST_RUNS, Metrics, Pulse
from ema_service.settings import Settings
from ema_service.storage.store import Store
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

MakeRun = Callable[..., "PlainRun"]

OPERATIONS = Path(__file__).resolve().parents[4] / "ema_service" / "OPERATIONS.md"
TENSORS = {"w": torch.zeros(1000)}
#: What --device auto picks.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def values(run: PlainRun) -> dict[str, float]:
    """``name{label}`` -> value."""
    families = text_string_to_metric_families(run.http.get("/metrics").text)
    return {
        "".join([sample.name, *(f"{{{value}}}" for value in sample.labels.values())]): sample.value
        for family in families
        for sample in family.samples
    }


def test_healthz_and_readyz(server: ServerProcess) -> None:
    """Liveness and readiness are 200; readiness names the device."""
    with server.http() as http:
        assert (http.get("/healthz").status_code, http.get("/healthz").json()) == (200, {"status": "alive"})
        assert http.get("/readyz").json() == {"status": "ready", "device": DEVICE}


def documented() -> set[str]:
    """The names in the first column of the table of metrics."""
    section = OPERATIONS.read_text().partition("## Metrics\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*`) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)(?:\{[\w,]*\})?`", cell)}


def test_metrics_are_those_of_the_table(server: ServerProcess, plain_run: MakeRun) -> None:
    """The metrics that a server answers are exactly those of the table in OPERATIONS.md, each with a help text."""
    run = plain_run(server, TENSORS)
    run.push(1, TENSORS)
    answer = run.http.get("/metrics")
    # For each counter the library adds when it was made; that is a name of its own only in this old format.
    families = [f for f in text_string_to_metric_families(answer.text) if not f.name.endswith("_created")]

    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert {f.name + "_total" * (f.type == "counter") for f in families} == documented()
    assert all(family.documentation for family in families)


def test_promtool_finds_nothing(server: ServerProcess, plain_run: MakeRun) -> None:
    """Prometheus' own linter has nothing to say of the metrics' names and texts."""
    if not (promtool := shutil.which("promtool")):
        pytest.skip("promtool (package prometheus) is not installed: names of metrics are not linted")
    run = plain_run(server, TENSORS)
    run.push(1, TENSORS)
    text = run.http.get("/metrics").text
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_metrics_of_a_run(server: ServerProcess, plain_run: MakeRun) -> None:
    """Each run tells its step, counter, lag, status and when it moved; routes and phases are timed."""
    run = plain_run(server, TENSORS, decay=0.5)
    run.push(7, {"w": torch.ones(1000)})
    run.pull()
    after, info = values(run), run.info()
    assert after[f"ema_run_distance{{{run.name}}}"] == pytest.approx(2 / 11)
    assert after[f"ema_run_step{{{run.name}}}"] == 7
    assert after[f"ema_run_num_updates{{{run.name}}}"] == 1
    assert after[f"ema_run_durable_lag_steps{{{run.name}}}"] == 0
    assert after[f"ema_run_status{{{run.name}}}{{ready}}"] == 1
    assert after[f"ema_run_updated_timestamp_seconds{{{run.name}}}"] == info["updated_at"]
    for phase in ("wait", "receive", "commit"):
        assert after[f"ema_push_seconds_count{{{phase}}}"] >= 1
    for phase in ("wait", "send"):
        assert after[f"ema_pull_seconds_count{{{phase}}}"] >= 1
    assert after["ema_requests_total{PUT}{/v1/runs/{run}/updates/{step}}{200}"] >= 1
    assert after["ema_request_seconds_count{PUT}{/v1/runs/{run}/updates/{step}}"] >= 1
    assert 0 < after["ema_memory_bytes"] < after["ema_memory_limit_bytes"]
    assert 0 < after["ema_disk_free_bytes"] < after["ema_disk_bytes"]
    assert 1 <= after["ema_connections"] < after["ema_connections_limit"]


def test_metrics_are_made_off_the_event_loop() -> None:
    """What looks at the whole server runs on a thread of its own: many runs, or a slow disk, hold up no update."""
    app, threads = create_app(Settings(data_dir=None)), []
    app.state.metrics.watch("probe", "Who asks.", lambda: threads.append(threading.current_thread().name) or 0)
    app.state.metrics.watch("gone", "Of a disk that is gone.", lambda: Path("/no/such/disk").stat().st_size)
    with TestClient(app, base_url="http://127.0.0.1") as http:
        text = http.get("/metrics").raise_for_status().text
    assert "\ngone NaN\n" in text
    assert [name.rpartition("_")[0] for name in threads] == ["ema-report"]


def test_metrics_of_a_snapshot_store_whose_catalog_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for the store cannot be counted then, and is told as NaN, beside every other metric; the store's fault
    is told as well."""

    def fails(_: Store) -> list[Any]:
        raise sqlite3.OperationalError("disk I/O error")

    (tmp_path / "objects").mkdir()
    monkeypatch.setattr(Store, "snapshots_here", fails)
    monkeypatch.setattr(Store, "removals", fails)
    app = create_app(Settings(data_dir=tmp_path / "data", snapshot_store=str(tmp_path / "objects")))
    with TestClient(app, base_url="http://127.0.0.1") as http:
        wait_until(lambda: "\nema_snapshot_store_failing 1.0\n" in http.get("/metrics").text, "the fault in metrics")
        text = http.get("/metrics").raise_for_status().text
    assert "\nema_snapshots_waiting NaN\n" in text
    assert "\nema_snapshot_removals_waiting NaN\n" in text
    assert "\nema_runs 0.0\n" in text


def test_series_of_runs_are_bounded() -> None:
    """Of more runs than have series of their own, the degraded ones and the newest are told, and the others counted;
    names that whoever asks may not read are left out."""
    runs = [Pulse(f"run-{n}", "ready", float(n), n, n, None, 4) for n in range(2 * MOST_RUNS)]
    runs[3] = replace(runs[3], status="degraded")
    text = Metrics().render(runs).decode()
    told = set(re.findall(r'^ema_run_step\{run="(.*?)"\}', text, re.MULTILINE))
    assert told == {"run-3", *(f"run-{n}" for n in range(MOST_RUNS + 1, 2 * MOST_RUNS))}
    assert f"ema_runs {2 * MOST_RUNS}.0" in text
    assert f"ema_runs_left_out {MOST_RUNS}.0" in text
    assert "ema_degraded_runs 1.0" in text
    text = Metrics().render(runs, lambda run: run == "run-5").decode()
    assert re.findall(r'^ema_run_step\{run="(.*?)"\}', text, re.MULTILINE) == ["run-5"]
    assert f"ema_runs {2 * MOST_RUNS}.0" in text


def test_server_tells_what_it_is(server: ServerProcess, plain_run: MakeRun) -> None:
    """Version, device, memory and disk beside their limits; without tokens everyone may do everything."""
    plain_run(server, TENSORS)
    with EmaClient(server.url) as client:
        info = client.server()
    assert (info.name, info.version, info.device) == ("ema-service", __version__, DEVICE)
    assert info.scopes == ("train", "push", "pull", "snapshot", "admin")
    assert info.runs
    assert info.time
    assert abs(info.time - time.time()) < 60
    for part, whole in (
        (info.memory_bytes, info.memory_limit_bytes),
        (info.disk_free_bytes, info.disk_total_bytes),
        (info.data_dir_bytes, info.disk_total_bytes),
    ):
        assert part is not None
        assert whole is not None
        assert 0 < part < whole
    assert (info.durability, info.torch) == ("process", torch.__version__)


def test_metrics_count(server: ServerProcess, plain_run: MakeRun) -> None:
    """Updates by result, errors by code, bytes in and out and runs are counted as they happen."""
    before = values(plain_run(server))
    run = plain_run(server, TENSORS)
    run.push(1, TENSORS)
    run.push(1, TENSORS)
    run.push(0, TENSORS)
    run.pull()
    after = values(run)

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert grown("ema_updates_total{applied}") == 1
    assert grown("ema_updates_total{repeated}") == 1
    assert grown("ema_errors_total{stale_step}") == 1
    assert grown("ema_received_bytes_total") == 3 * 4000
    assert grown("ema_sent_bytes_total") == len(run.pull().content)
    assert grown("ema_push_seconds_count{commit}") == 2
    assert grown("ema_runs") == 1
    assert grown("ema_shadow_bytes") == 4000


def test_budgets_end_as_they_were(server: ServerProcess, plain_run: MakeRun) -> None:
    """What pushes and pulls took of the budgets is given back."""
    run = plain_run(server, TENSORS)
    before = values(run)
    run.push(1, TENSORS)
    run.push(0, TENSORS)
    run.pull()

    def is_back() -> bool:
        # What tests before left staged on the shared server is not of this one.
        now = values(run)
        return all(now[name] <= before[name] for name in ("ema_staging_bytes", "ema_frozen_bytes"))

    wait_until(is_back, "the budgets to be as they were")


def test_metrics_know_deleted_runs(server: ServerProcess, plain_run: MakeRun) -> None:
    """A deleted run counts no longer."""
    run = plain_run(server, TENSORS)
    before = values(run)
    run.http.delete(run.path)
    after = values(run)

    assert before["ema_runs"] - after["ema_runs"] == 1
    assert before["ema_shadow_bytes"] - after["ema_shadow_bytes"] == 4000
