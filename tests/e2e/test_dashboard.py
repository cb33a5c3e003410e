"""The dashboard and the API page in a real browser.

Knows the pages as a reader sees them. Does not know the script behind them.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save

from ema_service.tokens import create_token
from tests.conftest import ServerProcess
from tests.e2e.browser import NEEDS_CHROMIUM, PHONE, STATE, Browsing, create, put

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser test needs the package playwright")
pytestmark = NEEDS_CHROMIUM
expect = sync_api.expect

#: Counter and version of a run with its initial weights only.
NO_UPDATE = re.compile(r"^0\s*version \d+\.0$")


def row_of(page: Any, run: str) -> Any:
    return page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=run))


def test_run_appears_and_its_numbers_move(server: Any, browsing: Browsing, run_name: str) -> None:
    """A run made through the API appears by itself, and its numbers follow every update, without a reload.

    Meanwhile nothing is written to the console as an error, and no request leaves the server.
    """
    page = browsing.open(f"{server.url}/?query={run_name}")
    page.evaluate("window.sameDocument = true")
    create(server, run_name)
    row = row_of(page, run_name)
    expect(row).to_contain_text("awaiting weights")

    put(server, f"/v1/runs/{run_name}/weights", STATE)
    expect(row).to_contain_text("ready")
    expect(row.get_by_role("cell").nth(1)).to_have_text(NO_UPDATE)
    expect(row).to_contain_text("16")  # parameters

    for step in (1, 2, 7):
        put(server, f"/v1/runs/{run_name}/updates/{step}", STATE)
    expect(row.get_by_role("cell").nth(0)).to_contain_text("7")  # the trainer's step
    expect(row.get_by_role("cell").nth(1)).to_have_text(re.compile(r"^3\s*version \d+\.3$"))  # num_updates, version
    expect(row).to_contain_text("0.3076923")  # (1 + 3) / (10 + 3)
    expect(row).to_contain_text("of 0.999")
    expect(page.get_by_role("status")).to_have_text("live")
    assert page.evaluate("window.sameDocument")
    assert browsing.errors == []
    assert browsing.elsewhere(server.url) == []


def test_update_rate(server: Any, browsing: Browsing, run_name: str) -> None:
    """Updates between two looks of the page become a rate."""
    create(server, run_name)
    put(server, f"/v1/runs/{run_name}/weights", STATE)
    page = browsing.open(f"{server.url}/?query={run_name}")
    row = row_of(page, run_name)
    expect(row.get_by_role("cell").nth(1)).to_have_text(NO_UPDATE)

    for step in range(1, 21):
        put(server, f"/v1/runs/{run_name}/updates/{step}", STATE)

    expect(row.get_by_role("cell").nth(4)).to_contain_text(re.compile(r"^(?!0 /s)[\d.]+ /s"))


def test_token(start_server: Callable[..., Any], browsing: Browsing, tmp_path: Path) -> None:
    """Where tokens are asked for the page asks for one, keeps it in the tab, and never writes it into a URL."""
    tokens = tmp_path / "tokens"
    token = create_token(tokens, ["pull", "push"], "*")
    server = start_server("--token-file", str(tokens))
    headers = {"Authorization": f"Bearer {token}"}
    with server.http() as http:
        http.headers.update(headers)
        layout = [{"name": "weight", "shape": [3, 4], "dtype": "F32"}]
        http.post("/v1/runs", json={"run": "secret", "layout": layout}).raise_for_status()
        http.put("/v1/runs/secret/weights", content=save({"weight": STATE["weight"]})).raise_for_status()
        http.put("/v1/runs/secret/snapshots/best").raise_for_status()
    page = browsing.open(server.url)
    field, show = page.get_by_label("Token"), page.get_by_role("button", name="Show the runs")
    expect(page.get_by_text("This server wants a bearer token.")).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("signed out")
    expect(page.get_by_role("search")).to_be_hidden()
    expect(row_of(page, "secret")).to_have_count(0)
    assert browsing.barriers("signed-out") == []

    field.fill("wrong")
    show.click()
    expect(page.get_by_text("This server does not know that token.")).to_be_visible()
    field.fill(token)
    show.click()
    expect(row_of(page, "secret")).to_contain_text("ready")
    expect(field).to_be_hidden()
    page.reload()
    expect(row_of(page, "secret")).to_be_visible()

    # A link cannot carry the token: the run's page fetches a snapshot with it, and shows lines that read it elsewhere.
    page.get_by_role("link", name="secret").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="download secret-best.safetensors").click()
    download.value.save_as(tmp_path / "best.safetensors")
    assert load_file(tmp_path / "best.safetensors")["weight"].tolist() == STATE["weight"].tolist()
    expect(page.get_by_role("region", name="Weights and snapshots")).to_contain_text("Bearer $EMA_SERVICE_TOKEN")

    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("status")).to_have_text("signed out")
    expect(page.locator("#run")).to_be_hidden()
    assert page.evaluate("sessionStorage.length") == 0
    assert page.evaluate("JSON.stringify([document.cookie, {...localStorage}])") == '["",{}]'
    assert not any(token in url for url in browsing.requests)
    assert token not in server.log


def test_no_token_is_asked_for_without_need(server: Any, browsing: Browsing) -> None:
    """A server without tokens shows no field for one."""
    page = browsing.open(server.url)
    expect(page.get_by_role("status")).to_have_text("live")
    expect(page.get_by_label("Token")).to_be_hidden()


def test_names_are_text(server: Any, browsing: Browsing, run_name: str) -> None:
    """Markup in a name of a run, an average, a tensor or a device stays text, even if a server let it through."""
    create(server, run_name)
    hostile = "<img src=x onerror='window.hacked = true'>"

    def make_hostile(run: dict[str, Any]) -> dict[str, Any]:
        run["device"] = run["averages"][0]["name"] = run["reason"] = hostile
        return {**run, "run": hostile, "status": "degraded"}

    def hostile_list(route: Any) -> None:
        runs = route.fetch().json()["runs"]
        route.fulfill(json={"runs": [make_hostile(run) for run in runs if run["run"] == run_name]})

    entry = {"time": 0, "kind": hostile, "step": None, "num_updates": 0, "text": hostile}
    layout = {"run": hostile, "layout": [{"name": hostile, "shape": [], "dtype": hostile}], "copied": []}
    page = browsing.page
    page.route("**/v1/runs", hostile_list)
    page.route(f"**/v1/runs/{run_name}", lambda route: route.fulfill(json=make_hostile(route.fetch().json())))
    page.route("**/timeline", lambda route: route.fulfill(json={"run": hostile, "entries": [entry]}))
    page.route("**/layout", lambda route: route.fulfill(json=layout))
    browsing.open(server.url)
    expect(row_of(page, hostile)).to_contain_text(hostile)
    assert page.locator("main img").count() == 0

    page.goto(f"{server.url}/runs/{run_name}")
    for name in ("Averages", "Tensors"):
        expect(page.get_by_role("table", name=name)).to_contain_text(hostile)
    expect(page.get_by_role("region", name="Timeline")).to_contain_text(hostile)
    expect(page.get_by_role("region", name="Health")).to_contain_text(hostile)
    assert page.locator("main img").count() == 0
    assert page.evaluate("window.hacked") is None


def test_no_runs_yet(start_server: Callable[..., Any], browsing: Browsing) -> None:
    """An empty server shows the lines of a trainer that creates a run there; a run takes their place."""
    server = start_server(memory=True)
    page = browsing.open(server.url)
    page.set_viewport_size(PHONE)
    empty = page.get_by_role("region", name="No runs yet")
    expect(empty).to_contain_text("from ema_client import RemoteEma")
    expect(empty).to_contain_text(f'url="{server.url}"')
    assert browsing.barriers("empty") == []
    assert browsing.cut_off() == []

    create(server, "first")
    expect(page.get_by_role("link", name="first")).to_be_visible()
    expect(empty).to_be_hidden()
    page.get_by_role("link", name="first").click()
    expect(page.get_by_role("region", name="Weights and snapshots")).to_contain_text("--memory")


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of 150 runs: one is trained, one is frozen, one has the longest name that there is."""
    folder = tmp_path_factory.mktemp("crowded")
    server = ServerProcess(folder, data_dir=folder / "data").start()
    create(server, *(f"sweep-{number:03d}" for number in range(147)), "n" * 128)
    for run, config in (("digits", {}), ("stuck", {"decay": 1.0, "use_num_updates": False})):
        create(server, run, **config)
        put(server, f"/v1/runs/{run}/weights", STATE)
        put(server, f"/v1/runs/{run}/updates/1", STATE)
    yield server
    server.kill()


