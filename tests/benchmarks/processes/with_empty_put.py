"""Process: ``ema_service`` with one route more, a ``PUT`` that does nothing: what any request costs this server.

Knows where the service makes its application. Does not know what it serves.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from ema_service.api import server
from ema_service.cli import main

create_app = server.create_app


async def empty() -> dict[str, int]:
    """Answer at once."""
    return {}


def with_empty_put(*args: Any) -> FastAPI:
    app = create_app(*args)
    app.put("/empty")(empty)
    return app


if __name__ == "__main__":
    server.create_app = with_empty_put
    main()
