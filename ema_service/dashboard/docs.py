"""The API's documentation at ``/docs``: Swagger UI, from this server's own disk.

FastAPI's own page loads Swagger UI from a public CDN, which a cluster without internet cannot reach, and which shows a
third party who reads the page. The package fastapi-offline carries the same files; only its files are used here.

Knows where the files are and which of them the page needs. Does not know the routes: Swagger UI reads /openapi.json.
"""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from ema_service.dashboard.page import POLICY, serve_page

__all__ = ["mount_docs"]

#: Swagger UI puts style attributes into the Markdown it renders, and shows its icons from data: URLs.
DOCS_POLICY = POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")


def mount_docs(app: FastAPI) -> None:
    """Serve ``/docs`` and Swagger UI's files. Call it before the rest of /assets is mounted."""
    swagger = StaticFiles(packages=[("fastapi_offline", "static")])
    app.mount("/assets/swagger", swagger, name="swagger")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return serve_page("docs.html", DOCS_POLICY)
