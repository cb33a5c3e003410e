"""A page in a real browser, and the runs that it shows.

Knows how a browser is found and started, what a page must not do, and how a run is made. Does not know the pages.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

__all__ = ["CHROMIUM", "NEEDS_CHROMIUM", "PHONE", "QUIET", "STATE", "Browsing", "create", "put", "send"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="the browser test needs chromium")
QUIET = [
    "--no-sandbox",  # as root, in containers, Chromium does not start otherwise
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]
STATE = {"weight": torch.ones(3, 4), "bias": torch.zeros(4)}
#: A phone's width and height.
PHONE = {"width": 375, "height": 740}


@dataclass
class Browsing:
    """A page, and what went wrong on it. pictures: a folder for screenshots, which pytest keeps for some runs."""

    page: Any
    pictures: Path
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
        return [url for url in self.requests if not url.startswith((f"{origin}/", "data:", "blob:"))]

    def barriers(self, name: str) -> list[str]:
        """What axe-core finds on the page that keeps someone out, by keyboard or reader; a picture is taken first."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python has axe-core")
        self.page.screenshot(path=self.pictures / f"{name}.png", full_page=True)
        found = axe.Axe().run(self.page).response["violations"]
        return [f"{name}: {each['id']}: {node['html'][:120]}" for each in found for node in each["nodes"]]

    def cut_off(self) -> list[str]:
        """Texts that reach beyond the window's width, where nobody can scroll to them; and the page if it is wider."""
        return self.page.evaluate(
            """() => {
                const width = document.documentElement.clientWidth;
                const beyond = [...document.querySelectorAll("main *, header *, footer *")].filter((each) => {
                    const box = each.getBoundingClientRect();
                    const hidden = each.closest("pre, thead, caption, .uplot, [hidden]");
                    return !hidden && box.width > 1 && box.right > width + 1;
                });
                const page = document.documentElement.scrollWidth > width ? ["the page"] : [];
                return [...page, ...beyond.map((each) => each.outerHTML.slice(0, 100))];
            }"""
        )


def create(server: Any, *runs: str, state: dict[str, Tensor] | None = None, **config: Any) -> None:
    """Make runs, which then await their initial weights."""
    layout = [{"name": n, "shape": list(tensor.shape), "dtype": "F32"} for n, tensor in (state or STATE).items()]
    with server.http() as http:
        for run in runs:
            body = {"run": run, "decay": 0.999, "layout": layout, **config}
            http.post("/v1/runs", json=body).raise_for_status()


def put(server: Any, path: str, state: dict[str, Tensor] | None = None) -> None:
    """PUT a state's bytes, or nothing."""
    with server.http() as http:
        http.put(path, content=None if state is None else save(state)).raise_for_status()


def send(server: Any, method: str, path: str, **body: Any) -> None:
    """A request with a JSON body."""
    with server.http() as http:
        http.request(method, path, json=body).raise_for_status()
