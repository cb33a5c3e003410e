"""The trainer of ``make cluster-demo``, a process of its own that is part of the Ray cluster: it finds the service by
its name there. Beside the service's EMA it keeps one in process, and compares the two after the last step.

Knows the model, the data, and the cluster's name. Does not know hosts, or that one of them is killed.
"""

from __future__ import annotations

import sys

import torch

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
    from ema_service.cluster.ray_launcher import on_ray

    address, url, run, steps = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with on_ray(address):
        _train(url, run, int(steps))


def _train(url: str, run: str, steps: int) -> None:
    model = Denoiser()
    witness = InProcessEma(model, DECAY)
    training, _ = digits.load()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    with RemoteEma(model, DECAY, run=run, url=url) as ema:
        for step in range(1, steps + 1):
            loss = loss_of(model, training)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            ema(model)
            witness(model)
            report(Progress(step, steps, loss.item()))
        ema.flush()
    with EmaClient(url) as client:
        pulled = client.pull(run)
    proof = compare("pulled EMA = in-process EMA", steps, witness.shadow, pulled)
    report(proof)
    if proof.differing or pulled.info.num_updates != steps:
        sys.exit(f"the EMAs differ: {pulled.info.num_updates} updates counted of {steps}")


if __name__ == "__main__":
    main()
