"""Where a rank's slice of a DTensor lies, by torch's own account of its placements.

Does not know processes (tests/e2e/test_sharded.py).
"""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ema_client.errors import UsageError
from ema_client.training.sharding import box_at


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.data(),
)
def test_slices_of_a_mesh(shape: tuple[int, int], mesh: list[int], data: st.DataObject) -> None:
    """The slices of all coordinates of a mesh are torch's own, uneven and empty ones too, and cover the tensor."""
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    placements = tuple(data.draw(st.sampled_from([Shard(0), Shard(1), Replicate()])) for _ in mesh)
    seen = torch.zeros(shape, dtype=torch.int)
    for coordinate in product(*map(range, mesh)):
        box = box_at("w", shape, tuple(mesh), coordinate, placements)
        local, offset = _compute_local_shape_and_global_offset(shape, tuple(mesh), list(coordinate), placements)
        assert box == (tuple((o, o + n) for o, n in zip(offset, local, strict=True)) if prod(local) else None)
        if box and not any(c for c, p in zip(coordinate, placements, strict=True) if p.is_replicate()):
            seen[tuple(slice(*bounds) for bounds in box)] += 1
    assert bool((seen == 1).all())


def test_unknown_ways_of_sharding() -> None:
    """A placement whose meaning is not certain is refused by name, not guessed."""
    with pytest.raises(UsageError, match="'w' is laid out in a way that is not known"):
        box_at("w", (8, 8), (2, 2), (0, 0), (_StridedShard(0, split_factor=4), Shard(0)))
