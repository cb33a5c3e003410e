"""The comparison of two sets of tensors, bit for bit.

Knows float32 tensors by name. Does not know where they came from.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ema_service.demo.plan import Proof


def compare(claim: str, step: int, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Proof:
    """Compare every tensor of two mappings of float32 tensors. A name in only one of the two counts as differing."""
    both = ours.keys() & theirs.keys()
    differing = (ours.keys() ^ theirs.keys()) | {name for name in both if not _same_bits(ours[name], theirs[name])}
    return Proof(claim, step, len(both), sum(ours[name].numel() for name in both), tuple(sorted(differing)))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    # As integers: torch.equal of floats would take 0.0 for -0.0 and a NaN for a difference.
    return one.dtype == other.dtype and torch.equal(one.view(torch.int32), other.view(torch.int32))
