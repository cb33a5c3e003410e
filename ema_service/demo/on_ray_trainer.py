"""One rank of the trainer of ``make cluster-demo``: FSDP2 on CPUs (gloo), each rank with its own slices, which go to
the hosts that have these rows. A rank is part of the Ray cluster, and finds the service by its name there.

Beside the service's EMA rank 0 keeps one in process, of the whole parameters, and compares the two after the last step.

Knows the model, the data, its rank, and the cluster's name. Does not know hosts, or that one of them is killed.
"""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ema_client import EmaClient, RemoteEma
from ema_service.demo import digits
from ema_service.demo.litema import InProcessEma
from ema_service.demo.model import Denoiser
from ema_service.demo.plan import Progress, report
from ema_service.demo.proof import compare
from ema_service.demo.trainer import LEARNING_RATE, loss_of

DECAY = 0.99


def main() -> None:
    """Train, then prove. Ends with status 1 where the EMAs differ."""
    from ema_service.cluster.launching.ray_launcher import on_ray

    address, url, run, steps, rank, world, port = sys.argv[1:]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": world}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        with on_ray(address):
            witness = _train(url, run, int(steps))
            if dist.get_rank() == 0:
                _prove(url, run, int(steps), witness)
    finally:
        dist.destroy_process_group()


def _train(url: str, run: str, steps: int) -> InProcessEma:
    """Train together with the other ranks. Returns the EMA in process; of rank 0 it is kept up."""
    torch.manual_seed(0)  # all ranks begin with the same weights
    model = Denoiser()
    witness = InProcessEma(model, DECAY)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    torch.manual_seed(dist.get_rank())  # and see different batches
    training, _ = digits.load()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    with RemoteEma(model, DECAY, run=run, url=url) as ema:
        for step in range(1, steps + 1):
            loss = loss_of(model, training)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            _wait_for_room(ema)
            ema(model)
            whole = _gathered(model)
            if dist.get_rank() == 0:
                witness.update(whole)
                report(Progress(step, steps, loss.item()))
        ema.flush()
    return witness


def _wait_for_room(ema: RemoteEma) -> None:
    """Wait for as long as a host is away. A trainer trains on after ten seconds, and each rank by itself leaves updates
    out: on a slow machine the EMAs would differ by that alone."""
    while ema.pending > 1:
        time.sleep(0.01)


def _gathered(model: nn.Module) -> dict[str, Tensor]:
    """The whole parameters, on every rank."""
    return {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in model.named_parameters()
    }


def _prove(url: str, run: str, steps: int, witness: InProcessEma) -> None:
    with EmaClient(url) as client:
        pulled = client.pull(run)
    proof = compare("pulled EMA = in-process EMA", steps, witness.shadow, pulled)
    report(proof)
    if proof.differing or pulled.info.num_updates != steps:
        sys.exit(f"the EMAs differ: {pulled.info.num_updates} updates counted of {steps}")


if __name__ == "__main__":
    main()
