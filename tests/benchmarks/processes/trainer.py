"""Process: a trainer that pushes and pulls with RemoteEma, and says how much memory that took at most.

``trainer URL BYTES PUSHES push|train`` says ``peaks BEFORE AFTER``: its peak once model and client are loaded, and at
the end. With ``train`` a step takes longer than sending does, as in training; with ``push`` it takes no time.

Knows the public client. Does not know the benchmark.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from ema_client import RemoteEma
from ema_service.bench.machine import peak_bytes
from ema_service.bench.traffic import make_state


class Model(nn.Module):
    def __init__(self, nbytes: int) -> None:
        super().__init__()
        for name, tensor in make_state(nbytes).items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(tensor))


def main() -> None:
    url, nbytes, pushes, way = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    # Threads and buffers of the first use belong to torch and the client, not to a model's size.
    with RemoteEma(Model(4096), run=f"client-peak-{way}-warm", url=url) as ema:
        ema.update(Model(4096))
    model = Model(nbytes)
    before = peak_bytes()
    with RemoteEma(model, run=f"client-peak-{way}", url=url) as ema:
        for _ in range(pushes):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.999)
            ema.update(model)
            if way == "train":
                ema.flush()
        ema.copy_to(model)
    sys.stdout.write(f"peaks {before or 0} {peak_bytes() or 0}\n")


if __name__ == "__main__":
    main()
