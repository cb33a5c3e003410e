"""Group start: how soon a server serves, and what it takes of the machine while it has nothing to do.

What a server imports is most of both, so the start stands beside the import of torch, which a server on the CPU does
without: it is to serve within 1.2 s on a machine that imports torch in 0.9 s.
The first start on a machine, which compiles the averaging loops, comes before the first round.

Knows how a server is started and its memory measured. Does not know what a server imports.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from time import perf_counter

import torch
from scale import Scale

from ema_client import EmaClient
from ema_service.bench.children import Service
from ema_service.bench.machine import resident_bytes
from ema_service.bench.rows import Group, Need, Row

__all__ = ["measure"]

MEBI = 1 << 20
#: Of the run beside which a server rests, whose memory is not counted: the shadow, and the update that became it.
RUN_BYTES = 100 * MEBI
_UPDATES = 3
TORCH = "import torch"


def measure(scale: Scale, on_step: Callable[[str], object]) -> Group:
    """Raises BenchFailed."""
    on_step("the first start compiles")
    with Service():
        pass
    torch_seconds, ready, rest, beside = list[float](), list[float](), list[float](), list[float]()
    for number in range(scale.rounds):
        on_step(f"round {number + 1} of {scale.rounds}")
        begun = perf_counter()
        subprocess.run([sys.executable, "-c", TORCH], check=True)
        torch_seconds.append(perf_counter() - begun)
        begun = perf_counter()
        with Service() as service:
            ready.append(perf_counter() - begun)
            rest.append((resident_bytes(service.pid) or 0) / MEBI)
            _train(service.url)
            beside.append(((resident_bytes(service.pid) or 0) - 2 * RUN_BYTES) / MEBI)
    rows = (
        Row(TORCH, "s", tuple(torch_seconds)),
        Row("server, ready", "s", tuple(ready), (Need(1.2 / 0.9, TORCH, most=True),)),
        Row("server, no run yet", "MiB", tuple(rest), (Need(250, most=True),)),
        Row("server, a run of 100 MiB left out", "MiB", tuple(beside), (Need(250, most=True),)),
    )
    facts = (
        "files are in the page cache; the server serves on the CPU, and its averaging loops are compiled",
        f"memory is what the process has resident; of the run, {_UPDATES} updates old, two states are left out",
    )
    return Group("start", "start and rest of a server", rows, facts)


def _train(url: str) -> None:
    with EmaClient(url) as client:
        state = {"w": torch.zeros(RUN_BYTES // 4)}
        client.create_run("r", state, decay=0.999)
        for _ in range(_UPDATES):
            client.push("r", state)
