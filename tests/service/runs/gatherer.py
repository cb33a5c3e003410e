"""Parts of updates as tests send them, without a socket.

Knows bodies as the safetensors library writes them, and Parts. Does not know HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from ema_client.wire import Box
from ema_service.bodies import UpdateBody
from ema_service.memory import Memory, Staged, Staging
from ema_service.runs import Parts, Run, Terms
from tests.service.elsewhere import Elsewhere

__all__ = ["WAYS", "Gatherer", "Slices", "cut", "large", "part_body", "rows", "shadow_bytes"]

Slices = Mapping[str, Sequence[Box]]

#: Threads that the averaging of complete sets is divided among.
HELPERS = ThreadPoolExecutor(2)


def part_body(tensors: Mapping[str, Tensor], slices: Slices) -> bytes:
    """One part, by the safetensors library: each tensor's slices back to back."""
    data = {}
    for name, boxes in slices.items():
        taken = [tensors[name][tuple(slice(*bounds) for bounds in box)] for box in boxes]
        data[name] = taken[0].contiguous() if len(taken) == 1 else torch.cat([t.reshape(-1) for t in taken])
    return save(data, {"ema.slices": json.dumps({name: list(boxes) for name, boxes in slices.items()})})


class Gatherer:
    """Parts of one run on a budget of their own, sent by bodies."""

    def __init__(self, run: Run, budget: int = 1 << 24) -> None:
        self.run = run
        self.parts = Parts(run)
        self.staging = Staging(Memory("cpu"), budget)

    def reserve(self) -> Staged:
        return self.staging.reserve(self.run.layout, memory=self.run.memory)

    def open(self, step: int | None, index: int, of: int, **terms: Any) -> Any:
        self.parts.admit(step, index, Terms(of, **terms))
        part = self.parts.begin(step, index, Terms(of, **terms), self.reserve)
        self.parts.prepare(part)
        return part

    def send(self, step: int | None, index: int, of: int, body: bytes, piece: int = 1 << 20, **terms: Any) -> Any:
        """The outcome, or the result where the part completed the set."""
        part = self.open(step, index, of, **terms)
        try:
            part.announce(len(body))
            for start in range(0, len(body), piece):
                part.feed(body[start : start + piece])
                part.average(part.arrived)
            part.finish()
            return self.end(part)
        except BaseException:
            self.parts.give_up(part)
            raise

    def end(self, part: Any) -> Any:
        outcome = self.parts.complete(part)
        if outcome == "staged":
            part.average()
        return self.parts.apply(part, HELPERS) if outcome == "complete" else outcome

    def push(self, step: int, tensors: Mapping[str, Tensor]) -> bool:
        """Whether an update that came whole was applied."""
        staged = self.reserve()
        staged.allocate()
        update, body = self.run.begin(step, staged), UpdateBody(staged)
        body.feed(save({entry.name: tensors[entry.name] for entry in self.run.layout.params}))
        body.finish()
        applied = self.run.commit(update).applied
        staged.release()
        return applied


def rows(tensors: Mapping[str, Tensor], index: int, of: int) -> Slices:
    """What fully_shard gives one rank: a chunk of the first dimension; a tensor without one goes to the first rank."""
    slices = {}
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        size = tensor.shape[0] if tensor.dim() else 1
        each = -(-size // of)
        start, stop = min(index * each, size), min((index + 1) * each, size)
        if start < stop:
            rest = tuple((0, s) for s in tensor.shape[1:])
            slices[name] = [((start, stop), *rest) if tensor.dim() else ()]
    return slices


def shadow_bytes(run: Run) -> list[bytes]:
    return [arena.tensor.numpy().tobytes() for arena in run.ready_state().arenas]


#: More than two blocks of the digest in all, none of which ends where a tensor or a row does.
LARGE = {
    "float32": {"a": (torch.float32, (1111, 1301)), "b": (torch.float32, (5, 1501, 1103))},
    "bf16": {"a": (torch.bfloat16, (1111, 1301)), "b": (torch.bfloat16, (7, 1501, 1603))},
    "mixed": {
        "a": (torch.float32, (1111, 1301)),
        "b": (torch.bfloat16, (3, 2001, 3003)),
        "c": (torch.float16, (400_001,)),
    },
    "undivided": {"a": (torch.float64, (501, 1301)), "b": (torch.bfloat16, (3, 701, 2003))},
}

#: What parts of these are tried with: kind, the axis that is cut, and where the memory lies. Half of the ways, in which
#: each kind, axis and memory comes, are the short form.
WAYS = [
    pytest.param(kind, axis, memory, marks=[] if (axis == 0) == (memory is Memory) else [pytest.mark.soak])
    for kind in LARGE
    for axis in (0, -1)
    for memory in (Memory, Elsewhere)
]


def large(kind: str, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random).to(dtype) for name, (dtype, shape) in LARGE[kind].items()}


def cut(tensors: Mapping[str, Tensor], axis: int, index: int, of: int) -> Slices:
    """A chunk of one dimension of each tensor, the last where a tensor has fewer; -1: columns, 0: rows."""
    slices = {}
    for name, tensor in tensors.items():
        along = axis if axis >= 0 else tensor.dim() - 1
        size = tensor.shape[along]
        chunk = size * index // of, size * (index + 1) // of
        if chunk[0] < chunk[1]:
            slices[name] = [tuple(chunk if dim == along else (0, size) for dim, size in enumerate(tensor.shape))]
    return slices
