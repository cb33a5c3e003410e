"""Pooled memory: it comes back when nobody can see it any more, and not before.

Knows references. Does not know runs.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ema_client.protocol import LAYOUT_DTYPES, TensorSpec
from ema_service.memory import Arena, Layout, Memory
from ema_service.memory.arena import buffer_bytes, param_offset
from ema_service.memory.pool import HostPool
from ema_service.tensors import tensor_of
from ema_service.values import Array, address

SIZE = 1000

HOLDERS: dict[str, Callable[[Array], object]] = {
    "the array": lambda lent: lent,
    "a slice": lambda lent: lent[10:20],
    "a slice of a slice": lambda lent: lent[10:][5:],
    "an array of another dtype": lambda lent: lent[:400].view(np.float32)[3:],
    "a reshaped array": lambda lent: lent.reshape(10, 100)[2],
    "a tensor": tensor_of,
    "a slice of a tensor": lambda lent: tensor_of(lent)[5:][3:],
    "a tensor of another dtype": lambda lent: tensor_of(lent)[:400].view(torch.float32)[3:],
    "an array of a tensor of a slice": lambda lent: tensor_of(lent[8:]).numpy()[3:],
    "a memoryview": lambda lent: lent.data,
    "a slice of a memoryview": lambda lent: lent.data[100:200][5:],
    "a cast memoryview": lambda lent: lent.data.cast("B")[1:],
    "a tensor over a memoryview": lambda lent: torch.frombuffer(lent.data[8:16], dtype=torch.float64),
    "an array over a memoryview": lambda lent: np.frombuffer(lent.data[8:], dtype=np.uint8),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_is_lent_until_the_last_view_is_gone(holder: str) -> None:
    """While any kind of view lives, the memory is nobody else's; with its death it is lent again."""
    pool = HostPool(keep_bytes=10 * SIZE)
    lent = pool.lend(SIZE)
    before = address(lent)
    view = HOLDERS[holder](lent)
    del lent
    gc.collect()
    assert pool.idle_bytes == 0
    other = pool.lend(SIZE)
    assert address(other) != before

    del view
    gc.collect()
    assert pool.idle_bytes == SIZE
    assert address(pool.lend(SIZE)) == before


def test_bytes_survive_in_a_view() -> None:
    """What a memoryview shows stays as it is while the pool lends and takes back other memory of the same size."""
    pool = HostPool(keep_bytes=10 * SIZE)
    lent = pool.lend(SIZE)
    lent.fill(7)
    view = lent.data[100:200]
    del lent
    for value in range(20):
        pool.lend(SIZE).fill(value)

    assert bytes(view) == b"\x07" * 100


def test_only_memory_of_the_same_size_is_reused() -> None:
    """A buffer is reused for its own size only."""
    pool = HostPool(keep_bytes=10 * SIZE)
    del_me = pool.lend(SIZE)
    before = address(del_me)
    del del_me

    assert address(pool.lend(SIZE - 1)) != before
    assert len(pool.lend(SIZE)) == SIZE


def test_pool_keeps_no_more_than_it_may() -> None:
    """Idle memory beyond keep_bytes goes back to the system; with keep_bytes 0 nothing is kept."""
    pool, none = HostPool(keep_bytes=2 * SIZE), HostPool()
    lent = [pool.lend(SIZE) for _ in range(5)] + [none.lend(SIZE)]
    del lent
    gc.collect()

    assert pool.idle_bytes == 2 * SIZE
    assert none.idle_bytes == 0


def test_two_holders_never_share_memory() -> None:
    """Threads that lend and drop in a hurry never see each other's bytes."""
    pool, faults = HostPool(keep_bytes=4 * SIZE), []

    def work(mine: int) -> None:
        for _ in range(300):
            lent = pool.lend(SIZE)
            lent.fill(mine)
            if lent.tobytes() != bytes([mine]) * SIZE:
                faults.append(mine)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert not faults
    assert pool.idle_bytes <= 4 * SIZE


def test_nothing_can_be_lent() -> None:
    """A run of empty tensors needs a buffer of 0 bytes."""
    assert HostPool(keep_bytes=SIZE).lend(0).size == 0


def test_to_host_on_the_cpu_is_the_memory_itself(memory: Memory) -> None:
    """On the CPU reading costs no copy."""
    data = memory.allocate(SIZE)

    assert memory.to_host(data) is data


def test_to_host_elsewhere_is_a_copy(memory: Memory) -> None:
    """Where shadows live elsewhere, to_host gives a pooled copy of the same bytes."""
    memory.on_host = False  # as on a device, with the CPU as the device
    data = memory.allocate(SIZE)
    data.fill_(9)
    copy = memory.to_host(data)

    assert address(copy) != address(data)
    assert copy.tolist() == data.tolist()
    del copy
    assert memory.pool.idle_bytes == SIZE


def test_arena_sections_are_views(
    memory: Memory, model: Callable[[int], dict[str, Tensor]], layout_of: Callable[..., Layout]
) -> None:
    """Each section is a flat array of the shadow's dtype, a view into one allocation."""
    layout = layout_of(model(0))
    arena = memory.new_arena(layout)
    sections = [arena.section(index) for index in range(len(layout.sections))]

    assert [section.dtype for section in sections] == [np.float64, np.float32, np.float32, np.float32]
    assert sum(section.nbytes for section in sections) == layout.shadow_bytes == len(arena.data)
    sections[1].fill(1.0)
    assert (arena.section(1) == 1.0).all()


def test_non_finite_tensors_are_named(memory: Memory) -> None:
    """non_finite() lists exactly the tensors with a NaN or an Inf."""
    layout = Layout([TensorSpec(name, (3,), dtype) for name, dtype in zip("abcd", LAYOUT_DTYPES, strict=True)])
    arena = memory.new_arena(layout)
    arena.data.fill(0)
    assert arena.non_finite() == []
    arena.section(0)[2] = float("nan")
    arena.section(2)[0] = float("-inf")

    assert arena.non_finite() == ["a", "c"]


@given(st.lists(st.tuples(st.sampled_from(list(LAYOUT_DTYPES)), st.integers(0, 50)), min_size=1, max_size=6))
def test_parameters_lie_where_shadows_reach_them_last(sizes: list[tuple[str, int]]) -> None:
    """In the shared buffer no shadow ends behind a parameter that is still to be read, in any mix of dtypes."""
    layout = Layout([TensorSpec(f"t{i}", (size,), dtype) for i, (dtype, size) in enumerate(sizes)])
    offset = param_offset(layout)

    assert offset % 64 == 0
    assert offset + layout.param_bytes <= buffer_bytes(layout)
    assert layout.shadow_bytes <= buffer_bytes(layout)
    for param, shadow in zip(layout.params, layout.shadows, strict=True):
        assert shadow.end <= offset + param.end
        assert shadow.begin <= offset + param.begin


def test_arena_has_no_more_than_its_shadows(memory: Memory) -> None:
    """A buffer larger than the shadows (parameters are aligned) makes an arena of the shadows alone."""
    layout = Layout([TensorSpec("w", (3,), "BF16")])

    assert Arena(layout, memory.allocate(buffer_bytes(layout))).tensor.numel() == 12
