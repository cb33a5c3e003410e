"""The compiled loop against the same loop in numpy, bit for bit.

Knows flat arrays and how they may lie. Does not know torch, threads or digests.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ema_service.averaging import fused
from ema_service.averaging.digest import Accumulators, BlockDigest
from ema_service.averaging.fused import average_numpy, loop_of
from ema_service.memory import Layout
from ema_service.runs.measurements import Measurements

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


# --- measured -------------------------------------------------------------------------------------------------------


def squares_numpy(results: np.ndarray, params: np.ndarray, ends: list[int]) -> np.ndarray:
    """By tensor, the sums of squares of (result - parameter), parameter and result, in float64."""
    wide = params if params.dtype == np.float32 else (params.astype(np.uint32) << np.uint32(16)).view(np.float32)
    made, given = results.astype(np.float64), wide.astype(np.float64)
    bounds = zip([0, *ends], ends, strict=False)
    parts = [(made[a:b], given[a:b]) for a, b in bounds]
    return np.array([[((m - g) ** 2).sum(), (g**2).sum(), (m**2).sum()] for m, g in parts])


def accumulators(digested: bool) -> list[Accumulators]:
    """Of parameters and results, as they begin; none where nothing is digested."""
    return [BlockDigest(compiled=True).accumulators for _ in range(2)] if digested else []


@pytest.mark.parametrize("size", [1, 17, GULP, 2 * GULP, 9 * GULP + 33, LARGE])
@pytest.mark.parametrize("param", ["float32", "bf16", "in place"])
@pytest.mark.parametrize("digested", [False, True], ids=["plain", "digested"])
def test_measured_equals_numpy(size: int, param: str, digested: bool) -> None:
    """However tensors and calls cut the elements, results and digests are those without measuring, and each tensor's
    sums those of float64 to 1e-6; also of tensors that are empty, or a few elements long."""
    random = np.random.default_rng(size)
    cuts = sorted({size, *random.integers(0, size + 1, 12).tolist(), min(GULP, size)})
    ends = [0, 0, *cuts, size]
    shadow, params = array(size, 3), bf16(size) if param == "bf16" else array(size, seed=1)
    expected = np.empty(size, np.float32)
    average_numpy(expected, shadow, params, 1e-3)
    wanted = squares_numpy(expected, params, ends)
    sums, plain, measured = np.zeros((len(ends), 3)), accumulators(digested), accumulators(digested)
    parts = [0, size] if digested else [0, *sorted(random.integers(0, size + 1, 2).tolist()), size]
    loop_of(array(size), shadow, params, 1e-3)(0, size, *plain)
    out = params if param == "in place" else array(size)
    loop = loop_of(out, shadow, params, 1e-3, np.array(ends, np.int64))

    assert all(loop(a, b, *measured, sums=sums) for a, b in itertools.pairwise(parts))
    assert out.tobytes() == expected.tobytes()
    assert np.sqrt(sums) == pytest.approx(np.sqrt(wanted), rel=1e-6)
    assert [each.values.tobytes() for each in plain] == [each.values.tobytes() for each in measured]


@pytest.mark.parametrize("value", [1e25, np.inf, -np.inf, np.nan])
def test_measured_says_what_is_not_finite(value: float) -> None:
    """NaN and Inf are found by the squares; a value whose square is too large for float32 is finite all the same."""
    size = 3 * GULP + 5
    for where in (0, 300, size - 1):
        shadow, params = array(size), array(size, seed=1)
        params[where] = value
        loop = loop_of(array(size), shadow, params, 0.5, np.array([size], np.int64))
        assert loop(0, size, sums=np.zeros((1, 3))) == np.isfinite(value)


def test_measuring_begins_once_its_loops_are_compiled(
    monkeypatch: pytest.MonkeyPatch, layout_of: Callable[..., Layout]
) -> None:
    """A start waits for the loops that average, and updates before the others are compiled go unmeasured."""
    monkeypatch.setattr(fused, "_measuring", threading.Event())
    measurements = Measurements("r", layout_of({"w": torch.ones(3)}))
    fused.prepare()

    assert not measurements.due()
    fused.prepare_measuring()
    assert measurements.due()
