"""A run of very many tensors keeps nobody else waiting: what is long to read is read off the event loop.

Knows the functions that take long, and the thread of the event loop. Does not know how they get off it.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from ema_service.api import create_app
from ema_service.api.routes import runs, weights
from ema_service.api.transfer.lending import LendingProtocol
from ema_service.bodies import incoming
from ema_service.bodies.incoming import LONG_HEADER_BYTES
from ema_service.settings import Settings

NAMES = [f"model.layers.{number}.attention.query.weight" for number in range(4000)]


def body(names: list[str]) -> bytes:
    """A push whose tensors stand in this order: it has to be read unless it is the layout's own."""
    entries = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * at, 4 * at + 4]} for at, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    assert len(header) > LONG_HEADER_BYTES
    return struct.pack("<Q", len(header)) + header + bytes(4 * len(names))


def chunks(data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), 50_000):
        yield data[at : at + 50_000]


@pytest.fixture
def server() -> Iterator[tuple[str, threading.Thread]]:
    """A server in this process: its URL, and the thread of its event loop."""
    config = uvicorn.Config(
        create_app(Settings(data_dir=None)), port=0, http=LendingProtocol, ws="none", lifespan="on", log_config=None
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not running.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}", thread
    running.should_exit = True
    thread.join(30)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[int]]:
    """In which threads the functions that take long ran."""
    threads: dict[str, set[int]] = {}

    def watch(module: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(module, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            threads.setdefault(name, set()).add(threading.get_ident())
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    watch(runs, "_read_config")
    watch(incoming, "parse_header")
    watch(weights, "WeightsStream")
    return threads


@pytest.mark.parametrize("chunked", [False, True], ids=["known length", "in chunks"])
def test_what_takes_long_leaves_the_event_loop(
    chunked: bool, server: tuple[str, threading.Thread], seen: dict[str, set[int]]
) -> None:
    """A config, the header of a push in another order, a wrong one, and the making of an answer."""
    url, loop = server
    layout = [{"name": name, "shape": [1], "dtype": "F32"} for name in NAMES]
    wrong = [*NAMES[:-1], "another"]
    with httpx.Client(base_url=url, timeout=60) as http:
        assert http.post("/v1/runs", json={"run": "r", "layout": layout}).status_code == 201
        for path, names, status in [
            ("weights", NAMES[::-1], 200),
            ("updates/1", NAMES[::-1], 200),
            ("updates/2", wrong, 422),
            ("updates/2", NAMES, 200),
        ]:
            content = chunks(body(names)) if chunked else body(names)
            answer = http.put(f"/v1/runs/r/{path}", content=content)
            assert answer.status_code == status, answer.text[:300]
        assert http.get("/v1/runs/r/weights").status_code == 200

    assert set(seen) == {"_read_config", "parse_header", "WeightsStream"}
    assert all(loop.ident not in threads for threads in seen.values())
