"""Engines that are copied, and what other processes do with the copies: evaluate, train alone, train as DDP's ranks.

Knows torch and, where asked, Lightning. Imported by the processes that torch.multiprocessing and Lightning spawn. Does
not know what the numbers should be.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ema_client import RemoteEma


class Engine(nn.Module):
    """As sgm's DiffusionEngine without Lightning: a model, and its EMA beside."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.model_ema = RemoteEma(self.model, 0.9, **options)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def train_step(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(1.0)
        self.model_ema(self.model)

    def averaged(self) -> dict[str, Tensor]:
        """The model's weights inside a scope, as an evaluation sees them."""
        with self.model_ema.scope(self.model):
            return self.weights()


def _read(_: int, file: Path) -> None:
    engine = torch.load(file, weights_only=False)
    seen = {"averaged": engine.averaged(), "weights": engine.weights(), "updates": engine.model_ema.num_updates}
    torch.save(seen, file.with_suffix(".seen"))


def _train(_: int, file: Path, steps: int) -> None:
    engine = torch.load(file, weights_only=False)
    for _ in range(steps):
        engine.train_step()
    seen = {"averaged": engine.averaged(), "step": engine.model_ema.step}
    engine.model_ema.close()
    torch.save(seen, file.with_suffix(".seen"))


def _rank(rank: int, engine: Engine, folder: Path, steps: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    for parameter in engine.model.parameters():
        parameter.data = parameter.detach().clone()  # torch sent all ranks one memory, which each would train
    before = engine.averaged()
    wrapped = DistributedDataParallel(engine.model)
    optimizer = torch.optim.SGD(engine.model.parameters(), lr=0.1)
    trained = []
    for step in range(steps):
        optimizer.zero_grad()
        wrapped(torch.full((4, 3), float(step + rank))).square().mean().backward()
        optimizer.step()
        engine.model_ema(engine.model)
        trained.append(engine.weights())
    ema = engine.model_ema
    seen = {"before": before, "trained": trained, "averaged": engine.averaged(), "updates": ema.num_updates}
    seen |= {"stats": ema.stats.sent, "step": ema.step}
    ema.close()
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


def _spawned(work: Callable[..., None], *args: Any, processes: int = 1) -> None:
    torch.multiprocessing.spawn(work, args, nprocs=processes)


def read_elsewhere(file: Path) -> dict[str, Any]:
    """What an evaluation of the engine in ``file`` sees in another process."""
    _spawned(_read, file)
    return dict(torch.load(file.with_suffix(".seen")))


def train_elsewhere(file: Path, steps: int) -> dict[str, Any]:
    """What the engine in ``file`` sees after so many more steps in another process."""
    _spawned(_train, file, steps)
    return dict(torch.load(file.with_suffix(".seen")))


def train_ranks(engine: Engine, folder: Path, steps: int) -> list[dict[str, Any]]:
    """What two processes that the engine is sent to see of their training, by rank."""
    (folder / "store").unlink(missing_ok=True)
    _spawned(_rank, engine, folder, steps, processes=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