def test_many_runs(crowded: ServerProcess, browsing: Browsing) -> None:
    """150 runs are pages of rows, searched, filtered and sorted; the address keeps what was asked for. On a phone each
    run is a card that has every column."""
    page = browsing.open(crowded.url)
    rows = page.locator("#board tbody tr")
    expect(page.get_by_text("Page 1 of 8, 150 runs")).to_be_visible()
    expect(rows.first).to_contain_text("Frozen")  # what needs attention comes first
    assert page.evaluate("document.documentElement.scrollHeight") < 3000
    assert browsing.barriers("many") == []
    assert browsing.cut_off() == []

    page.get_by_role("button", name="Next").click()
    expect(page.get_by_text("Page 2 of 8")).to_be_visible()
    page.get_by_label("Search").fill("SWEEP-14")
    expect(rows).to_have_count(7)
    page.get_by_role("button", name="Run", exact=True).click()
    expect(rows.first).to_contain_text("sweep-140")
    page.reload()
    expect(rows.first).to_contain_text("sweep-140")
    expect(page.get_by_role("columnheader", name="Run")).to_have_attribute("aria-sort", "ascending")
    rows.first.get_by_role("link").click()
    expect(page.get_by_role("heading", name="sweep-140")).to_be_visible()
    page.go_back()
    expect(rows).to_have_count(7)

    page.get_by_label("Search").fill("no such run")
    page.get_by_role("button", name="Show all runs").click()
    page.get_by_role("combobox", name="Show").select_option("attention")
    expect(rows).to_have_count(1)
    page.get_by_role("combobox", name="Show").select_option("all")
    page.get_by_label("Search").fill("digits")
    page.set_viewport_size(PHONE)
    expect(rows).to_have_count(1)
    labels = {"Step", "Updates", "Decay", "Distance", "Rate", "Size", "Last update"}
    assert set(rows.first.locator("td").evaluate_all("cells => cells.map(cell => cell.dataset.label)")) == labels
    assert rows.first.locator("td").evaluate_all("cells => cells.every(cell => cell.checkVisibility())")
    assert browsing.cut_off() == []
    assert browsing.barriers("many-phone") == []
    assert browsing.errors == []


