"""The page of one run in a real browser: what it shows, how it follows the run, and how fast it draws.

Knows the page as a reader sees it. Does not know the scripts behind it; test_health.py asks what is found wrong.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from tests.conftest import ServerProcess
from tests.e2e.browser import NEEDS_CHROMIUM, PHONE, Browsing, create, put, send

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser test needs the package playwright")
pytestmark = NEEDS_CHROMIUM
expect = sync_api.expect

#: Two groups of tensors, and one that is alone.
STATE = {f"{part}.{i}.weight": torch.full((4, 4), 1.0 + i) for part in ("encoder", "decoder") for i in range(12)}
STATE["norm.bias"] = torch.ones(4)
#: The names of the charts over time.
CHARTS = ["Distance", "Effective decay", "Norms", "Step and counter", "Update rate", "Received", "A push, by phase"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of five runs, of which one is sick: its decay is 1. Each had 20 updates, a ring and a snapshot."""
    folder = tmp_path_factory.mktemp("trained")
    server = ServerProcess(folder, data_dir=folder / "data").start()
    names = ["alpha", "beta", "gamma", "delta"]
    create(server, *names, state=STATE, posthoc={})
    create(server, "stuck", state=STATE, decay=1.0, use_num_updates=False)
    for run in (*names, "stuck"):
        put(server, f"/v1/runs/{run}/weights", STATE)
        train(server, run, 1, 21)
        put(server, f"/v1/runs/{run}/snapshots/epoch-1")
    yield server
    server.kill()


def train(server: ServerProcess, run: str, begin: int, end: int) -> None:
    with server.http() as http:
        for step in range(begin, end):
            body = save({name: each + 0.01 * step for name, each in STATE.items()})
            http.put(f"/v1/runs/{run}/updates/{step}", content=body).raise_for_status()


def chart(page: Any, title: str) -> Any:
    return page.get_by_role("img", name=re.compile(f"^{re.escape(title)}: "))


def figure(page: Any, term: str) -> Any:
    return page.locator("#figures > div").filter(has_text=re.compile(f"^{term}")).locator("dd")


def test_run_and_how_it_went(trained: ServerProcess, browsing: Browsing) -> None:
    """The page has its own address; it shows figures, curves, timeline, averages, ring, snapshots, tensors and facts,
    and follows updates, changes and snapshots without a reload. Nothing is wrong, nor is anybody kept out."""
    page = browsing.open(f"{trained.url}/runs/alpha")
    expect(page.get_by_role("heading", name="alpha")).to_be_visible()
    expect(page).to_have_title("alpha · EMA runs")
    expect(page.get_by_role("region", name="Health")).to_contain_text("Healthy")
    for title in CHARTS:
        expect(chart(page, title)).to_be_visible()
    expect(chart(page, "Step and counter")).to_have_accessible_name(re.compile("20.*step"))
    expect(page.get_by_role("region", name="Timeline")).to_contain_text("Snapshot epoch-1 taken")
    expect(page.get_by_role("table", name="Averages")).to_contain_text("posthoc-0.25")
    expect(page.get_by_role("table", name="Lengths that can be had")).to_contain_text("ema pull alpha --sigma-rel 0.25")
    ring = page.get_by_role("region", name="Any length, after the training")
    expect(ring.get_by_role("button", name="Copy: ema sweep alpha")).to_be_visible()
    expect(page.get_by_role("region", name="Run and server")).to_contain_text("process")
    expect(page.get_by_role("status")).to_have_text("live")

    page.evaluate("window.sameDocument = true")
    train(trained, "alpha", 21, 40)
    put(trained, "/v1/runs/alpha/snapshots/epoch-2")
    send(trained, "PATCH", "/v1/runs/alpha", decay=0.99)
    sweep(trained, "alpha", "0.1,0.2,0.15", "--name", "FID", "--highest")
    expect(figure(page, "Step")).to_have_text("39")
    expect(figure(page, "Update rate")).to_contain_text("/s")
    expect(figure(page, "Distance")).to_contain_text(re.compile(r"^0\.\d+"))
    expect(chart(page, "Distance")).to_have_accessible_name(re.compile("encoder"))
    expect(chart(page, "Step and counter")).to_have_accessible_name(re.compile("39.*step"))
    expect(page.get_by_role("region", name="Timeline")).to_contain_text("0.99")
    expect(page.get_by_role("table", name="Snapshots")).to_contain_text("epoch-2")
    rows = page.get_by_role("table", name="Results of the sweep").locator("tbody tr")
    expect(rows).to_have_text(["\u03c3_rel 0.10.1", "\u03c3_rel 0.150.15", "\u03c3_rel 0.20.2best, the highest"])
    expect(chart(page, "What a sweep found")).to_have_accessible_name(re.compile("FID.*best"))
    expect(ring).to_contain_text("ema snapshot alpha best --sigma-rel 0.2 --at 39")
    expect(ring.get_by_role("button", name="Copy: ema sweep alpha")).to_be_hidden()
    expect(page.get_by_role("region", name="Timeline")).to_contain_text(
        "Sweep of 3 lengths, best sigma_rel 0.2: FID 0.2."
    )
    assert page.evaluate("window.sameDocument")
    assert drawn(page) >= len(CHARTS)
    assert drawn(page, "#ring") == 1
    assert browsing.barriers("run") == []
    assert browsing.cut_off() == []
    assert browsing.errors == []
    assert browsing.elsewhere(trained.url) == []


