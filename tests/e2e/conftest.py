"""A browser for the tests that look at pages.

Knows how a browser is started and ended. Does not know the pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.browser import CHROMIUM, QUIET, Browsing


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser test needs the package playwright")
    # The page asks every two seconds; a busy machine may take longer to answer.
    sync_api.expect.set_options(timeout=20_000)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def browsing(browser: Any, tmp_path: Path) -> Iterator[Browsing]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    made = Browsing(context.new_page(), tmp_path)
    yield made
    # A request may be on its way through a test's route.
    made.page.unroute_all(behavior="ignoreErrors")
    context.close()
