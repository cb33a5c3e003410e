"""A server whose shadows lie on a device: its event loop gives the device no work and waits for none of it.

Knows the server in this process, over HTTP, and the threads that reach the device. Does not know how shadows are
computed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from safetensors.torch import load, save
from torch import Tensor

from ema_client import EmaClient
from ema_service.api import create_app
from ema_service.api.transfer.lending import LendingProtocol
from ema_service.memory import Memory
from ema_service.runs import Registry
from ema_service.settings import Settings
from ema_service.storage import open_store
from tests.service.elsewhere import WAIT_SECONDS, Elsewhere, Mark

SIZE = 300_000
LAYOUT = [{"name": "w", "shape": [SIZE], "dtype": "F32"}]
#: Everything by which memory reaches the device, or locks pages for it.
REACHES = ("empty", "landing", "twin", "to_host", "to_device", "mark")


class Watched(Elsewhere):
    """A device that notes which threads reach it, and refuses memory where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: dict[str, set[int]] = {}
        self.full = False
        for name in REACHES:
            setattr(self, name, self._noted(name, getattr(self, name)))

    def _noted(self, name: str, reach: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            self.threads.setdefault(name, set()).add(threading.get_ident())
            if name == "empty" and self.full:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            made = reach(*arguments)
            if isinstance(made, Mark):
                made.synchronize = self._noted("synchronize", made.synchronize)  # type: ignore[method-assign]
            return made

        return noted


class Server:
    def __init__(self, memory: Memory, folder: Path) -> None:
        registry = Registry(memory, open_store(folder), staging_bytes=1 << 24, frozen_bytes=1 << 24)
        app = create_app(Settings(data_dir=folder, checkpoint_interval=0.2), registry)
        config = uvicorn.Config(app, port=0, http=LendingProtocol, ws="none", lifespan="on", log_config=None)
        self.running = uvicorn.Server(config)
        self.loop = threading.Thread(target=self.running.run, daemon=True)
        self.loop.start()
        deadline = time.monotonic() + WAIT_SECONDS
        while not self.running.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.running.servers[0].sockets[0].getsockname()[1]}"


@pytest.fixture
def memory() -> Watched:
    return Watched()


@pytest.fixture
def server(memory: Watched, tmp_path: Path) -> Iterator[Server]:
    made = Server(memory, tmp_path)
    yield made
    made.running.should_exit = True
    made.loop.join(WAIT_SECONDS)


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=WAIT_SECONDS) as made:
        yield made


def tensors(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((SIZE,), value)}


def done(answer: httpx.Response) -> httpx.Response:
    assert answer.is_success, answer.text
    return answer


@pytest.mark.parametrize("durability", ["memory", "process"])
def test_event_loop_leaves_the_device_alone(
    durability: str, server: Server, memory: Watched, http: httpx.Client
) -> None:
    """Small updates, of several averages, whole and in parts, through shared memory too; reads; snapshots; rewinds."""
    averages = [{"name": "ema"}, {"name": "slow", "decay": 0.99999}]
    done(http.post("/v1/runs", json={"run": "r", "layout": LAYOUT, "averages": averages, "durability": durability}))
    done(http.put("/v1/runs/r/weights", content=save(tensors(0.0))))
    done(http.put("/v1/runs/r/updates/1", content=save(tensors(1.0))))
    done(http.put("/v1/runs/r/updates/2/parts/0?of=1", content=save(tensors(2.0))))
    with EmaClient(server.url) as client:
        client.push("r", client.shared_state(tensors(3.0)), step=3)
    done(http.put("/v1/runs/r/snapshots/s"))
    done(http.get("/v1/runs/r/weights"))
    done(http.get("/metrics"))
    done(http.patch("/v1/runs/r", json={"decay": 0.5}))
    done(http.post("/v1/runs/r/rewind", json={"snapshot": "s"}))
    done(http.put("/v1/runs/r/updates/4", content=save(tensors(4.0))))
    time.sleep(0.5)
    done(http.delete("/v1/runs/r"))

    copied_back = {"to_host"} if durability == "memory" else {"twin"}
    assert {"empty", "landing", "mark", "synchronize", *copied_back} <= set(memory.threads)
    assert [name for name, threads in memory.threads.items() if server.loop.ident in threads] == []


@pytest.mark.parametrize("path", ["updates/1", "updates/1/parts/0?of=1"])
def test_device_without_memory(path: str, memory: Watched, http: httpx.Client) -> None:
    """503 overloaded, staging is free again, the run as it was; with memory the same update is applied."""
    done(http.post("/v1/runs", json={"run": "r", "layout": LAYOUT, "use_num_updates": False, "decay": 0.5}))
    done(http.put("/v1/runs/r/weights", content=save(tensors(0.0))))
    memory.full = True
    for _ in range(2):
        refused = http.put(f"/v1/runs/r/{path}", content=save(tensors(1.0)))
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert refused.headers["Retry-After"] == "1"
        assert "CUDA out of memory" in refused.json()["detail"]
    in_use = next(line for line in http.get("/metrics").text.splitlines() if line.startswith("ema_staging_bytes "))
    assert float(in_use.split()[1]) == 0
    memory.full = False
    done(http.put(f"/v1/runs/r/{path}", content=save(tensors(1.0))))

    assert torch.equal(load(done(http.get("/v1/runs/r/weights")).content)["w"], torch.full((SIZE,), 0.5))
