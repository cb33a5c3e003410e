"""The dashboard and the API page in a real browser.

Knows the pages as a reader sees them. Does not know the script behind them.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save

from ema_service.tokens import create_token

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser test needs the package playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the browser test needs chromium")

expect = sync_api.expect
# The page asks every two seconds; a busy machine may take longer to answer.
expect.set_options(timeout=20_000)
QUIET = [
    "--no-sandbox",  # as root, in containers, Chromium does not start otherwise
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]
#: Counter and version of a run with its initial weights only.
NO_UPDATE = re.compile(r"^0\s*version \d+\.0$")
STATE = {"weight": torch.ones(3, 4), "bias": torch.zeros(4)}


@dataclass
class Browsing:
    """A page, and what went wrong on it."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, url: str) -> Any:
        """Go there, from then on noting errors and requests."""
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        return self.page

    def _note(self, said: Any) -> None:
        if said.type in ("error", "warning"):
            self.errors.append(said.text)

    def elsewhere(self, origin: str) -> list[str]:
        """Requests that left the origin."""
        return [url for url in self.requests if not url.startswith((f"{origin}/", "data:"))]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def browsing(browser: Any) -> Iterator[Browsing]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    made = Browsing(context.new_page())
    yield made
    # A request may be on its way through a test's route.
    made.page.unroute_all(behavior="ignoreErrors")
    context.close()


def create(server: Any, run: str) -> None:
    layout = [{"name": name, "shape": list(tensor.shape), "dtype": "F32"} for name, tensor in STATE.items()]
    with server.http() as http:
        http.post("/v1/runs", json={"run": run, "decay": 0.999, "layout": layout}).raise_for_status()


def put(server: Any, path: str, state: dict[str, torch.Tensor] | None = None) -> None:
    with server.http() as http:
        http.put(path, content=None if state is None else save(state)).raise_for_status()


def row_of(page: Any, run: str) -> Any:
    return page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=run))


def test_run_appears_and_its_numbers_move(server: Any, browsing: Browsing, run_name: str) -> None:
    """A run made through the API appears by itself, and its numbers follow every update, without a reload.

    Meanwhile nothing is written to the console as an error, and no request leaves the server.
    """
    page = browsing.open(server.url)
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
    """Updates between two looks of the page become a rate, with a line drawn for it."""
    create(server, run_name)
    put(server, f"/v1/runs/{run_name}/weights", STATE)
    page = browsing.open(server.url)
    row = row_of(page, run_name)
    expect(row.get_by_role("cell").nth(1)).to_have_text(NO_UPDATE)

    for step in range(1, 21):
        put(server, f"/v1/runs/{run_name}/updates/{step}", STATE)

    rate = row.get_by_role("cell").nth(3)
    expect(rate).to_contain_text(re.compile(r"^(?!0 /s)[\d.]+ /s"))
    # The line has a peak: y is 2 at the top of the picture and 22 at its bottom.
    expect(rate.locator("polyline")).to_have_attribute("points", re.compile(r",2\.0\b"))


def test_details_and_snapshots(server: Any, browsing: Browsing, run_name: str, tmp_path: Path) -> None:
    """The button of a run opens its averages and snapshots; a snapshot's link gives its weights."""
    create(server, run_name)
    put(server, f"/v1/runs/{run_name}/weights", STATE)
    page = browsing.open(server.url)
    button = page.get_by_role("button", name=run_name)
    expect(button).to_have_attribute("aria-expanded", "false")
    button.click()
    expect(button).to_have_attribute("aria-expanded", "true")
    expect(page.get_by_role("table", name="Averages")).to_contain_text("litema")
    expect(page.get_by_text("No snapshots yet.")).to_be_visible()

    put(server, f"/v1/runs/{run_name}/snapshots/best")
    snapshots = page.get_by_role("table", name="Snapshots")
    expect(snapshots).to_contain_text("best")
    with page.expect_download() as download:
        snapshots.get_by_role("link").click()
    download.value.save_as(tmp_path / "best.safetensors")

    assert download.value.suggested_filename == f"{run_name}-best.safetensors"
    weights = load_file(tmp_path / "best.safetensors")
    assert {name: tensor.tolist() for name, tensor in weights.items()} == {n: t.tolist() for n, t in STATE.items()}
    button.click()
    expect(snapshots).to_have_count(0)
    assert browsing.errors == []


