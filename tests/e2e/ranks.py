"""One rank of a sharded trainer, as test_sharded.py starts it: ``python ranks.py PLAN.json RANK``.

Trains a small model whose parameters are the same whatever the sharding: gradients are made from the step's number, so
that every way of sharding must leave the same average. Knows torch.distributed and our client. Does not know what the
test compares.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ema_client import EmaClient, RemoteEma
from ema_client.errors import EmaError, StaleStep, UpdatesPending
from ema_client.pushing import Pushes


class Model(nn.Module):
    """Sizes that no number of ranks divides, a bias shorter than four ranks, a scalar."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(7, width)
        self.second = nn.Linear(width, 10, bias=False)
        self.tiny = nn.Parameter(torch.ones(3))
        self.dead = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu()) * self.tiny.sum()


def initial(width: int) -> Model:
    torch.manual_seed(0)
    return Model(width)


def set_to(model: nn.Module, width: int, step: int) -> None:
    """Give the whole model the values of one step, each rank its own slices: through the sharding's own means."""
    from ema_client.training.sharding import shards_of

    values = at(width, step)
    with torch.no_grad():
        for name, shard in shards_of(model).items():
            taken = [values[name][tuple(slice(*bounds) for bounds in box)].reshape(-1) for box in shard.boxes]
            if taken:
                shard.local.copy_(torch.cat(taken).view(shard.local.shape))


def at(width: int, step: int) -> dict[str, torch.Tensor]:
    """The parameters as of one step."""
    random = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(p.shape, generator=random) for name, p in initial(width).named_parameters() if p.requires_grad
    }


def shard(model: Model, how: str) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
    from torch.distributed.tensor import Shard

    world = dist.get_world_size()
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if how == "fsdp1-flat":
        return FullyShardedDataParallel(
            model,
            ignored_states=[model.dead],
            sharding_strategy=ShardingStrategy.SHARD_GRAD_OP,
            device_id=torch.device("cpu"),
        )
    if how == "zero3":
        return zero3(model)
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (world,))}
    if how == "hsdp":
        options["mesh"] = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    if how == "columns":
        options["shard_placement_fn"] = lambda p: Shard(1 if p.dim() == 2 and p.shape[1] % world == 0 else 0)
    if how == "tp":
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        options["mesh"] = mesh["dp"]
    fully_shard(model.first, **options)
    return fully_shard(model, **options)


def zero3(model: Model) -> nn.Module:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    os.environ |= {"LOCAL_RANK": os.environ["RANK"], "LOCAL_SIZE": os.environ["WORLD_SIZE"]}
    import deepspeed

    # Beside small parameters that every rank keeps whole, larger ones that are cut up.
    stage = {"stage": 3, "stage3_param_persistence_threshold": 20, "stage3_model_persistence_threshold": 1000}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": stage,
            "zero_allow_untested_optimizer": True,
        },
        dist_init_required=False,
    )
    module: nn.Module = engine
    return module


def main() -> None:
    plan, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    warnings.simplefilter("ignore")
    if plan.get("straight"):
        Pushes.__init__.__kwdefaults__["stretched_above"] = 0
    torch.set_num_threads(1)
    store = dist.FileStore(plan["store"], plan["world"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=plan["world"])
    for scene in plan["scenes"]:
        said = play(scene, rank)
        Path(plan["out"]).joinpath(f"{scene['run']}.{rank}.json").write_text(json.dumps(said))
    if "killed" not in plan["scenes"][-1]:
        dist.barrier()
    os._exit(0)


def play(scene: dict[str, Any], rank: int) -> dict[str, Any]:
    """Train one run; the rank ``killed`` dies before it sends its last update."""
    width, steps, killed = scene["width"], scene["steps"], scene.get("killed")
    model = shard(initial(width), scene["how"])
    set_to(model, width, 0)
    options: dict[str, Any] = {"resume": scene.get("resume", False), "posthoc": "wished" in scene}
    drawn: list[int] = []
    options["log_to"] = lambda _, step: drawn.append(step)
    if "lanes" in scene:
        Pushes.__init__.__kwdefaults__["stretched_above"] = 0
        options["lanes"] = scene["lanes"]
    ema = RemoteEma(model, 0.9, run=scene["run"], url=scene["url"], **options)
    before = load(ema, model, scene) if "loaded" in scene else None
    for step in steps:
        set_to(model, width, step)
        if killed is not None and step == steps[-1]:
            ema.flush()  # what is before it, all ranks have sent
        if (rank, step) == (killed, steps[-1]):
            os.kill(os.getpid(), signal.SIGKILL)
        ema(model)
        time.sleep(scene.get("pause", 0))
    if killed is not None:
        # Of the last step one part is missing: what this rank has to send is sent all the same.
        with contextlib.suppress(UpdatesPending):
            ema.flush(timeout=1.0)
        return {}
    if "pause" in scene:
        flush_patiently(ema)
    said = checks(ema, model, scene) | {"sent": ema.stats.sent, "left out": ema.stats.skipped, "before": before}
    ema.close()
    return said | {"drawn": drawn}


def flush_patiently(ema: RemoteEma) -> None:
    """Flush, again while the service is away, or where updates were lost: where ranks leave updates out while it is."""
    end = time.monotonic() + 60
    while True:
        try:
            return ema.flush()
        except EmaError as fault:
            if not (fault.retryable or isinstance(fault, StaleStep)) or time.monotonic() > end:
                raise


def load(ema: RemoteEma, model: nn.Module, scene: dict[str, Any]) -> bool:
    """Load weights after the constructor, and make the first step of an optimizer, which moves nothing.

    Returns whether a scope before that step had the loaded weights; a sharded model's has those of the constructor.
    """
    from ema_client.training.sharding import shards_of

    # Of a sharded model one rank alone, as where a rank's tensors have no weights to be loaded.
    if scene["loaded by"] in (None, dist.get_rank()):
        set_to(model, scene["width"], scene["loaded"])
    now = {name: shard.local.detach().clone() for name, shard in shards_of(model).items()}
    with ema.scope(model):
        before = all(torch.equal(shard.local, now[name]) for name, shard in shards_of(model).items())
    # No rank trains on before every rank has read.
    dist.barrier()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    return before


def checks(ema: RemoteEma, model: nn.Module, plan: dict[str, Any]) -> dict[str, Any]:
    """What only this process can see, as JSON."""
    from ema_client.training.kinds import choose
    from ema_client.training.sharding import shards_of

    out: dict[str, Any] = {"num_updates": ema.num_updates}
    wished = plan.get("wished", {})
    batch = torch.ones(2, 7)
    with torch.no_grad():
        before = model(batch)
        with ema.scope(model, **wished):
            inside = model(batch)
        after = model(batch)
    reference = initial(plan["width"])
    with EmaClient(plan["url"]) as client:
        pulled = client.pull(plan["run"], **wished)
    reference.load_state_dict(dict(pulled), strict=False)
    with torch.no_grad():
        out["inside"] = torch.allclose(inside, reference(batch), rtol=1e-4, atol=1e-4)
    out["changed"] = not torch.equal(before, inside)
    out["after"] = torch.equal(before, after)
    ema.copy_to(model, **wished)
    out["own"] = all(
        torch.equal(
            shard.local.reshape(-1),
            torch.cat([pulled[name][tuple(slice(*b) for b in box)].reshape(-1) for box in shard.boxes]),
        )
        for name, shard in shards_of(model).items()
        if shard.boxes
    )
    selection, parts = choose(model)
    out["elements"] = sum(t.numel() for t in selection.of(model)[0]) if parts.part is not None else 0
    return out


if __name__ == "__main__":
    main()
