"""A device that is none: its memory is the host's, its work is done once someone waits for it.

Knows Memory, whose part it takes. Does not know what is computed there.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ema_service.memory import Memory
from ema_service.tensors import tensor_of
from ema_service.values import Array

__all__ = ["WAIT_SECONDS", "Elsewhere", "Mark"]

WAIT_SECONDS = 30.0


class Mark:
    """Passed once someone waited for it, and the device may go on."""

    def __init__(self, may_go_on: threading.Event) -> None:
        self._may_go_on = may_go_on
        self.passed = False

    def synchronize(self) -> None:
        assert self._may_go_on.wait(WAIT_SECONDS)
        self.passed = True


class Elsewhere(Memory):
    """A device on the host."""

    def __init__(self) -> None:
        super().__init__("cpu", keep_bytes=1 << 24)
        self.on_host = False
        self.marks: list[Mark] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def empty(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)

    def mark(self) -> Mark:
        self.marks.append(Mark(self.may_go_on))
        return self.marks[-1]

    def to_device(self, host: Array) -> Tensor:
        return tensor_of(host).clone()