def test_token(start_server: Callable[..., Any], browsing: Browsing, tmp_path: Path) -> None:
    """Where tokens are asked for the page asks for one, keeps it in the tab, and never writes it into a URL."""
    tokens = tmp_path / "tokens"
    token = create_token(tokens, ["pull", "push"], "*")
    server = start_server("--token-file", str(tokens))
    headers = {"Authorization": f"Bearer {token}"}
    with server.http() as http:
        layout = [{"name": "weight", "shape": [3, 4], "dtype": "F32"}]
        http.post("/v1/runs", json={"run": "secret", "layout": layout}, headers=headers).raise_for_status()
    page = browsing.open(server.url)
    field, show = page.get_by_label("Token"), page.get_by_role("button", name="Show the runs")
    expect(page.get_by_text("This server wants a bearer token.")).to_be_visible()
    expect(row_of(page, "secret")).to_have_count(0)

    field.fill("wrong")
    show.click()
    expect(page.get_by_text("This server does not know that token.")).to_be_visible()
    field.fill(token)
    show.click()
    expect(row_of(page, "secret")).to_contain_text("awaiting weights")
    expect(field).to_be_hidden()
    page.reload()
    expect(row_of(page, "secret")).to_be_visible()

    assert page.evaluate("JSON.stringify([document.cookie, {...localStorage}])") == '["",{}]'
    assert not any(token in url for url in browsing.requests)
    assert token not in server.log


def test_no_token_is_asked_for_without_need(server: Any, browsing: Browsing) -> None:
    """A server without tokens shows no field for one."""
    page = browsing.open(server.url)
    expect(page.get_by_role("status")).to_have_text("live")
    expect(page.get_by_label("Token")).to_be_hidden()


def test_names_are_text(server: Any, browsing: Browsing, run_name: str) -> None:
    """Markup in a name of a run, an average or a device stays text, even if a server let it through."""
    create(server, run_name)
    hostile = "<img src=x onerror='window.hacked = true'>"

    def with_hostile_names(route: Any) -> None:
        body = route.fetch().json()
        run = next(run for run in body["runs"] if run["run"] == run_name)
        run["run"] = run["device"] = run["averages"][0]["name"] = hostile
        route.fulfill(json=body)

    browsing.page.route("**/v1/runs", with_hostile_names)
    browsing.page.route("**/snapshots", lambda route: route.fulfill(json={"snapshots": []}))
    page = browsing.open(server.url)
    page.get_by_role("button", name=hostile).click()

    expect(page.get_by_role("table", name="Averages")).to_contain_text(hostile)
    expect(row_of(page, hostile)).to_contain_text(hostile)
    assert page.locator("main img").count() == 0
    assert page.evaluate("window.hacked") is None


def test_no_runs_yet(start_server: Callable[..., Any], browsing: Browsing) -> None:
    """An empty server shows the lines of a trainer that creates a run there; a run takes their place."""
    server = start_server(memory=True)
    page = browsing.open(server.url)
    empty = page.get_by_role("region", name="No runs yet")
    expect(empty).to_contain_text("from ema_client import RemoteEma")
    expect(empty).to_contain_text(f'url="{server.url}"')

    create(server, "first")
    expect(page.get_by_role("button", name="first")).to_be_visible()
    expect(empty).to_be_hidden()
    page.get_by_role("button", name="first").click()
    expect(page.get_by_text("--memory")).to_be_visible()


def test_lost_connection(server: Any, browsing: Browsing, run_name: str) -> None:
    """While the server does not answer the page says so and keeps the last numbers; afterwards it goes on by itself."""
    create(server, run_name)
    page = browsing.open(server.url)
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


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_are_kept_to_this_server(server: Any, path: str) -> None:
    """Both pages tell the browser to run no inline script and to load nothing from elsewhere."""
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
