"""One process' share of a training, where no framework shows it. Knows torch; does not know frameworks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ema_client import EmaClient
from ema_client.errors import StepNotReached
from ema_client.integrations.replica import Replica
from ema_client.training.kinds import AnySelection
from ema_client.training.plan import ShardedPlan
from ema_client.training.sharded_selection import ShardedSelection


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[nn.Module]:
    """A module whose parameters are DTensors, on the one rank there is."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield fully_shard(nn.Linear(3, 1), mesh=init_device_mesh("cpu", (1,)))
    dist.destroy_process_group()


@pytest.mark.parametrize("moves", [1, 100])
@pytest.mark.filterwarnings("ignore")
def test_all_ranks_read_one_version(client: EmaClient, run_name: str, sharded: nn.Module, moves: int) -> None:
    """Where another rank read another version all read again; where that does not end, the module is as it was."""
    weights = {"weight": torch.ones(1, 3), "bias": torch.ones(1)}
    client.create_run(run_name, weights, decay=0.5, step=0)
    before = sharded.weight.full_tensor().clone()
    asked = []

    def gather(value: Any) -> list[Any]:
        """Two ranks, of which the other has read another version at first."""
        if not isinstance(value, str):
            return [value, value]
        asked.append(value)
        if len(asked) <= moves:
            client.push(run_name, {name: tensor * 0 for name, tensor in weights.items()})
            return [value, "another"]
        return [value, value]

    def choose(model: nn.Module, **_: Any) -> tuple[AnySelection, ShardedPlan]:
        selection = ShardedSelection(model)
        return selection, replace(selection.plan, gather=gather)

    one = Replica(sharded, run=run_name, url=client.url, trains=False, choose=choose)
    if moves == 1:
        one.swap_in()
        assert sharded.weight.full_tensor().equal(client.pull(run_name)["weight"])
        assert len(set(asked)) == 2
        one.swap_out()
    else:
        with pytest.raises(StepNotReached, match="moved on each of 5 times"):
            one.swap_in()
    assert sharded.weight.full_tensor().equal(before)
    assert not one.swapped
    one.close()
