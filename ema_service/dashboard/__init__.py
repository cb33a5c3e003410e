"""The pages for a browser: the read-only list of all runs at ``/`` and the API's documentation at ``/docs``.

The list asks ``GET /v1/runs`` every two seconds, as anyone else may: the page has no route, no state and no right of
its own. Both pages load nothing from other hosts; their Content-Security-Policy makes the browser enforce that.

Knows its files and the headers they are served with. Does not know runs or weights.
"""

from __future__ import annotations

from fastapi import FastAPI

from ema_service.dashboard.docs import mount_docs
from ema_service.dashboard.page import mount_assets, router

__all__ = ["install"]


def install(app: FastAPI) -> None:
    """Add the pages and their files to ``app``."""
    app.include_router(router)
    mount_docs(app)
    mount_assets(app)
