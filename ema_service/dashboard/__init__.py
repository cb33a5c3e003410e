"""What a browser gets: the read-only page of all runs at ``/`` and the API's documentation at ``/docs``.

The page asks ``GET /v1/runs`` every two seconds, as anyone else may: it has no route, no state and no right of its own.
Both pages work without any other host; their Content-Security-Policy makes the browser hold them to that.

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
