"""Process: a FastAPI ``PUT`` that does nothing, under the event loop and HTTP parser that our server uses.

Knows FastAPI. Does not know our server.
"""

from __future__ import annotations

from fastapi import FastAPI
from serving import serve

app = FastAPI()


@app.put("/empty")
async def empty() -> dict[str, int]:
    """Answer at once."""
    return {}


if __name__ == "__main__":
    serve(app, loop="asyncio", http="httptools")
