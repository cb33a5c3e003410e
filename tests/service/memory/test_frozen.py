"""Frozen weights: one copy for all readers of a version, dropped with the last, within a budget.

Knows arenas and who reads them. Does not know runs.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch

from ema_client.errors import Overloaded
from ema_client.protocol import TensorSpec
from ema_service.memory import Arena, FrozenWeights, Layout, Memory

LAYOUT = Layout([TensorSpec("w", (256,), "F32")])
SIZE = LAYOUT.shadow_bytes


@pytest.fixture
def make_arena(memory: Memory) -> Callable[[int], Arena]:
    def make(value: int) -> Arena:
        arena = memory.new_arena(LAYOUT)
        arena.tensor.fill_(value)
        return arena

    return make


def test_readers_of_one_version_share_it(memory: Memory, make_arena: Callable[[int], Arena]) -> None:
    """A version costs its bytes once, however many read it, until the last is done."""
    frozen, arena = FrozenWeights(memory, 10 * SIZE), make_arena(3)
    first, second = frozen.acquire(arena), frozen.acquire(arena)

    assert bytes(first) == bytes(second) == b"\x03" * SIZE
    assert frozen.bytes_in_use == SIZE
    frozen.release(arena)
    assert frozen.bytes_in_use == SIZE
    frozen.release(arena)
    assert frozen.bytes_in_use == 0


def test_reading_on_the_cpu_copies_nothing(memory: Memory, make_arena: Callable[[int], Arena]) -> None:
    """On the CPU the bytes are the arena's own."""
    frozen, arena = FrozenWeights(memory, SIZE), make_arena(1)
    data = frozen.acquire(arena)
    arena.tensor[5] = 99

    assert data[5] == 99


def test_device_memory_is_copied_once(memory: Memory, make_arena: Callable[[int], Arena]) -> None:
    """Where shadows live elsewhere, all readers share one host copy, and it is freed with the last."""
    memory.on_host = False  # as on a device, with the CPU as the device
    frozen, arena = FrozenWeights(memory, SIZE), make_arena(1)
    first, second = frozen.acquire(arena), frozen.acquire(arena)
    first[5] = 99

    assert (second[5], int(arena.tensor[5])) == (99, 1)
    frozen.release(arena)
    frozen.release(arena)
    del first, second
    gc.collect()
    assert memory.pool.idle_bytes == SIZE


def test_budget_bounds_the_versions_held(memory: Memory, make_arena: Callable[[int], Arena]) -> None:
    """Beyond the budget another version is refused with a time to come back; a held one can always be shared."""
    frozen = FrozenWeights(memory, 2 * SIZE)
    arenas = [make_arena(value) for value in range(3)]
    frozen.acquire(arenas[0])
    frozen.acquire(arenas[1])

    with pytest.raises(Overloaded) as refusal:
        frozen.acquire(arenas[2])
    assert refusal.value.retry_after
    assert "frozen_bytes" in refusal.value.detail
    frozen.acquire(arenas[1])
    frozen.release(arenas[0])
    assert bytes(frozen.acquire(arenas[2])) == b"\x02" * SIZE


def test_one_version_is_always_possible(memory: Memory, make_arena: Callable[[int], Arena]) -> None:
    """A budget smaller than the model still lets one version be read."""
    assert len(FrozenWeights(memory, 1).acquire(make_arena(0))) == SIZE


def test_a_reader_who_is_done_does_not_wait_for_a_copy(
    memory: Memory, make_arena: Callable[[int], Arena], monkeypatch: pytest.MonkeyPatch
) -> None:
    """release() runs on the event loop: it returns while another version is still being copied from a device."""
    frozen, read, copied = FrozenWeights(memory, 10 * SIZE), make_arena(1), make_arena(2)
    frozen.acquire(read)
    begun, go_on = threading.Event(), threading.Event()

    def slow(tensor: torch.Tensor) -> torch.Tensor:
        begun.set()
        assert go_on.wait(30)
        return tensor

    monkeypatch.setattr(memory, "to_host", slow)
    copying = threading.Thread(target=frozen.acquire, args=(copied,), daemon=True)
    copying.start()
    assert begun.wait(30)
    releasing = threading.Thread(target=frozen.release, args=(read,), daemon=True)
    releasing.start()
    releasing.join(30)
    finished = not releasing.is_alive()
    go_on.set()
    copying.join(30)
    assert finished
    assert frozen.bytes_in_use == SIZE


def test_a_copy_that_fails_is_not_counted(
    memory: Memory, make_arena: Callable[[int], Arena], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no memory for the copy the reader is told, and the budget is as before."""
    frozen = FrozenWeights(memory, SIZE)

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(memory, "to_host", fail)
    with pytest.raises(MemoryError):
        frozen.acquire(make_arena(1))
    assert frozen.bytes_in_use == 0
