"""Ray Train: two workers train one FSDP2 model, and each sends the service the shards that it holds.

The service is on the same Ray cluster, which knows it by name: no address is handed to anyone. On each node, beside the
client, `pip install 'ray[train]'`.

ema-service cluster up --ray auto --shards 2 --dir /data/ema -- --token-file /data/tokens
ray job submit -- python ray_train_fsdp2.py my-run

Where the service asks for tokens, as above, EMA_SERVICE_TOKEN is in the environment of each node.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray import train
from ray.train.torch import TorchTrainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ema_client import EmaClient, RemoteEma

STEPS = 10


def worker(config: dict[str, Any]) -> None:
    """One of the workers, which Ray Train has joined to a process group (gloo; of workers with GPUs, nccl)."""
    torch.manual_seed(0)  # all workers begin with the same weights
    model = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 64))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    torch.manual_seed(1 + dist.get_rank())  # and see different batches
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with RemoteEma(model, decay=0.99, run=config["run"], url=config["url"]) as ema:
        for _ in range(STEPS):
            clean = torch.randn(32, 64).sign()
            loss = nn.functional.mse_loss(model(clean + torch.randn_like(clean)), clean)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema(model)
    train.report({"loss": loss.item()})


def main(run: str) -> None:
    """Train; then read the EMA as an evaluator does, in any process of the Ray cluster."""
    ray.init()
    url = os.environ.get("EMA_SERVICE_URL", "ray://ema")
    trainer = TorchTrainer(
        worker,
        train_loop_config={"run": run, "url": url},
        scaling_config=train.ScalingConfig(num_workers=2),
    )
    trainer.fit()
    with EmaClient(url) as client:
        weights = client.pull(run)
    print(f"num_updates: {weights.info.num_updates}, {len(weights)} tensors")


if __name__ == "__main__":
    main(sys.argv[1])
