"""The dashboard's pages, of all runs, of one, and of a cluster's hosts, and their static files.

Knows files and response headers. Does not know runs: the pages' scripts ask the API for them.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

__all__ = ["hosts_router", "mount_assets", "router", "serve_page"]

STATIC = Path(__file__).parent / "static"

#: The Content-Security-Policy of the page. Trainers choose the names of runs; should a name ever reach the page as
#: markup, the browser still runs no script, and loads nothing, that this server did not serve.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

router = APIRouter()
#: Of a gateway alone.
hosts_router = APIRouter()


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The dashboard: all runs of this server, kept up to date."""
    return serve_page("index.html", POLICY)


@router.get("/runs/{run}", include_in_schema=False)
async def run_page(run: str) -> FileResponse:
    """The page of one run, or of one that there isn't: the page's script reads the name in its own address."""
    del run
    return serve_page("run.html", POLICY)


@hosts_router.get("/hosts", include_in_schema=False)
async def hosts_page() -> FileResponse:
    """The hosts of a cluster, and which part of a run each has."""
    return serve_page("hosts.html", POLICY)


def serve_page(name: str, policy: str) -> FileResponse:
    """One of the HTML files. no-cache: after an upgrade of the server, page and script are of the same version."""
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return FileResponse(STATIC / name, headers=headers)


def mount_assets(app: FastAPI) -> None:
    """Serve scripts, styles and pictures under /assets."""
    app.mount("/assets", StaticFiles(directory=STATIC), name="assets")
