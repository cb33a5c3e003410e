"""Power averages in numpy, and parameters that walk: what synthesised averages are compared with.

Knows the formulas of Karras et al. 2024 (arXiv 2312.02696, section 3). Written without the service's numerics.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]

#: The gammas of power averages by their sigma_rel, from the paper's relation, solved by bisection.
_CACHE: dict[float, float] = {}


def gamma_of(sigma_rel: float) -> float:
    """The larger exponent with sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3))."""
    if sigma_rel not in _CACHE:
        low, high = 0.0, 1e6
        for _ in range(200):
            middle = (low + high) / 2
            wide = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > sigma_rel**2
            low, high = (middle, high) if wide else (low, middle)
        _CACHE[sigma_rel] = low
    return _CACHE[sigma_rel]


def walk(updates: int, size: int = 300, seed: int = 0) -> Floats:
    """Parameters after 0, 1, ... updates: (updates + 1, size)."""
    return np.cumsum(np.random.default_rng(seed).normal(size=(updates + 1, size)), axis=0)


def power_average(walked: Floats, sigma_rel: float, counters: Iterable[int]) -> Floats:
    """The power average of those parameters that an update brought. counters: after each of these updates."""
    gamma, average, before = gamma_of(sigma_rel), np.zeros(walked.shape[1]), 0
    for n in counters:
        kept = (before / n) ** (gamma + 1)
        average, before = kept * average + (1 - kept) * walked[n], n
    return average


def constant_average(walked: Floats, decay: float, updates: int) -> Floats:
    """What one decay gives from the first parameters on."""
    average = walked[0]
    for n in range(1, updates + 1):
        average = decay * average + (1 - decay) * walked[n]
    return average


def distance(found: Floats | Tensor, expected: Floats, walked: Floats) -> float:
    """The error relative to how far the average lies from the newest parameters."""
    array = found.double().numpy() if isinstance(found, Tensor) else found
    return float(np.linalg.norm(array - expected) / np.linalg.norm(expected - walked[-1]))


def as_state(parameters: Floats) -> dict[str, Tensor]:
    """Parameters as tensors: one large, one of a few elements, one empty."""
    whole = torch.tensor(parameters, dtype=torch.float32)
    return {"w": whole[:-7].reshape(-1, 1), "b": whole[-7:], "none": torch.zeros(0, 2)}


def flat(state: dict[str, Tensor]) -> Tensor:
    """What as_state() was made of."""
    return torch.cat([state["w"].flatten(), state["b"]])
