"""The compiled loop against the same loop in numpy, bit for bit.

Knows flat arrays and how they may lie. Does not know torch, threads or digests.
"""

from __future__ import annotations

import numpy as np
import pytest

from ema_service.averaging.fused import average_numpy, loop_of

#: Elements of a gulp of float32, and of a cache line.
GULP, LINE = 256, 16
#: Past the cache, where the output begins a cache line: a call of at least 1 MiB.
LARGE = (1 << 18) + GULP + 7
SIZES = [0, 1, 15, 16, GULP - 1, GULP, GULP + 1, 2 * GULP, 2 * GULP + 33, LARGE]


def array(size: int, off: int = 0, seed: int = 0) -> np.ndarray:
    """Random float32, ``off`` elements behind the beginning of a cache line."""
    room = np.empty(size + 2 * LINE, np.float32)
    start = -room.ctypes.data % 64 // 4 + off
    room[start : start + size] = np.random.default_rng(seed).standard_normal(size)
    return room[start : start + size]


def bf16(size: int) -> np.ndarray:
    """Random bf16, as their bits."""
    return (array(size, seed=1).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("off", [0, 5], ids=["on a cache line", "off it"])
@pytest.mark.parametrize("param", ["float32", "bf16", "in place"])
@pytest.mark.parametrize("weight", [9 / 11, 1e-4, 0.0, 1.0])
def test_equals_numpy(size: int, off: int, param: str, weight: float) -> None:
    """Whatever the lengths, the alignment and the dtype, the results and the answer are those of the oracle."""
    shadow = array(size, 3)
    params = bf16(size) if param == "bf16" else array(size, off, seed=1)
    expected = np.empty(size, np.float32)
    finite = average_numpy(expected, shadow, params, weight)
    out = params if param == "in place" else array(size, off)

    assert loop_of(out, shadow, params, weight)(0, size) == finite
    assert out.tobytes() == expected.tobytes()
    assert finite


@pytest.mark.parametrize("where", [0, 17, GULP, 2 * GULP + 3])
@pytest.mark.parametrize("fault", [np.inf, -np.inf, np.nan])
def test_equals_numpy_where_a_value_is_not_finite(where: int, fault: float) -> None:
    """One NaN or Inf, in a vector or behind the last whole gulp: both say so, and no other result differs."""
    size = 2 * GULP + 5
    shadow, params, out, expected = array(size), array(size, seed=1), array(size), array(size)
    params[where] = fault

    assert not loop_of(out, shadow, params, 0.5)(0, size)
    assert not average_numpy(expected, shadow, params, 0.5)
    assert np.array_equal(out, expected, equal_nan=True)


def test_equals_numpy_at_the_largest_values() -> None:
    """The largest finite value is finite to both; a result that overflows is not."""
    largest = np.full(GULP, np.finfo(np.float32).max)
    out = np.empty(GULP, np.float32)

    assert loop_of(out, largest, largest, 0.5)(0, GULP)
    assert average_numpy(out, largest, largest, 0.5)
    with np.errstate(over="ignore"):
        assert not average_numpy(out, largest, -largest, 0.5)
    assert not loop_of(out, largest, -largest, 0.5)(0, GULP)
