"""Many evaluators that wait for the next version at one gateway: when they are told, and what each program takes.

    python -m tests.service.cluster.watchers [HOW_MANY ...]

Knows events as lines of a socket, so that thousands of watchers fit on one event loop. Does not know how hosts decide.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import torch

from ema_client import EmaClient
from tests.service.cluster.launched import Launched

__all__ = ["told"]

#: Updates while the watchers are there, of which each is told.
_UPDATES = 20


async def told(url: str, run: str, many: int, act: Callable[[], None]) -> list[float]:
    """When each of so many watchers, on one event loop, was told of the next version, in seconds after ``act``."""
    host, port = url.removeprefix("http://").split(":")
    later: list[float] = []
    all_there, there = asyncio.Event(), 0

    async def watch() -> None:
        nonlocal there
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET /v1/runs/{run}/events HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        while not (await reader.readline()).startswith(b"data:"):
            pass
        there += 1
        if there == many:
            all_there.set()
        while not (await reader.readline()).startswith(b"data:"):
            pass
        later.append(time.monotonic())
        writer.close()

    watching = [asyncio.create_task(watch()) for _ in range(many)]
    async with asyncio.timeout(60):
        await all_there.wait()
        began = time.monotonic()
        await asyncio.to_thread(act)
        await asyncio.gather(*watching)
    return [each - began for each in later]


# --- the program -----------------------------------------------------------------------------------------------------


def _seconds(urls: dict[str, str]) -> dict[str, float]:
    """The processor time that each program has taken, and this one."""
    found = {}
    for name, url in urls.items():
        text = httpx.get(f"{url}/metrics", timeout=30).text
        found[name] = float(re.findall(r"^process_cpu_seconds_total (\S+)$", text, re.MULTILINE)[0])
    return {**found, "watchers": time.process_time()}


async def _load(url: str, run: str, many: int, push: Callable[..., object]) -> float:
    """The seconds of some updates, one after the other, each told to so many watchers."""
    host, port = url.removeprefix("http://").split(":")
    writers: list[asyncio.StreamWriter] = []
    came = asyncio.Semaphore(0)

    async def watch() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        writers.append(writer)
        writer.write(f"GET /v1/runs/{run}/events HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        while line := await reader.readline():
            if line.startswith(b"data:"):
                came.release()

    async def all_told() -> None:
        for _ in range(many):
            await came.acquire()

    watching = [asyncio.create_task(watch()) for _ in range(many)]
    await all_told()
    began = time.monotonic()
    for number in range(1, _UPDATES + 1):
        await asyncio.to_thread(push, step=number)
        await all_told()
    took = time.monotonic() - began
    for writer in writers:
        writer.close()
    await asyncio.gather(*watching, return_exceptions=True)
    return took


def rows(counts: list[int]) -> Iterator[str]:
    """A table's rows, one for each number of watchers."""
    state = {"w": torch.zeros(1000, 25)}
    cluster = Launched(Path(tempfile.mkdtemp()) / "all", "--local", "2").start()
    try:
        programs = r"^(coordinator|gateway|host 0) \| .* listens on (http://\S+)"
        found = dict(re.findall(programs, cluster.log, re.MULTILINE))
        yield f"load {os.getloadavg()[0]:.1f}; {_UPDATES} updates of 100 KB at 2 hosts; ms of a core an update"
        yield f"watchers | told within, s | {' | '.join(found)} | watchers"
        with EmaClient(cluster.url) as client:
            for many in counts:
                run = f"watched-by-{many}"
                client.create_run(run, state)
                before = _seconds(found)
                push = partial(client.push, run, state)
                took = asyncio.run(_load(cluster.url, run, many, push))
                spent = [f"{1000 * (now - before[name]) / _UPDATES:.1f}" for name, now in _seconds(found).items()]
                yield f"{many} | {took / _UPDATES:.3f} | {' | '.join(spent)}"
    finally:
        cluster.end()


if __name__ == "__main__":
    for row in rows([int(word) for word in sys.argv[1:]] or [1, 100, 1000, 3000]):
        print(row, flush=True)  # noqa: T201  # what the script is for
