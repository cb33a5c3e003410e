"""The documentation's site: every page is there, every link leads somewhere, and a browser finds things without a net.

Knows HTML as far as links and anchors go, and Material's search box. Does not know what the pages say.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.e2e.browser import CHROMIUM, NEEDS_CHROMIUM, PHONE, QUIET

ROOT = Path(__file__).resolve().parents[2]

# The build takes as long as half a minute of other tests; pages and their links on GitHub are tested by test_docs.py.
pytestmark = pytest.mark.soak


@dataclass
class Page(HTMLParser):
    """What a page links to and loads, and the anchors that others may link to."""

    targets: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.targets.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as ``make docs`` builds it: a warning is an error there."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]', or make docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    """Each page of the site, read."""
    read = {}
    for path in site.rglob("*.html"):
        read[path] = Page()
        read[path].feed(path.read_text())
    return read


def test_every_document_is_a_page(site: Path, pages: dict[Path, Page]) -> None:
    """Markdown files keep their places, and all are in the navigation of the first page, with the reference."""
    documents = {
        path.relative_to(ROOT)
        for path in ROOT.rglob("*.md")
        if not {"vendor", "node_modules", "build", "dist", "site"} & set(path.relative_to(ROOT).parts)
        and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    }
    expected = {
        path.parent / "index.html" if path.stem == "README" else path.with_suffix(".html") for path in documents
    }
    expected |= {Path("reference") / f"{name}.html" for name in ("RemoteEma", "EmaClient", "errors", "integrations")}
    assert {site / path for path in expected} - set(pages) == set()

    assert not [name for name in ("pages.py", "__pycache__") if (site / name).exists()], "what makes the site is in it"

    reached = {str(path) for path in pages[site / "index.html"].targets}
    sections = {str(next(iter(path.parts))) for path in expected if len(path.parts) > 1}
    assert all(any(target.startswith(f"{section}/") for target in reached) for section in sections - {"tests"})


def _broken(site: Path, pages: dict[Path, Page]) -> Iterator[str]:
    for page, read in pages.items():
        for target in read.targets:
            link = urlsplit(target)
            if link.scheme or link.netloc:
                continue
            path = (page.parent / unquote(link.path)).resolve() if link.path else page
            path = path / "index.html" if path.is_dir() else path
            # The page for addresses that there are not names its files from the site's root.
            if page.name == "404.html":
                continue
            if not (path.is_file() and path.is_relative_to(site)):
                yield f"{page.relative_to(site)}: {target} leads nowhere"
            elif link.fragment and path in pages and unquote(link.fragment) not in pages[path].anchors:
                yield f"{page.relative_to(site)}: {target} has no such anchor"


def test_links_resolve(site: Path, pages: dict[Path, Page]) -> None:
    """Each link, picture, script and style of each page is a file of the site, and has the anchor."""
    assert list(_broken(site, pages)) == []


def test_broken_links_are_seen(site: Path, pages: dict[Path, Page]) -> None:
    """The check above finds a missing page, a missing anchor, and a page of the disk outside of the site."""
    planted = Page()
    planted.targets = ["missing.html", "client/index.html#nowhere", "#nowhere", "../../../etc/hosts"]
    found = list(_broken(site, {**pages, site / "planted.html": planted}))
    assert len(found) == 4


def test_reference_shows_what_docstrings_say(site: Path) -> None:
    """Signatures, arguments and sentences of the docstrings are on the reference's pages."""
    shown = (site / "reference" / "RemoteEma.html").read_text()
    assert all(word in shown for word in ("update_every", "log_to", "kept by the service"))
    assert "sigma_rel" in (site / "reference" / "EmaClient.html").read_text()


@NEEDS_CHROMIUM
def test_search_in_a_browser_without_a_net(site: Path, tmp_path: Path) -> None:
    """From a disk: the search finds a page and opens it; nothing is asked of another host; a phone needs no scrolling
    sideways."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    foreign: list[str] = []
    errors: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page: Any = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda asked: foreign.append(asked.url))
        page.goto((site / "index.html").as_uri())
        page.locator(".md-search__input").first.click()
        page.locator(".md-search__input").first.press_sequentially("fully_shard")
        found = page.locator(".md-search-result__link").first
        found.wait_for(timeout=30_000)
        page.screenshot(path=str(tmp_path / "search.png"))
        found.click()
        page.wait_for_url("**/*.html*")
        assert "fully_shard" in page.locator("article").inner_text()
        page.set_viewport_size(PHONE)
        for name in ("index.html", "client/index.html", "client/stories/fsdp2.html"):
            page.goto((site / name).as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], name
        browser.close()
    assert errors == []
    assert [url for url in foreign if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
