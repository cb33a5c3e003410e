"""The pages of a gateway in a real browser: whole runs as a server shows them, and the hosts.

Knows the pages as a reader sees them. Does not know how hosts decide, or what a gateway asks of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from ema_client import EmaClient
from ema_service.tokens import create_token
from tests.conftest import ServerProcess
from tests.e2e.browser import NEEDS_CHROMIUM, PHONE, Browsing
from tests.service.cluster.launched import Launched
from tests.service.cluster.plain_hosts import PlainHosts

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser test needs the package playwright")
pytestmark = NEEDS_CHROMIUM
expect = sync_api.expect

STATE = {"first": torch.ones(8, 4), "last": torch.zeros(6)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    folder = tmp_path_factory.mktemp("cluster")
    found = Launched(folder / "all", "--local", "2").start()
    yield found
    found.end()


@pytest.fixture
def run(cluster: Launched, run_name: str) -> str:
    """A run of two updates."""
    with EmaClient(cluster.url) as client:
        client.create_run(run_name, STATE)
        for step in (1, 2):
            client.push(run_name, {name: tensor + step for name, tensor in STATE.items()}, step=step)
    return run_name


def test_whole_runs_are_shown(cluster: Launched, browsing: Browsing, run: str) -> None:
    """List and page of a run are those of a server, follow its updates, and ask for nothing that a gateway has not."""
    page = browsing.open(f"{cluster.url}/?query={run}")
    row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=run))
    expect(row).to_contain_text("ready")
    expect(row.get_by_role("cell").nth(0)).to_contain_text("2")
    links = page.locator("footer a")
    expect(links.first).to_have_text("Hosts and shards /hosts")
    found = links.evaluate_all("links => links.map(link => link.href)")
    assert [httpx.get(link).status_code for link in found] == [200, 200, 200]

    row.get_by_role("link", name=run).click()
    with EmaClient(cluster.url) as client:
        client.push(run, STATE, step=3)
    expect(page.locator("#figures")).to_contain_text("Step3")
    expect(page.get_by_role("region", name="Timeline")).to_contain_text("Created on 2 hosts")
    expect(page.get_by_role("table", name="Tensors")).to_contain_text("first")
    expect(page.get_by_role("region", name="Run and server")).to_contain_text("Hosts2")
    expect(page.locator("#curves .chart").first).to_be_visible()
    expect(page.get_by_role("region", name="Weights and snapshots")).to_contain_text("no snapshots yet")
    assert browsing.errors == []
    assert browsing.elsewhere(cluster.url) == []


def test_hosts_and_shards_are_shown(cluster: Launched, browsing: Browsing, run: str) -> None:
    """Each host with its address and since when it is heard; of the chosen run, which rows each has."""
    page = browsing.open(f"{cluster.url}/")
    page.locator("footer").get_by_role("link", name="Hosts and shards").click()
    hosts = page.get_by_role("table", name="Hosts").locator("tbody tr")
    expect(hosts).to_have_count(2)
    for place in (0, 1):
        expect(hosts.nth(place)).to_contain_text("http://127.0.0.1:")
        expect(hosts.nth(place)).to_contain_text("ready")
        expect(hosts.nth(place)).to_contain_text("heard for")
    expect(page.locator("#figures")).to_contain_text("Coordinator's number1")
    page.get_by_role("combobox", name="Run").select_option(run)
    shards = page.get_by_role("table", name="Shards").locator("tbody tr")
    expect(shards.nth(0)).to_contain_text("first, row 0")
    expect(shards.nth(1)).to_contain_text("last, row 5")
    expect(shards.nth(1).locator("td").nth(8)).to_have_text("2")  # the trainer's step
    with EmaClient(cluster.url) as client:
        client.push(run, STATE, step=3)
    expect(shards.nth(1).locator("td").nth(8)).to_have_text("3")
    page.reload()
    expect(shards.nth(1).locator("td").nth(8)).to_have_text("3")  # the address keeps which run
    assert browsing.barriers("hosts") == []
    page.set_viewport_size(PHONE)
    assert browsing.cut_off() == []
    assert browsing.barriers("hosts-phone") == []
    assert browsing.errors == []
    assert browsing.elsewhere(cluster.url) == []


def test_a_host_that_is_away_is_shown(browsing: Browsing, tmp_path: Path, server_class: type[ServerProcess]) -> None:
    """With why, beside those that are there; and nobody without a token is shown either."""
    tokens = tmp_path / "tokens"
    token = create_token(tokens, ["pull", "train"], "*")
    number = iter(range(9))

    def start() -> Any:
        folder = tmp_path / f"host-{next(number)}"
        folder.mkdir()
        return server_class(folder, ("--token-file", str(tokens)), data_dir=folder / "data").start()

    hosts = PlainHosts(tmp_path, start, 2)
    try:
        page = browsing.open(f"{hosts.url}/hosts")
        expect(page.get_by_role("status")).to_have_text("signed out")
        expect(page.locator("#cluster")).to_be_hidden()
        page.get_by_label("Token").fill(token)
        page.get_by_role("button", name="Show the hosts").click()
        rows = page.get_by_role("table", name="Hosts").locator("tbody tr")
        expect(rows).to_have_count(2)
        expect(page.get_by_text("No runs yet.")).to_be_visible()
        hosts.servers[1].kill()
        expect(rows.nth(1)).to_contain_text("does not answer")
        expect(rows.nth(0)).to_contain_text("ready")
        expect(page.locator("#figures")).to_contain_text("Away1")
        expect(page.get_by_role("status")).to_have_text("live")
    finally:
        hosts.end()
        for server in hosts.servers:
            if server.process.poll() is None:
                server.kill()
