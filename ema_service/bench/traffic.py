"""One run on a service and three operations on it: push, pull into existing tensors, pull into new ones.

Every push is of the initial weights again. Their average is themselves, to the bit, so a pull can be compared with the
push: a benchmark that moves garbage says so.

Knows tensors and the public client. Does not know clocks, links, or what the figures are for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ema_client import EmaClient
from ema_client.protocol import Durability
from ema_service.bench.children import BenchFailed

__all__ = ["TENSORS", "Traffic", "make_state", "nbytes_of"]

TENSORS = 256
#: Bytes of the smallest tensor: a run of 100 KB has 25 tensors.
SMALLEST_TENSOR = 4000


def make_state(nbytes: int, tensors: int = TENSORS) -> dict[str, Tensor]:
    """Float32 tensors, each with memory of its own, ``nbytes`` in all (to the last four bytes) and of nearly equal
    size.

    Values lie in 0.5..1.5: no denormal slows an operation down.
    """
    elements = max(1, nbytes // 4)
    count = max(1, min(tensors, nbytes // SMALLEST_TENSOR))
    sizes = [elements // count + (i < elements % count) for i in range(count)]
    return {f"layer.{i:03d}.weight": torch.empty(size).uniform_(0.5, 1.5) for i, size in enumerate(sizes)}


def nbytes_of(state: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


class Traffic:
    """A run of one trainer, which may use several clients of one service. Not thread-safe."""

    def __init__(self, run: str, nbytes: int, state: Mapping[str, Tensor] | None = None) -> None:
        """state: of ``nbytes``, to share memory with another run; by default one of this run's own."""
        self.run = run
        self.state = make_state(nbytes) if state is None else state
        self.out = {name: torch.empty_like(tensor) for name, tensor in self.state.items()}
        self.nbytes = nbytes_of(self.state)
        self._step = 0

    def create(self, client: EmaClient, *, durability: Durability | None = None) -> None:
        client.create_run(self.run, self.state, durability=durability)

    def push(self, client: EmaClient, state: Mapping[str, Tensor] | None = None) -> None:
        """Push the run's state, or ``state``, which must have the same values."""
        self._step += 1
        client.push(self.run, self.state if state is None else state, step=self._step)

    def pull_into(self, client: EmaClient) -> None:
        client.pull(self.run, out=self.out)

    def pull_fresh(self, client: EmaClient) -> None:
        """Pull into new tensors, and drop them at once, as an evaluator drops the version before."""
        client.pull(self.run)

    def check(self, client: EmaClient) -> None:
        """Raises BenchFailed unless a pull brings back what was pushed, bit for bit."""
        for tensor in self.out.values():
            tensor.zero_()
        self.pull_into(client)
        wrong = [name for name, tensor in self.state.items() if not torch.equal(tensor, self.out[name])]
        if wrong:
            raise BenchFailed(f"{len(wrong)} tensors came back changed, such as {wrong[0]}")
