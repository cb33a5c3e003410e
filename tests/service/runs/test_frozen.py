"""Frozen weights: one copy for all readers of a version, dropped with the last, within a budget.

Knows arenas and who reads them. Does not know runs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from ema_client.errors import Overloaded
from ema_client.protocol import TensorSpec
from ema_service.runs import Arena, FrozenWeights, Layout, Memory

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
