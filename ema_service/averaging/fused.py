"""The averaging loop on the CPU, compiled: one reading of the memory for average, finite check, digests and distances.

The loop goes over its arrays gulp by gulp: a gulp is 1024 bytes of parameters, 256 float32 or 512 bf16, which is what
XXH3 mixes in before it scrambles (xxh3.py). For each gulp the loop prefetches what comes later, hashes the parameters
if asked to, and averages them; what is left at the end is averaged element by element, and not hashed. The loop's
source is loops/average.py.

``average_numpy()`` is the same loop in numpy, readable, and what the tests compare its bits with. No fast-math: the
compiler may neither contract nor reorder, so sub, mul and sub are three roundings, as in LitEma.

Knows numpy arrays, flat and one-dimensional, of float32, and of bf16 as the uint16 that numpy has for it. Does not know
torch, devices, threads, or how the arrays share memory: elements are taken in order, each read before it is written.
"""

from __future__ import annotations

import threading
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from ema_service.averaging.machine_code import AVERAGING, MEASURING
from ema_service.averaging.signatures import MEASURING_BYTES
from ema_service.averaging.xxh3 import NO_DIGEST, Accumulators
from ema_service.values import address, widened

__all__ = [
    "NO_SUMS",
    "Loop",
    "Sums",
    "average_numpy",
    "can_measure",
    "loop_of",
    "prepare",
    "prepare_measuring",
]

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]
Ends = npt.NDArray[np.int64]
#: By tensor, three sums of squares: (tensors, 3).
Sums = npt.NDArray[np.float64]

#: In the place of sums, where nothing is measured.
NO_SUMS: Sums = np.empty((0, 3))

#: The bits of a float32 without its sign, read as an integer; those of an Inf.
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
#: Bytes of a cache line.
_LINE_BYTES = 64
#: A call for at least so many elements stores its results past the cache, which they would fill. Nor has the processor
#: to read a line of the output before it is overwritten: 1 GiB in blocks of 8 MiB on two cores takes 96 ms, else 126.
_PAST_CACHE = (1 << 20) // 4


class Loop(Protocol):
    """A compiled loop bound to its arrays and its weight. Releases the interpreter lock while it runs."""

    def __call__(
        self,
        start: int,
        stop: int,
        params: Accumulators = NO_DIGEST,
        results: Accumulators = NO_DIGEST,
        sums: Sums = NO_SUMS,
    ) -> bool:
        """Average the elements ``start`` to ``stop`` and say whether every result is finite.

        params, results: accumulators of two digests, if wanted. They take in all whole gulps of the parameters, counted
        from ``start`` on, and the results of these gulps. sums: by tensor, are added the squares of these elements
        (loops/squares.py), if wanted; no two threads at once may be given the same.
        """


def average_numpy(out: F32, shadow: F32, param: F32 | U16, weight: float) -> bool:
    """What loop_of(out, shadow, param, weight) computes of all elements: three operations, and so three roundings."""
    new = param if param.dtype == np.float32 else widened(cast(U16, param))
    out[:] = shadow - np.float32(weight) * (shadow - new)
    return _all_finite(out)


def _all_finite(values: F32) -> bool:
    return bool((values.view(np.int32) & _MAGNITUDE < _INFINITY).all())


def loop_of(out: F32, shadow: F32, param: F32 | U16, weight: float, ends: Ends | None = None) -> Loop:
    """The loop that computes out <- shadow - weight * (shadow - param). Refers to the arrays as long as it lives.

    param: float32, perhaps ``out`` itself; or the bits of bf16 as uint16. weight: rounded to float32. ends: behind the
    last element of each tensor, ascending; needed for a loop that is given sums.
    """
    _check(out, shadow, param)
    dtype = "bf16" if param.dtype == np.uint16 else "f32"
    into, old, new = address(out), address(shadow), address(param)
    size, width = len(out), param.itemsize
    arrays, average = (out, shadow, param), AVERAGING[f"average_{dtype}"]

    def loop(
        start: int,
        stop: int,
        params: Accumulators = NO_DIGEST,
        results: Accumulators = NO_DIGEST,
        sums: Sums = NO_SUMS,
    ) -> bool:
        # As a slice: not beyond the arrays' end.
        count = max(min(stop, size) - start, 0)
        first, fresh = into + 4 * start, new + width * start
        aligned = count >= _PAST_CACHE and first % _LINE_BYTES == 0
        # Parameters that the results overwrite have just been read: their lines are in the cache in any case.
        past_cache = aligned and (fresh >= first + 4 * count or first >= fresh + width * count)
        digests = params.address, params.count, results.address, results.count
        given = first, old + 4 * start, fresh, count, weight, *digests, past_cache
        if ends is not None and len(sums):
            scratch = np.empty(MEASURING_BYTES, np.uint8)
            measure = MEASURING[f"measure_{dtype}"]
            measured = measure(*given, start, address(ends), len(ends), sums.ctypes.data, address(scratch))
            return bool(measured) or _all_finite(arrays[0][start:stop])
        return bool(average(*given))

    return loop


def _check(out: F32, shadow: F32, param: F32 | U16) -> None:
    """Raises ValueError for arrays that the loop would not read as they are meant: its code knows addresses only."""
    right = out.dtype == shadow.dtype == np.float32 and param.dtype in (np.float32, np.uint16)
    flat = all(each.ndim == 1 and each.flags.c_contiguous for each in (out, shadow, param))
    if not right or not flat or not len(out) == len(shadow) == len(param):
        raise ValueError("a loop takes flat arrays of one length: float32, and parameters of float32 or bf16")


def prepare() -> None:
    """Load every loop that averages now, for seconds where none is kept, lest the first update wait for it."""
    AVERAGING.load()


def prepare_measuring() -> None:
    """Load the loops that take sums of squares as well, for three times as long as prepare() where none is kept: beside
    the first updates, which are not measured."""
    MEASURING.load()
    _measuring.set()


def can_measure() -> bool:
    """Whether prepare_measuring() is done."""
    return _measuring.is_set()


_measuring = threading.Event()
