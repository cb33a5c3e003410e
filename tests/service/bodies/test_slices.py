"""Slices of tensors as pieces: every element once, none of them in two blocks.

Knows boxes and numpy, the reader to compare with. Does not know updates, or where blocks lie.
"""

from __future__ import annotations

from math import prod

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from ema_client.protocol import TensorSpec
from ema_client.wire import Box
from ema_service.bodies.slices import pieces_of
from ema_service.memory import Layout


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    """A shape, and a slice of some of its elements."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    starts = [draw(st.integers(0, size - 1)) for size in shape]
    return shape, tuple((a, draw(st.integers(a + 1, size))) for a, size in zip(starts, shape, strict=True))


@given(boxes(), st.integers(1, 40), st.integers(0, 5))
@example(((6, 7), ((0, 6), (2, 5))), 5, 0)
@example(((3, 4, 5), ((0, 3), (1, 3), (0, 5))), 7, 3)
def test_pieces_of_a_slice(cut: tuple[tuple[int, ...], Box], block: int, before: int) -> None:
    """However blocks end, in rows and between them, the pieces bring each element of the slice to its place, and
    nothing else; no piece lies in two blocks."""
    shape, box = cut
    layout = Layout([TensorSpec("a", (before,), "F32"), TensorSpec("b", shape, "F32")])
    tensor = np.arange(1, prod(shape) + 1, dtype=np.uint32).reshape(shape)
    sliced = tuple(slice(*bounds) for bounds in box)
    sent, memory = memoryview(tensor[sliced].tobytes()), bytearray(layout.param_bytes)
    for piece in pieces_of({"b": (box,)}, layout, 4 * block):
        assert piece.extent.start // (4 * block) == (piece.extent.stop - 1) // (4 * block)
        target = memoryview(memory)[piece.extent]
        if piece.box is None:
            target[:] = sent[: piece.nbytes]
        else:
            piece.scatter(sent[: piece.nbytes], target)
        sent = sent[piece.nbytes :]

    expected = np.zeros(shape, np.uint32)
    expected[sliced] = tensor[sliced]
    assert len(sent) == 0
    assert bytes(memory) == bytes(4 * before) + expected.tobytes()
