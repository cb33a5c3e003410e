"""scikit-learn's bundled handwritten digits: 1,797 real images of 8x8 pixels, nothing to download.

Knows where the images come from and how they are split. Does not know what is trained on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor

HELD_OUT = 297


@dataclass(frozen=True, slots=True)
class Digits:
    """images: float32 [n, 1, 8, 8], -1 (paper) to 1 (ink). labels: int64 [n], 0..9."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load() -> tuple[Digits, Digits]:
    """The training images and the held-out ones; the same split in every process."""
    bundle = load_digits()
    images = torch.tensor(bundle.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(bundle.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    training, held_out = order[:-HELD_OUT], order[-HELD_OUT:]
    return Digits(images[training], labels[training]), Digits(images[held_out], labels[held_out])
