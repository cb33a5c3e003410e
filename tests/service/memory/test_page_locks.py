"""Host memory that is page-locked for a device: unlocked once the memory is dead, and by a thread.

Knows the pool, and the three calls of CUDA that it makes, which are played. Does not know a real device.
"""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from ema_service.memory.budget import Budget
from ema_service.memory.pool import HostPool
from ema_service.values import address

WAIT_SECONDS = 30.0
SIZE = 1 << 16
DEVICE = "cuda:1"


class Runtime:
    """CUDA's runtime: which addresses are locked, and which threads waited for which devices."""

    def __init__(self) -> None:
        self.locked: set[int] = set()
        self.waited: list[tuple[str, int]] = []
        self.idle = threading.Event()
        self.idle.set()
        self.broken = False

    def cudaHostRegister(self, address: int, nbytes: int, _: int) -> int:
        assert nbytes == SIZE
        self.locked.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> None:
        self.locked.remove(address)

    def synchronize(self, device: str) -> None:
        self.waited.append((device, threading.get_ident()))
        assert self.idle.wait(WAIT_SECONDS)
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    return made


@pytest.mark.parametrize("broken", [False, True], ids=["a device at work", "a device that failed"])
def test_unlocked_elsewhere(broken: bool, runtime: Runtime) -> None:
    """Who drops the last view, such as the event loop, waits for no device; who needs the memory does."""
    pool = HostPool(pinned_for=DEVICE, budget=Budget(SIZE))
    runtime.broken = broken
    lent = pool.lend(SIZE)
    assert address(lent) in runtime.locked
    runtime.idle.clear()
    del lent
    gc.collect()
    assert len(runtime.locked) == 1
    runtime.idle.set()
    again = pool.lend(SIZE)
    del again
    gc.collect()
    pool._locks.settle()

    assert runtime.locked == set()
    assert {device for device, _ in runtime.waited} == {DEVICE}
    assert threading.get_ident() not in {thread for _, thread in runtime.waited}


def test_idle_memory_is_unlocked_before_it_counts_as_free(runtime: Runtime) -> None:
    """Memory that is given up for new memory is the system's again by the time the new memory is taken."""
    pool = HostPool(pinned_for=DEVICE, keep_bytes=SIZE, budget=Budget(SIZE))
    pool.lend(SIZE)
    gc.collect()
    assert pool.idle_bytes == SIZE
    pool.claim(SIZE)

    assert runtime.locked == set()
