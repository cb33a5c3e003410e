"""Process: stock uvicorn and ``request.stream()``, each chunk copied into one buffer made beforehand. Averages nothing.

Knows FastAPI. Does not know our server.
"""

from __future__ import annotations

from fastapi import FastAPI, Request
from serving import serve

app = FastAPI()
buffers: dict[int, bytearray] = {}


@app.put("/push")
async def push(request: Request) -> dict[str, int]:
    """Take the body into the buffer of its length; the first one of a length makes it."""
    length = int(request.headers["content-length"])
    buffer = buffers.setdefault(length, bytearray(length))
    filled = 0
    async for chunk in request.stream():
        buffer[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    return {"bytes": filled}


if __name__ == "__main__":
    serve(app, http="httptools")
