"""What the tests of all frameworks share. Knows modules and LitEma's arithmetic; does not know a framework."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_client import EmaClient


@pytest.fixture
def client(server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmaClient]:
    """A client of the shared server, which is also where RemoteEma looks by default."""
    monkeypatch.setenv("EMA_SERVICE_URL", server.url)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with EmaClient(server.url) as made:
        yield made


@pytest.fixture
def trained() -> Callable[[nn.Module], dict[str, Tensor]]:
    """Copies of the parameters that are trained, by name."""

    def copies(module: nn.Module) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    return copies


@pytest.fixture
def same() -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], bool]:
    """Whether two sets of tensors are equal, bit for bit."""

    def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
        return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)

    return equal


@pytest.fixture(scope="session")
def play(server: Any) -> Callable[..., dict[str, list[dict[str, Any]]]]:
    """Run scenes, one after the other, in a program of two ranks or of one process: what each rank saw, by scene."""

    def run(program: str, folder: Path, scenes: list[dict[str, Any]], *, ranks: int) -> dict[str, list[dict[str, Any]]]:
        path = folder / f"scenes-{ranks}.json"
        path.write_text(json.dumps(scenes))
        env = {**os.environ, "EMA_SERVICE_URL": server.url, "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
        env |= {"OMP_NUM_THREADS": "1"}
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launch, str(Path(__file__).parent / "programs" / program), str(path)]
        with (folder / f"{ranks}.log").open("w+") as log:
            process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
            try:
                code = process.wait(200)
            finally:
                # Not kill(): torchrun ends its ranks.
                process.terminate()
                process.wait(60)
            log.seek(0)
            assert code == 0, log.read()[-5000:]
        return {
            scene["name"]: [torch.load(folder / f"{scene['name']}.{rank}.pt") for rank in range(ranks)]
            for scene in scenes
        }

    return run


@pytest.fixture(scope="session")
def joined() -> Callable[[list[Mapping[str, Tensor]]], dict[str, Tensor]]:
    """Whole tensors, flattened, of what ranks hold of them in their order; of one process' as well."""

    def join(ranks: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([rank[name].reshape(-1) for rank in ranks]) for name in ranks[0] if name != "output"}

    return join
