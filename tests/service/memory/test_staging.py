"""The budget of pushes: what is taken, given back, refused.

Knows layouts and memory. Does not know bodies, sockets or runs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from ema_client.errors import BodyTooLarge, Overloaded
from ema_client.protocol import TensorSpec
from ema_client.wire import build_header, place
from ema_service.bodies import UpdateBody
from ema_service.memory import Layout, Memory, Staged, Staging
from ema_service.memory.arena import buffer_bytes

TENSORS = {
    "b": torch.tensor([1.5, -2.0, 3.25]),
    "a": torch.tensor([[0.5], [4.0]], dtype=torch.bfloat16),
    "z": torch.zeros(0, 3),
    "s": torch.tensor(7.0, dtype=torch.float64),
}
SPECS = {
    "b": TensorSpec("b", (3,), "F32"),
    "a": TensorSpec("a", (2, 1), "BF16"),
    "z": TensorSpec("z", (0, 3), "F32"),
    "s": TensorSpec("s", (), "F64"),
}
LAYOUT = Layout(list(SPECS.values()))
CANONICAL = save(TENSORS)
DATA = CANONICAL[len(LAYOUT.header) :]


def body_in_order(*names: str) -> bytes:
    """A well-formed body whose tensors lie in this order."""
    raw = {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in TENSORS.items()}
    return build_header(place([SPECS[name] for name in names], sort=False)) + b"".join(raw[name] for name in names)


BODIES = {
    "canonical": CANONICAL,
    "with metadata": save(TENSORS, {"format": "pt"}),
    "reversed": body_in_order("z", "a", "b", "s"),
    "permuted": body_in_order("a", "z", "s", "b"),
}


def feed(update: UpdateBody, body: bytes, size: int) -> None:
    for piece in pieces(body, size):
        update.feed(piece)


def pieces(body: bytes, size: int) -> Iterator[bytes]:
    return (body[at : at + size] for at in range(0, len(body), size))


@pytest.fixture
def staged(memory: Memory) -> Staged:
    staged = Staged(LAYOUT, memory)
    staged.data[:] = b"\xee" * len(staged.data)
    return staged


# --- the budget -----------------------------------------------------------------------------------------------------

NEEDED = buffer_bytes(LAYOUT)


def test_budget_is_taken_and_given_back(memory: Memory) -> None:
    """Pushes in flight are counted; beyond the budget Overloaded, with a time to come back; release makes room."""
    staging = Staging(memory, 2 * NEEDED)
    first, _second = staging.reserve(LAYOUT), staging.reserve(LAYOUT)
    assert staging.bytes_in_use == 2 * NEEDED

    with pytest.raises(Overloaded) as refusal:
        staging.reserve(LAYOUT)
    assert refusal.value.retry_after
    assert "staging_bytes" in refusal.value.detail

    first.release()
    assert staging.bytes_in_use == NEEDED
    staging.reserve(LAYOUT).release()


def test_release_counts_once(memory: Memory) -> None:
    """Releasing twice, or releasing and dying, gives the budget back once."""
    staging = Staging(memory, 10 * NEEDED)
    kept, staged = staging.reserve(LAYOUT), staging.reserve(LAYOUT)
    staged.release()
    staged.release()
    del staged
    gc.collect()

    assert staging.bytes_in_use == NEEDED
    del kept
    gc.collect()
    assert staging.bytes_in_use == 0


def test_memory_outlives_the_release(memory: Memory) -> None:
    """The budget is given back at release; the bytes stay as long as someone looks at them."""
    staging = Staging(memory, NEEDED)
    staged = staging.reserve(LAYOUT)
    staged.data[:] = DATA
    data = staged.data
    staged.release()
    del staged
    other = staging.reserve(LAYOUT)
    other.data[:] = b"\0" * len(DATA)

    assert bytes(data) == DATA


def test_push_that_never_fits(memory: Memory) -> None:
    """A push larger than the whole budget is refused for good, naming the setting; nothing stays taken."""
    staging = Staging(memory, NEEDED - 1)

    with pytest.raises(BodyTooLarge) as refusal:
        staging.reserve(LAYOUT)

    assert "--staging-bytes" in refusal.value.hint
    assert staging.bytes_in_use == 0


def test_each_average_needs_a_shadow(memory: Memory) -> None:
    """A push that feeds three averages takes room for the two shadows beside its own memory."""
    staging = Staging(memory, 10 * NEEDED)
    staging.reserve(LAYOUT, 3).release()
    held = staging.reserve(LAYOUT, 3)

    assert staging.bytes_in_use == NEEDED + 2 * LAYOUT.shadow_bytes
    held.release()


def test_memory_that_cannot_be_had_is_not_charged(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system refuses memory the budget stays as it was."""
    staging = Staging(memory, NEEDED)

    def refuse(_nbytes: int) -> Tensor:
        raise MemoryError("no memory")

    monkeypatch.setattr(memory.pool, "lend", refuse)
    with pytest.raises(Overloaded, match="no memory"):
        staging.reserve(LAYOUT)

    assert staging.bytes_in_use == 0


def test_concurrent_reservations_never_exceed_the_budget(memory: Memory) -> None:
    """However many threads reserve at once, the budget holds."""

    staging = Staging(memory, 3 * NEEDED)

    def reserve(_: int) -> bool:
        try:
            staged = staging.reserve(LAYOUT)
        except Overloaded:
            return True
        within = staging.bytes_in_use <= 3 * NEEDED
        staged.release()
        return within

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(reserve, range(400)))
    assert staging.bytes_in_use == 0
