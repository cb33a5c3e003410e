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

SIZE = 1000

HOLDERS: dict[str, Callable[[Tensor], object]] = {
    "the tensor": lambda lent: lent,
    "a slice": lambda lent: lent[10:20],
    "a tensor of another dtype": lambda lent: lent[:400].view(torch.float32)[3:],
    "a reshaped tensor": lambda lent: lent.view(10, 100)[2],
    "an array": lambda lent: lent.numpy(),
    "a slice of an array": lambda lent: lent.numpy()[5:][3:],
    "a memoryview": lambda lent: lent.numpy().data,
    "a slice of a memoryview": lambda lent: lent.numpy().data[100:200][5:],
    "a cast memoryview": lambda lent: lent.numpy().data.cast("B")[1:],
    "a tensor over a memoryview": lambda lent: torch.frombuffer(lent.numpy().data[8:16], dtype=torch.float64),
    "an array over a memoryview": lambda lent: np.frombuffer(lent.numpy().data[8:], dtype=np.uint8),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_is_lent_until_the_last_view_is_gone(holder: str) -> None:
    """While any kind of view lives, the memory is nobody else's; with its death it is lent again."""
    pool = HostPool(keep_bytes=10 * SIZE)
    lent = pool.lend(SIZE)
    address = lent.data_ptr()
    view = HOLDERS[holder](lent)
    del lent
    gc.collect()
    assert pool.idle_bytes == 0
    other = pool.lend(SIZE)
    assert other.data_ptr() != address

    del view
    gc.collect()
    assert pool.idle_bytes == SIZE
    assert pool.lend(SIZE).data_ptr() == address


def test_bytes_survive_in_a_view() -> None:
    """What a memoryview shows stays as it is while the pool lends and takes back other memory of the same size."""
    pool = HostPool(keep_bytes=10 * SIZE)
    lent = pool.lend(SIZE)
    lent.fill_(7)
    view = lent.numpy().data[100:200]
    del lent
    for value in range(20):
        pool.lend(SIZE).fill_(value)

    assert bytes(view) == b"\x07" * 100


def test_only_memory_of_the_same_size_is_reused() -> None:
    """A buffer is reused for its own size only."""
    pool = HostPool(keep_bytes=10 * SIZE)
    del_me = pool.lend(SIZE)
    address = del_me.data_ptr()
    del del_me

    assert pool.lend(SIZE - 1).data_ptr() != address
    assert pool.lend(SIZE).numel() == SIZE


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
            lent.fill_(mine)
            if lent.numpy().tobytes() != bytes([mine]) * SIZE:
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
    assert HostPool(keep_bytes=SIZE).lend(0).numel() == 0


def test_to_host_on_the_cpu_is_the_memory_itself(memory: Memory) -> None:
    """On the CPU reading costs no copy."""
    tensor = memory.allocate(SIZE)

    assert memory.to_host(tensor).data_ptr() == tensor.data_ptr()


def test_to_host_elsewhere_is_a_copy(memory: Memory) -> None:
    """Where shadows live elsewhere, to_host gives a pooled copy of the same bytes."""
    memory.on_host = False  # as on a device, with the CPU as the device
    tensor = memory.allocate(SIZE)
    tensor.fill_(9)
    copy = memory.to_host(tensor)

    assert copy.data_ptr() != tensor.data_ptr()
    assert torch.equal(copy, tensor)
    del copy
    assert memory.pool.idle_bytes == SIZE


def test_arena_sections_are_views(
    memory: Memory, model: Callable[[int], dict[str, Tensor]], layout_of: Callable[..., Layout]
) -> None:
    """Each section is a flat tensor of the shadow's dtype, a view into one allocation."""
    layout = layout_of(model(0))
    arena = memory.new_arena(layout)
    sections = [arena.section(index) for index in range(len(layout.sections))]

    assert [section.dtype for section in sections] == [torch.float64, torch.float32, torch.float32, torch.float32]
    assert sum(section.nbytes for section in sections) == layout.shadow_bytes == arena.tensor.numel()
    sections[1].fill_(1.0)
    assert torch.equal(arena.section(1), torch.ones_like(sections[1]))


def test_non_finite_tensors_are_named(memory: Memory) -> None:
    """non_finite() lists exactly the tensors with a NaN or an Inf."""
    layout = Layout([TensorSpec(name, (3,), dtype) for name, dtype in zip("abcd", LAYOUT_DTYPES, strict=True)])
    arena = memory.new_arena(layout)
    arena.tensor.zero_()
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