def sweep(server: ServerProcess, run: str, lengths: str, *words: str) -> None:
    """`ema sweep`, whose evaluation says the length itself."""
    options = ("--sigma-rel", lengths, "--max-error", "1", "--exec", "echo {sigma_rel}", "--url", server.url)
    command = [sys.executable, "-m", "ema_client", "sweep", run, *options, *words]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def drawn(page: Any, within: str = "#curves") -> int:
    """How many charts over time, or others, have a curve: pixels of a colour that curves have."""
    found: int = page.evaluate(
        """(within) => {
            const style = getComputedStyle(document.documentElement);
            const parts = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
            const curves = [1, 2, 3, 4, 5, 6].map((i) => parts(style.getPropertyValue(`--curve-${i}`).trim()));
            const near = (data, i) => curves.some((curve) => curve.every((c, k) => Math.abs(data[i + k] - c) < 8));
            return [...document.querySelectorAll(`${within} canvas`)].filter((canvas) => {
                const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                for (let i = 0, found = 0; i < data.length; i += 4) {
                    found += data[i + 3] > 200 && near(data, i);
                    if (found > 20) return true;
                }
                return false;
            }).length;
        }""",
        within,
    )
    return found


def test_sick_one_of_five(trained: ServerProcess, browsing: Browsing) -> None:
    """Someone who never saw the service finds which run is sick, why, and what to type; having done it, that the run is
    well again."""
    page = browsing.open(trained.url)
    rows = page.locator("#board tbody tr")
    expect(rows).to_have_count(5)
    expect(rows.first).to_contain_text(re.compile("stuck.*Frozen"))
    expect(page.locator("#totals")).to_contain_text("In need of attention1")
    rows.first.get_by_role("link").click()
    health = page.get_by_role("region", name="Health")
    expect(health).to_contain_text("every update leaves the average as it was")
    expect(health.get_by_text(f"ema set-decay stuck 0.9999 --url {trained.url}")).to_be_visible()
    assert browsing.barriers("sick") == []

    send(trained, "PATCH", "/v1/runs/stuck", decay=0.9999)
    train(trained, "stuck", 21, 22)
    expect(health).to_contain_text("Healthy")
    page.go_back()
    expect(page.locator("#totals")).to_contain_text("In need of attention0")
    assert browsing.errors == []


