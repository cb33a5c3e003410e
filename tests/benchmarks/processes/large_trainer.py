"""Process: the first minutes of a trainer with a large model, as the trainer sees them.

``large_trainer URL SERVER_PID DURABILITY WIDTH TENSORS UPDATES PAUSE`` says ``told JSON``: seconds of the
constructor, of each update, and of a scope; the server's memory after each update, and the bytes that the
server wrote to disks meanwhile.

Knows the public client. Does not know the benchmark.
"""

from __future__ import annotations

import json
import sys
from time import perf_counter, sleep

import torch
from torch import nn

from ema_client import RemoteEma
from ema_service.bench.machine import share_bytes, written_bytes


class Model(nn.Module):
    def __init__(self, width: int, tensors: int) -> None:
        super().__init__()
        made = (torch.full((width, width), 0.01 * (number % 7)) for number in range(tensors))
        self.weights = nn.ParameterList([nn.Parameter(tensor) for tensor in made])


def main() -> None:
    url, server, durability = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    width, tensors, updates, pause = int(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6]), float(sys.argv[7])
    torch.set_num_threads(1)
    model = Model(width, tensors)
    start = perf_counter()
    ema = RemoteEma(model, 0.9999, run="large", url=url, durability=durability)  # type: ignore[arg-type]
    constructor = perf_counter() - start
    written, calls, shares = written_bytes(server) or 0, list[float](), list[int]()
    for _ in range(updates):
        start = perf_counter()
        ema(model)
        calls.append(perf_counter() - start)
        sleep(pause)
        shares.append(share_bytes(server) or 0)
    ema.flush()
    written = (written_bytes(server) or 0) - written
    start = perf_counter()
    with ema.scope(model):
        pass
    scope = perf_counter() - start
    told = {"constructor": constructor, "updates": calls, "shares": shares, "written": written, "scope": scope}
    ema.close()
    sys.stdout.write(f"told {json.dumps(told)}\n")


if __name__ == "__main__":
    main()
