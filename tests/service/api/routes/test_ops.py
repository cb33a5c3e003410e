"""What whoever runs the server asks: liveness, readiness, metrics.

Knows Prometheus' text format. Does not know who counts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

MakeRun = Callable[..., "PlainRun"]

ROOT = Path(__file__).resolve().parents[4]
NAMES = {
    "ema_updates",
    "ema_watchers",
    "ema_errors",
    "ema_events",
    "ema_pushes",
    "ema_received_bytes",
    "ema_sent_bytes",
    "ema_commit_seconds",
    "ema_runs",
    "ema_degraded_runs",
    "ema_shadow_bytes",
    "ema_partial_updates",
    "ema_slow_readers",
    "ema_staging_bytes",
    "ema_waiting_pushes",
    "ema_waiting_readers",
    "ema_frozen_bytes",
    "ema_idle_bytes",
    "ema_memory_bytes",
    "ema_memory_limit_bytes",
}
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


def test_metrics_have_their_names(server: ServerProcess) -> None:
    """The metrics are exactly these, each with a help text, in Prometheus' own content type."""
    with server.http() as http:
        answer = http.get("/metrics")
    # For each counter the library adds when it was made; that is a name of its own only in this old format.
    families = [f for f in text_string_to_metric_families(answer.text) if not f.name.endswith("_created")]

    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert {family.name for family in families} == NAMES
    assert all(family.documentation for family in families)


def test_metrics_are_documented() -> None:
    """Each metric is named in the server's documentation."""
    designs = (ROOT / "ema_service").rglob("DESIGN.md")
    documents = [ROOT / "README.md", *designs, ROOT / "client" / "PROTOCOL.md"]
    text = "".join(document.read_text() for document in documents)

    assert [name for name in sorted(NAMES) if name not in text] == []


def test_metrics_count(server: ServerProcess, plain_run: MakeRun) -> None:
    """Updates by result, errors by code, bytes in and out and runs are counted as they happen; budgets end at 0."""
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
    assert grown("ema_commit_seconds_count") == 2
    assert grown("ema_runs") == 1
    assert grown("ema_shadow_bytes") == 4000
    assert (after["ema_staging_bytes"], after["ema_frozen_bytes"]) == (0, 0)


def test_metrics_know_deleted_runs(server: ServerProcess, plain_run: MakeRun) -> None:
    """A deleted run counts no longer."""
    run = plain_run(server, TENSORS)
    before = values(run)
    run.http.delete(run.path)
    after = values(run)

    assert before["ema_runs"] - after["ema_runs"] == 1
    assert before["ema_shadow_bytes"] - after["ema_shadow_bytes"] == 4000
