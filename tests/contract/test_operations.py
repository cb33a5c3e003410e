"""What an operator is given works: alerts, their runbook, the Grafana dashboard, and Prometheus at a running server.

Knows Prometheus' own tools, the files in docker/, and the runbook. Does not know the server's code.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
import yaml

from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker" / "prometheus"
RULES = FOLDER / "ema-service.rules.yml"
DASHBOARD = json.loads((ROOT / "docker" / "grafana" / "ema-service.json").read_text())
OPERATIONS = (ROOT / "ema_service" / "OPERATIONS.md").read_text()

ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
SHOWN = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
TABLES = ("Metrics", "Metrics of a cluster")
#: Of metrics, those that neither the dashboard nor an alert asks for.
NOT_SHOWN = {
    "ema_build_info",
    "ema_disk_bytes",
    "ema_events_total",
    "ema_frozen_limit_bytes",
    "ema_gateway_events_total",
    "ema_gateway_host_failures_total",
    "ema_gateway_map_failures_total",
    "ema_gateway_request_seconds",
    "ema_coordinator_refusals_total",
    "ema_coordinator_reports_total",
    "ema_coordinator_talks",
    "ema_coordinator_votes_total",
    "ema_pushes_total",
    "ema_request_seconds",
    "ema_run_num_updates",
    "ema_runs_left_out",
    "ema_runs_limit",
    "ema_slow_readers_total",
    "ema_snapshot_removals_waiting",
    "ema_snapshots_waiting",
    "ema_staging_limit_bytes",
    "ema_watchers_limit",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_virtual_memory_bytes",
}


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} (package prometheus) is not installed: rules, alerts and the dashboard are not tried")
    return found


def test_each_alert_has_its_page() -> None:
    """The runbook has a section for each alert, in the rules' order, and for nothing else; the alert names it."""
    runbook = OPERATIONS.partition("\n## Runbook\n")[2]
    assert re.findall(r"^### (\w+)$", runbook, re.MULTILINE) == [rule["alert"] for rule in ALERTS]
    for section in re.split(r"^### ", runbook, flags=re.MULTILINE)[1:]:
        assert "**Do:**" in section, section
    for rule in ALERTS:
        assert rule["annotations"]["runbook"] == f"ema_service/OPERATIONS.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}


def metrics_in(text: str) -> set[str]:
    return {name.removesuffix("_bucket") for name in re.findall(r"\b(?:ema|process)_\w+", text)}


def known_metrics() -> set[str]:
    """Those of the tables of metrics, of a server and of a cluster's programs."""
    sections = (OPERATIONS.partition(f"\n## {title}\n")[2].partition("\n## ")[0] for title in TABLES)
    rows = (line for section in sections for line in section.splitlines() if line.startswith("| `"))
    return {name for row in rows for name in metrics_in(row.split(" | ")[0])}


def test_alerts_and_dashboard_ask_for_metrics_that_exist() -> None:
    """Every metric in an expression is one of the table of metrics."""
    for title, expression in [*((rule["alert"], rule["expr"]) for rule in ALERTS), *SHOWN]:
        assert metrics_in(expression) - known_metrics() == set(), title


def test_metrics_are_looked_at() -> None:
    """Every metric is on the dashboard or in an alert, but for those that are for questions of one's own."""
    asked = {name for _, expression in SHOWN for name in metrics_in(expression)}
    asked |= {name for rule in ALERTS for name in metrics_in(rule["expr"])}
    assert known_metrics() - asked == NOT_SHOWN


def test_panels_of_the_dashboard() -> None:
    """Each has a number and a place of its own."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [
        (place["x"] + x, place["y"] + y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["w"])
        for y in range(place["h"])
    ]
    assert len(set(places)) == len(places)
    assert all(x < 24 for x, _ in places)


def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    """promtool finds rules, configuration and the dashboard's expressions right, and the rules' own test passes."""
    promtool = tool("promtool")
    plain = {"$__rate_interval": "1m", '"$instance"': '".*"', '"$run"': '".*"'}
    rules = []
    for number, (_, expression) in enumerate(SHOWN):
        for name, value in plain.items():
            expression = expression.replace(name, value)
        rules.append({"record": f"shown:{number}", "expr": expression})
    shown = tmp_path / "shown.yml"
    shown.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    for arguments in (
        ["check", "config", "prometheus.yml"],
        ["check", "rules", RULES.name, str(shown)],
        ["test", "rules", "ema-service.test.yml"],
    ):
        done = subprocess.run([promtool, *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"


@pytest.fixture
def prometheus(tmp_path: Path, server: ServerProcess) -> Iterator[httpx.Client]:
    """A Prometheus with the rules, but without their patience, that asks the tests' server."""
    program = tool("prometheus")
    rules: dict[str, Any] = yaml.safe_load(RULES.read_text())
    for rule in rules["groups"][0]["rules"]:
        rule.pop("for", None)
    (tmp_path / RULES.name).write_text(yaml.safe_dump(rules))
    config: dict[str, Any] = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "200ms"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [urlsplit(server.url).netloc]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    flags = ["--config.file", "prometheus.yml", "--storage.tsdb.path", "data", "--web.listen-address", "127.0.0.1:0"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([program, *flags], cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)
    try:
        pattern = re.compile(r"Listening on\W+address=(\S+)")
        wait_until(lambda: process.poll() is not None or pattern.search(log.read_text()), "Prometheus' address")
        found = pattern.search(log.read_text())
        assert found, log.read_text()
        with httpx.Client(base_url=f"http://{found[1]}/api/v1") as http:
            yield http
    finally:
        process.terminate()
        process.wait(30)


def test_prometheus_fires_an_alert(
    prometheus: httpx.Client, server: ServerProcess, plain_run: Callable[..., PlainRun]
) -> None:
    """A real Prometheus reads the server, and a trainer that sends NaN brings about its alert, and no other's."""

    def firing() -> set[str]:
        alerts = prometheus.get("/alerts").json()["data"]["alerts"]
        return {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}

    def asked(query: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = prometheus.get("/query", params={"query": query}).json()["data"]["result"]
        return result

    run = plain_run(server, {"w": torch.zeros(4)})
    refused = run.push(1, {"w": torch.full((4,), float("nan"))})
    assert refused.json()["code"] == "non_finite"
    errors = 'count_over_time(ema_errors_total{code="non_finite"}[1m]) >= 2'
    wait_until(lambda: asked(errors), "two looks at the counter")
    [sample] = asked(f'ema_run_status{{run="{run.name}"}}')
    assert (sample["metric"]["status"], sample["metric"]["job"]) == ("ready", "ema-service")
    assert not firing() & {"EmaServerDown", "EmaNonFinite"}
    run.push(1, {"w": torch.full((4,), float("nan"))})
    wait_until(lambda: "EmaNonFinite" in firing(), "the alert of a trainer that sends NaN")
    assert not firing() & {"EmaServerDown", "EmaWritesFail"}
