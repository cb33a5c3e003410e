"""The HTTP side of the server: routes, checks of requests, one shape of error, bodies streamed to and from memory.

Knows FastAPI, and which method of ``runs`` answers which route. Does not know how updates are decided, computed or
kept.
"""

from __future__ import annotations

from ema_service.api.app import create_app

__all__ = ["create_app"]
