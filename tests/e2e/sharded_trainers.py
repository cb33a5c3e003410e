"""Sharded trainers as processes, each rank one of them, and the unsharded run to compare with.

Knows how ranks are started (ranks.py has what a rank does), and how one dies. Does not know kinds of sharding.
"""

from __future__ import annotations

import contextlib
import json
import runpy
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema_client import EmaClient
from tests.forked import Forked

__all__ = ["WIDTHS", "Trainer", "assert_same", "at", "train", "unsharded"]

_RANKS = Path(__file__).with_name("ranks.py")
_SECONDS = 90.0

#: What torch itself asks of columns (a multiple of the ranks) and of a forward pass in tensor parallel (of two).
WIDTHS = {"columns": 16, "tp": 14}


class Trainer:
    """The ranks of one trainer, which have been started."""

    def __init__(self, folder: Path, world: int, scenes: list[dict[str, Any]], *, straight: bool = False) -> None:
        """scenes: what the ranks train, one after the other (ranks.py). straight: small updates go to several hosts
        past the gateway, as large ones do."""
        folder.mkdir()
        self._folder, self._world, self._scenes = folder, world, scenes
        plan: dict[str, Any] = {"store": str(folder / "store"), "out": str(folder), "world": world, "scenes": scenes}
        plan["straight"] = straight
        (folder / "plan.json").write_text(json.dumps(plan))
        self.processes = []
        for rank in range(world):
            log = folder / f"{rank}.log"
            log.touch()
            self.processes.append(Forked([str(_RANKS), str(folder / "plan.json"), str(rank)], log))

    def end(self, killed: int | None = None) -> dict[str, list[Any]]:
        """Wait for all ranks, and return what each said of each run. killed: the rank that does not end by itself."""
        folder, ranks = self._folder, range(self._world)
        codes = _wait(self.processes)
        logs = "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(folder.glob("*.log")))
        assert codes == [-signal.SIGKILL if rank == killed else 0 for rank in ranks], logs
        runs = [scene["run"] for scene in self._scenes]
        said = {run: [folder / f"{run}.{rank}.json" for rank in ranks] for run in runs}
        return {run: [json.loads(p.read_text()) for p in paths if p.exists()] for run, paths in said.items()}


def train(folder: Path, world: int, scenes: list[dict[str, Any]], killed: int | None = None) -> dict[str, list[Any]]:
    """Start a trainer's ranks, wait for all of them, and return what each said of each run."""
    return Trainer(folder, world, scenes).end(killed)


def _wait(processes: list[Forked]) -> list[int | None]:
    """How each rank ended; None for one that did not, and is killed."""
    deadline = time.monotonic() + _SECONDS
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
    codes = [process.poll() for process in processes]
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait(10)
    return codes


def unsharded(
    client: EmaClient, run: str, width: int, steps: list[int], first: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The same updates pushed whole. first: the weights that the run begins with, by default those of step 0."""
    client.create_run(f"{run}-whole", first or at(width, 0), decay=0.9, step=0)
    for step in steps:
        client.push(f"{run}-whole", at(width, step))
    return dict(client.pull(f"{run}-whole"))


def at(width: int, step: int) -> dict[str, Tensor]:
    """The parameters as of one step."""
    values: dict[str, Tensor] = runpy.run_path(str(_RANKS))["at"](width, step)
    return values


def assert_same(client: EmaClient, run: str, expected: dict[str, Tensor]) -> None:
    found = client.pull(run)
    assert {*found} == {*expected}
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