def test_tensors_and_weights(trained: ServerProcess, browsing: Browsing, tmp_path: Any) -> None:
    """Tensors are searched and sorted; weights are downloaded, and there are lines that do the same elsewhere."""
    page = browsing.open(f"{trained.url}/runs/beta")
    rows = page.get_by_role("table", name="Tensors").locator("tbody tr")
    expect(rows).to_have_count(20)
    page.get_by_role("button", name="Show more").click()
    expect(rows).to_have_count(25)
    tensors = page.get_by_role("region", name="Tensors")
    tensors.get_by_label("Search").fill("encoder.1")
    expect(rows).to_have_count(3)
    expect(rows.first).to_contain_text("4 \u00d7 4")
    expect(rows.first.locator("td").last).to_have_text(re.compile(r"^0\.\d+"))
    tensors.get_by_label("Search").fill("nothing")
    expect(tensors).to_contain_text("No tensor has such a name.")

    with page.expect_download() as download:
        page.get_by_role("link", name="download beta-epoch-1.safetensors").click()
    download.value.save_as(tmp_path / "epoch-1.safetensors")
    assert load_file(tmp_path / "epoch-1.safetensors").keys() == STATE.keys()
    weights = page.get_by_role("region", name="Weights and snapshots")
    expect(weights).to_contain_text(f"curl -fo beta.safetensors {trained.url}/v1/runs/beta/weights")
    weights.get_by_role("combobox").select_option("epoch-1")
    expect(weights).to_contain_text(f"ema pull beta --snapshot epoch-1 -o beta-epoch-1.safetensors --url {trained.url}")
    expect(weights).to_contain_text('pull("beta", snapshot="epoch-1")')
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    weights.get_by_role("button", name="Copy: curl").click()
    expect(weights.get_by_role("button", name="Copy: curl")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()").startswith("curl -fo beta-epoch-1.safetensors")
    assert browsing.errors == []


def test_phone_and_other_states(trained: ServerProcess, browsing: Browsing) -> None:
    """On a phone in the dark nothing is cut off, and nobody kept out, whatever a sweep found; so too where there is no
    such run, whose page shows it as soon as it is there."""
    points = [{"value": 0.9, "result": 2.5}, {"value": 0.99, "result": 1.25}, {"value": 0.999, "refused": "far " * 70}]
    send(trained, "POST", "/v1/runs/gamma/sweeps", kind="decay", points=points, at=7, name="<i>loss</i>" * 20)
    send(trained, "POST", "/v1/runs/gamma/sweeps", kind="half_life", points=[{"value": 30.0}])
    browsing.page.emulate_media(color_scheme="dark")
    browsing.page.set_viewport_size(PHONE)
    page = browsing.open(f"{trained.url}/runs/gamma")
    expect(chart(page, "A push, by phase")).to_be_visible()
    expect(page.get_by_role("table", name="Lengths that can be had").locator("tbody tr").first).to_be_visible()
    ring = page.get_by_role("region", name="Any length, after the training")
    rows = page.get_by_role("table", name="Results of the sweep").locator("tbody tr")
    expect(rows).to_have_text(["half-life 30\u2013no result"])
    expect(chart(page, "What a sweep found")).to_be_hidden()
    assert browsing.cut_off() == []
    ring.get_by_role("combobox").select_option(index=1)
    expect(rows.nth(1)).to_have_text("decay 0.991.25best, the lowest")
    expect(rows.nth(2)).to_contain_text("far far")
    expect(chart(page, "What a sweep found")).to_have_accessible_name(re.compile("(<i>loss</i>){20}.*best"))
    expect(chart(page, "What a sweep found")).to_be_visible()
    expect(ring).to_contain_text("ema snapshot gamma best --decay 0.99 --at 7")
    assert browsing.cut_off() == []
    assert browsing.barriers("run-phone") == []

    page.goto(f"{trained.url}/runs/a..odd-_name.1")
    expect(page.get_by_role("heading", name="There is no such run")).to_be_visible()
    assert browsing.barriers("missing") == []
    create(trained, "a..odd-_name.1")
    expect(page.get_by_role("region", name="Health")).to_contain_text("Waiting for the trainer's initial weights.")
    expect(page.get_by_text("Curves begin with the first updates.")).to_be_visible()
    assert browsing.barriers("awaiting") == []


def test_year_of_history(trained: ServerProcess, browsing: Browsing) -> None:
    """A year of measurements, thinned by the server to 500 points, is drawn within a second."""
    year = [1e9 + 31_536_000 * i / 499 for i in range(500)]
    wave = [0.02 + 0.01 * math.sin(i / 9) for i in range(500)]
    columns = ["step", "num_updates", "effective_decay", "distance", "shadow_norm", "parameter_norm", "rate"]
    columns += ["bytes_per_second", "durable_lag", "seconds_receive", "seconds_average", "seconds_commit"]
    body = {"run": "delta", "average": "ema", "version": "1.1000000", "seen": 1_000_000, "begin": year[0]}
    body["columns"] = {"time": year, **dict.fromkeys(columns, wave)}
    body["groups"] = {f"block.{i}": wave for i in range(24)}
    browsing.page.route("**/history?*", lambda route: route.fulfill(json=body))
    page = browsing.open(f"{trained.url}/runs/delta")
    expect(chart(page, "Durable lag")).to_be_visible()

    # From the answer to the last chart, as the browser's own clock has it.
    took = page.evaluate(
        """() => {
            const answer = performance.getEntriesByType("resource").find(({ name }) => name.includes("points=500"));
            return performance.getEntriesByName("curves drawn")[0].startTime - answer.responseEnd;
        }"""
    )
    assert drawn(page) == 8
    assert took < 1000