def test_list_costs_nothing_while_nothing_moves(crowded: ServerProcess, browsing: Browsing) -> None:
    """The list of 150 runs comes in less than 100 KB, packed; as long as nothing moves, looks at it get no body."""
    page = browsing.page
    received: list[float] = []
    network = page.context.new_cdp_session(page)
    network.send("Network.enable")
    paths: dict[str, str] = {}
    network.on("Network.requestWillBeSent", lambda event: paths.update({event["requestId"]: event["request"]["url"]}))
    network.on(
        "Network.loadingFinished",
        lambda event: received.append(event["encodedDataLength"]) if paths[event["requestId"]] == url else None,
    )
    url = f"{crowded.url}/v1/runs"
    page.goto(crowded.url)
    wait_for_looks(page, received, 3)

    assert received[0] < 100_000
    assert max(received[1:]) < 1000


def wait_for_looks(page: Any, received: list[float], count: int) -> None:
    for _ in range(100):
        if len(received) >= count:
            return
        page.wait_for_timeout(200)
    raise AssertionError(f"the page looked {len(received)} times")


def test_lost_connection(server: Any, browsing: Browsing, run_name: str) -> None:
    """While the server does not answer the page says so and keeps the last numbers; afterwards it goes on by itself."""
    create(server, run_name)
    page = browsing.open(f"{server.url}/?query={run_name}")
    expect(row_of(page, run_name)).to_be_visible()

    page.route("**/v1/runs", lambda route: route.abort())
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    expect(page.get_by_role("status")).to_have_text("no connection")
    expect(row_of(page, run_name)).to_be_visible()

    page.unroute("**/v1/runs")
    expect(page.get_by_role("status")).to_have_text("live")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_docs_show_the_routes_without_the_internet(server: Any, browsing: Browsing) -> None:
    """/docs shows every route of /openapi.json, from this server alone and without an error."""
    with server.http() as http:
        paths = http.get("/openapi.json").json()["paths"]
    page = browsing.open(f"{server.url}/docs")

    expect(page.locator(".opblock")).to_have_count(sum(len(methods) for methods in paths.values()))
    shown = {text.replace("\u200b", "") for text in page.locator(".opblock-summary-path").all_inner_texts()}
    assert shown == set(paths)
    page.locator(".opblock").first.click()
    expect(page.locator(".opblock-body").first).to_be_visible()
    assert browsing.errors == []
    assert browsing.elsewhere(server.url) == []


