"""What a gateway and a coordinator tell Prometheus: the metrics of the tables in OPERATIONS.md, and what they count.

Knows Prometheus' text format. Does not know how bodies are cut, or how a decision is made.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from ema_client import EmaClient
from ema_service.cluster import Record, Refusal, Report, Resolve, Term, Ticket, Vote
from ema_service.cluster.counting import CoordinatorMetrics, TalkCount
from ema_service.cluster.messages import Proposal
from tests.service.cluster.launched import Launched
from tests.waiting import wait_until

OPERATIONS = Path(__file__).resolve().parents[3] / "ema_service" / "OPERATIONS.md"
STATE = {"w": torch.ones(8, 4), "v": torch.zeros(6)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    folder = tmp_path_factory.mktemp("cluster")
    found = Launched(folder / "all", "--local", "2").start()
    yield found
    found.end()


def documented(program: str) -> set[str]:
    """The names in the first column of a program's table of metrics."""
    table = OPERATIONS.read_text().partition(f"| {program} metric | |\n")[2].partition("\n\n")[0]
    cells = [line.split(" | ")[0] for line in table.splitlines()]
    return {name for cell in cells for name in re.findall(r"`(\w+)(?:\{[\w,]*\})?`", cell)}


def families(text: str) -> set[str]:
    found = [f for f in text_string_to_metric_families(text) if not f.name.endswith("_created")]
    assert all(family.documentation for family in found)
    return {f.name + "_total" * (f.type == "counter") for f in found if not f.name.startswith("process_")}


def values(url: str) -> dict[str, float]:
    """``name{label}`` -> value."""
    return {
        "".join([sample.name, *(f"{{{value}}}" for value in sample.labels.values())]): sample.value
        for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
        for sample in family.samples
    }


def coordinator_of(cluster: Launched) -> str:
    found = re.search(r"coordinator, listens on (http://\S+)", cluster.log)
    assert found
    return found[1]


def test_metrics_are_those_of_the_tables(cluster: Launched) -> None:
    """Each program has the metrics of its table, and Prometheus' linter nothing to say of them."""
    told = {"a gateway's": cluster.url, "the coordinator's": coordinator_of(cluster)}
    for program, url in told.items():
        answer = httpx.get(f"{url}/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        assert families(answer.text) == documented(program), program
        assert "process_cpu_seconds_total" in answer.text
        if promtool := shutil.which("promtool"):
            done = subprocess.run(
                [promtool, "check", "metrics"], input=answer.text, capture_output=True, text=True, check=False
            )
            assert (done.returncode, done.stdout + done.stderr) == (0, ""), program


def test_what_is_counted(cluster: Launched, run_name: str) -> None:
    """Requests and bytes at the gateway; votes, commits and their time at the coordinator; and no run's name."""
    deciding = coordinator_of(cluster)
    gateway, before = values(cluster.url), values(deciding)
    with EmaClient(cluster.url) as client:
        client.create_run(run_name, STATE)
        client.push(run_name, STATE, step=1)
        client.set_decay(run_name, 0.5)
        client.pull(run_name)
    after = values(deciding)

    def more(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert more("ema_coordinator_commits_total{update}") == 2  # the initial weights, too
    assert more("ema_coordinator_votes_total{update}") == 4
    assert more("ema_coordinator_commits_total{change}") >= 2
    assert more("ema_coordinator_decision_seconds_count{update}") == 2
    assert more("ema_coordinator_reports_total") > 6
    assert (more("ema_coordinator_talks"), after["ema_coordinator_shards_away"]) == (1, 0)
    told = values(cluster.url)
    assert told["ema_gateway_hosts"] == 2
    assert told["ema_gateway_received_bytes_total"] > gateway["ema_gateway_received_bytes_total"]
    assert told["ema_gateway_sent_bytes_total"] > gateway["ema_gateway_sent_bytes_total"]
    assert told["ema_gateway_requests_total{PUT}{/v1/runs/{run}/updates/{step}}{200}"] >= 1
    for url in (cluster.url, deciding):
        assert run_name not in httpx.get(f"{url}/metrics").text


def test_a_host_that_is_away_is_told(cluster: Launched) -> None:
    """Until it answers again."""
    told = {values(cluster.url).get(f"ema_gateway_host_failures_total{{{place}}}", 0.0) for place in (0, 1)}
    cluster.kill("host 1")
    httpx.get(f"{cluster.url}/readyz", timeout=30)
    wait_until(lambda: httpx.get(f"{cluster.url}/readyz", timeout=30).status_code == 200, "both hosts")
    after = values(cluster.url)
    assert after["ema_gateway_host_failures_total{1}"] > max(told)
    assert after["ema_gateway_host_away{1}"] == 0


# --- a talk, without sockets -----------------------------------------------------------------------------------------


def vote(step: int, change: str | None = None) -> Vote:
    return Vote(Proposal(Ticket(0, step, "k"), change), "1.1")


def counted(metrics: CoordinatorMetrics, name: str, *labels: str) -> float:
    named = {"kind": labels[0]} if labels else {}
    return metrics.registry.get_sample_value(name, named) or 0.0


def test_a_decision_is_counted_once_for_all_shards() -> None:
    """However often votes and verdicts are said again, with the time from the first vote on."""
    metrics, now = CoordinatorMetrics(), iter([10.0, 10.5, 11.0, 12.0])
    count = TalkCount(metrics, lambda: next(now))
    term = Term(1, "c")
    for shard in (0, 1, 1, 0):
        count.heard(Report(shard, Record(term, 1, 0, None, vote(1))))
    for shard in (0, 1, 0):
        count.said(Resolve(shard, term, 1, committed=True))
    assert counted(metrics, "ema_coordinator_votes_total", "update") == 2
    assert counted(metrics, "ema_coordinator_commits_total", "update") == 1
    assert counted(metrics, "ema_coordinator_aborts_total", "update") == 0
    assert counted(metrics, "ema_coordinator_decision_seconds_sum", "update") == pytest.approx(1.0)


def test_aborts_and_refusals_are_counted() -> None:
    """By what was aborted."""
    metrics = CoordinatorMetrics()
    count = TalkCount(metrics)
    term = Term(1, "c")
    count.heard(Report(0, Record(term, 3, 0, None, vote(1, "decay"))))
    count.heard(Refusal(1, term, Ticket(0, 1, "k"), "no"))
    count.said(Resolve(0, term, 2, committed=False))  # about an older vote
    assert counted(metrics, "ema_coordinator_aborts_total", "change") == 0
    count.said(Resolve(0, term, 3, committed=False))
    assert counted(metrics, "ema_coordinator_aborts_total", "change") == 1
    assert counted(metrics, "ema_coordinator_refusals_total") == 1


def test_tickets_that_nobody_decides_are_forgotten() -> None:
    """Trainers that went away leave nothing behind here."""
    count = TalkCount(CoordinatorMetrics())
    for step in range(1000):
        count.heard(Report(0, Record(Term(1, "c"), step, 0, None, vote(step))))
    assert len(count._open) <= 64
