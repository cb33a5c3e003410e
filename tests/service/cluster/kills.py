"""How long an update takes that is sent right after a program of a cluster was killed.

    python -m tests.service.cluster.kills [TIMES]

Knows which programs there are, and the bounds that a user may count on. Does not know who starts them again.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from ema_client import EmaClient
from ema_client.errors import EmaError
from tests.service.cluster.launched import Launched

__all__ = ["BOUNDS", "seconds_after"]

#: By program, the seconds until the update is answered: median and worst, on a machine that has little else to do.
BOUNDS = {"host 1": (4.0, 8.0), "coordinator": (3.0, 6.0)}
#: Seconds between two kills: a program that ends sooner after its start is held for one that cannot start, and is
#: started again later.
_PAUSE = 4.0


def seconds_after(cluster: Launched, program: str, times: int) -> Iterator[float]:
    """For each of so many kills, the seconds until an update is answered that was sent right after."""
    state = {"w": torch.zeros(300, 50)}
    run = f"after-{program.replace(' ', '-')}"
    with EmaClient(cluster.url) as client:
        client.create_run(run, state)
        for step in range(0, 2 * times, 2):
            client.push(run, state, step=step + 1)
            time.sleep(_PAUSE)
            began = time.perf_counter()
            cluster.kill(program, wait=False)
            while not _pushed(client, run, state, step + 2):
                pass
            yield time.perf_counter() - began


def _pushed(client: EmaClient, run: str, state: dict[str, torch.Tensor], step: int) -> bool:
    try:
        return client.push(run, state, step=step).step == step
    except EmaError:
        return False  # after all tries of the client; a trainer would go on, too


def rows(times: int) -> Iterator[str]:
    """A table's rows, one for each program."""
    cluster = Launched(Path(tempfile.mkdtemp()) / "all", "--local", "2").start()
    try:
        yield f"load {os.getloadavg()[0]:.1f}; {times} kills each; seconds until an update is answered"
        yield "killed | median | worst | to be at most"
        for program, (usual, worst) in BOUNDS.items():
            found = list(seconds_after(cluster, program, times))
            yield f"{program} | {median(found):.1f} | {max(found):.1f} | {usual:g}, {worst:g}"
    finally:
        cluster.end()


if __name__ == "__main__":
    for row in rows(int(sys.argv[1]) if len(sys.argv) > 1 else 20):
        print(row, flush=True)  # noqa: T201  # what the script is for