@pytest.fixture
def behind_a_prefix() -> Iterator[Callable[[str], str]]:
    """A proxy for a server's GETs, as a cluster's gateway has them: /ema/PATH there is /PATH here."""
    proxies: list[ThreadingHTTPServer] = []

    def start(url: str) -> str:
        class Relay(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                headers = {name: self.headers[name] for name in ("Authorization", "Accept") if name in self.headers}
                path = self.path.removeprefix("/ema") if self.path.startswith("/ema/") else "/there-is-no-such-path"
                answer = httpx.get(url + path, headers=headers)
                self.send_response(answer.status_code)
                for name in ("Content-Type", "Content-Security-Policy", "WWW-Authenticate"):
                    if name in answer.headers:
                        self.send_header(name, answer.headers[name])
                self.end_headers()
                self.wfile.write(answer.content)

            def log_message(self, *_: object) -> None:
                pass

        proxies.append(ThreadingHTTPServer(("127.0.0.1", 0), Relay))
        threading.Thread(target=proxies[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{proxies[-1].server_port}/ema"

    yield start
    for proxy in proxies:
        proxy.shutdown()
        proxy.server_close()


@pytest.mark.soak
def test_trying_out_behind_a_prefix(
    start_server: Callable[..., Any], behind_a_prefix: Callable[[str], str], browsing: Browsing, tmp_path: Path
) -> None:
    """On /docs, Execute asks the server that the page came from, below a proxy's prefix too, with the token that was
    given under Authorize."""
    token = create_token(tmp_path / "tokens", ["pull"], "*")
    url = behind_a_prefix(start_server("--token-file", str(tmp_path / "tokens")).url)
    page = browsing.open(f"{url}/docs")
    page.locator("button.authorize").first.click()
    dialog = page.locator(".dialog-ux")
    dialog.locator("input").fill(token)
    dialog.get_by_role("button", name="Apply credentials").click()
    dialog.get_by_role("button", name="Close", exact=True).click()

    operation = page.locator("#operations-runs-list_runs")
    operation.locator(".opblock-summary").first.click()
    operation.get_by_role("button", name="Try it out").click()
    operation.get_by_role("button", name="Execute").click()
    expect(operation.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
    assert f"{url}/v1/runs" in browsing.requests
    assert browsing.elsewhere(url) == []
    assert browsing.errors == []


@pytest.mark.parametrize("path", ["/", "/runs/a..b", "/docs"])
def test_pages_are_kept_to_this_server(server: Any, path: str) -> None:
    """All pages tell the browser to run no inline script and to load nothing from elsewhere."""
    with server.http() as http:
        answer = http.get(path)

    policy = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert policy["connect-src"] == "'self'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "http://" not in answer.text
    assert "https://" not in answer.text


def test_page_links_what_else_there_is(server: Any, browsing: Browsing) -> None:
    """The footer leads to the API page, the metrics and the JSON, and each of them answers."""
    page = browsing.open(server.url)
    links = page.locator("footer a").evaluate_all("links => links.map(link => link.href)")

    assert links == [f"{server.url}/docs", f"{server.url}/metrics", f"{server.url}/v1/runs"]
    with server.http() as http:
        assert [http.get(link).status_code for link in links] == [200, 200, 200]
        assert json.loads(http.get("/v1/runs").text).keys() == {"runs"}
