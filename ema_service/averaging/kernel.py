"""The update kernel: averages flat values in one pass, on the CPU by a compiled loop, else in blocks by torch.

shadow_new = shadow - weight * (shadow - param), as three roundings (sub, mul, sub) like LitEma, so that a float32
result is bit-identical to LitEma's; ``torch.lerp`` contracts to a fused multiply-add and is not.

The result is written *beside* the shadow, into the memory the parameters came in: the old shadow stays whole for its
readers, an update that meets a NaN is dropped without a trace, and no scratch memory is needed for float32. Where a
parameter is narrower than its shadow (bf16 into float32), the parameters lie at the end of the output, so that the
result, written from the front, never overtakes parameters still to be read.

Knows flat, one-dimensional values (values.py), and which loop takes which dtypes; torch only where no loop does. Does
not know names, shapes, runs, locks or where memory comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from types import ModuleType

import numpy as np

from ema_service.averaging import fused
from ema_service.averaging.digest import Accumulators
from ema_service.averaging.distances import Squares
from ema_service.threads import cores
from ema_service.values import Array, Values, address, all_finite, widened

__all__ = ["average_into", "averaging", "cast_into", "casting", "digesting", "finite", "prepare_for"]

#: A compiled loop is split over threads where each thread gets at least so many bytes of shadow: waking a thread for
#: less costs more than it saves.
_SPLIT_BYTES = 1 << 20
#: Elements that are cast at once: these, the parameters and what says whether they are finite stay in a core's cache.
_CAST_AT_ONCE = 1 << 16
#: Parameters that a compiled loop averages on the CPU, by the name of the wire.
_LOOPED = frozenset({"F32", "BF16"})


def prepare_for(dtypes: Iterable[str]) -> None:
    """Import torch where it averages parameters of one of these dtypes in host memory, lest an update wait a second."""
    if not _LOOPED.issuperset(dtypes):
        _torch()


def average_into(
    out: Values, shadow: Values, param: Values, weight: float, *, check: bool = True, at_once: int | None = None
) -> bool:
    """Average all elements, and say whether every result is finite. Arguments as for averaging()."""
    return averaging(out, shadow, param, weight, check=check, at_once=at_once)(0, len(out))


def averaging(
    out: Values,
    shadow: Values,
    param: Values,
    weight: float,
    *,
    check: bool = True,
    at_once: int | None = None,
    squares: Squares | None = None,
) -> Callable[[int, int], bool]:
    """A function (start, stop) that averages these elements into ``out`` and says whether every result is finite.

    Each result is ``shadow - weight * (shadow - param)``. The three are one-dimensional, of equal length, and lie
    on one device; ``out`` and ``shadow`` have one dtype. ``param`` may be ``out`` itself, or lie behind ``out`` in the
    same memory, each element no earlier than the element of ``out``: then elements must be averaged in order.
    ``shadow`` overlaps neither. ``param`` is cast to the shadow's dtype, never the shadow to the parameter's.

    weight: 1 - decay, 0..1, rounded to the dtype of the shadow by the multiplication.
    check: without it the values are not looked at and the answer is True.
    at_once: bytes of shadow in a block, where torch averages; None: what suits the device.
    squares: are added to, if wanted; a compiled loop runs on the calling thread then, whatever there is to do.
    """
    loop = _compiled_loop(out, shadow, param, weight, squares)
    if loop is None:
        return partial(_torch().average, out, shadow, param, weight, check, at_once, squares)
    if squares:
        return lambda start, stop: loop(start, stop, sums=squares.sums()) or not check
    few = _SPLIT_BYTES // out.itemsize

    def run(start: int, stop: int) -> bool:
        finite = loop(start, stop) if stop - start < few else _run(loop, out, param, start, stop)
        return finite or not check

    return run


def digesting(
    out: Values, shadow: Values, param: Values, weight: float, *, check: bool = True, squares: Squares | None = None
) -> Callable[[int, int, Accumulators, Accumulators], bool] | None:
    """As averaging(), on the calling thread, with the digests of parameters and results worked out in the same pass.

    The function takes, after start and stop, the accumulators of both digests (see fused.Loop). None where no loop is
    compiled for these dtypes and this device.
    """
    loop = _compiled_loop(out, shadow, param, weight, squares)
    if loop and squares:
        return lambda start, stop, params, results: loop(start, stop, params, results, squares.sums()) or not check
    return loop and (lambda start, stop, params, results: loop(start, stop, params, results) or not check)


def _compiled_loop(
    out: Values, shadow: Values, param: Values, weight: float, squares: Squares | None = None
) -> fused.Loop | None:
    """The compiled loop for these values; None on a GPU, and for dtypes that have no loop (float64, fp16)."""
    arrays = _arrays(out, shadow, param)
    if arrays is None or arrays[0].dtype != np.float32 or arrays[2].dtype not in (np.float32, np.uint16):
        return None
    into, old, new = arrays
    return fused.loop_of(into, old, new, weight, squares.ends if squares else None)


def _arrays(*values: Values) -> list[Array] | None:
    """The values as arrays, also those of torch's tensors of the host; None where they lie on a GPU."""
    arrays = []
    for each in values:
        if isinstance(each, np.ndarray):
            arrays.append(each)
        elif each.device.type == "cpu":
            arrays.append(_torch().array_of(each))
        else:
            return None
    return arrays


def _torch() -> ModuleType:
    """What averages and casts by torch, which is imported then."""
    from ema_service.averaging import by_torch

    return by_torch


def _run(loop: fused.Loop, out: Values, param: Values, start: int, stop: int) -> bool:
    """Run the loop over many elements, on as many threads as the calling one may use. The answer is the loop's."""
    finite = True
    while (end := _independent(out, param, start, stop)) - start >= _SPLIT_BYTES // out.itemsize:
        finite &= _split(loop, start, end, out.itemsize)
        start = end
    return loop(start, stop) and finite


def _independent(out: Values, param: Values, start: int, stop: int) -> int:
    """Up to which element, from ``start`` on, no result overwrites a parameter: up to there any order will do.

    Parameters at the end of the output are ahead of the results by less and less. So half of the elements are
    independent, then half of those that are left, and so on.
    """
    ahead = address(param) + start * param.itemsize - address(out) - start * out.itemsize
    if _same_memory(out, param) or ahead < 0:
        return stop
    return min(start + ahead // out.itemsize, stop)


def _split(loop: fused.Loop, start: int, stop: int, width: int) -> bool:
    """Run the loop over independent elements, one stretch on each thread, the first stretch on the calling thread."""
    threads = min(cores(), (stop - start) * width // _SPLIT_BYTES)
    if threads < 2:
        return loop(start, stop)
    bounds = [start + (stop - start) * i // threads for i in range(threads + 1)]
    parts = list(pairwise(bounds))
    others = [_threads().submit(loop, *part) for part in parts[1:]]
    return all([loop(*parts[0]), *(other.result() for other in others)])


@cache
def _threads() -> ThreadPoolExecutor:
    """The threads that stretches are averaged on, as many as the thread may use that splits the first update."""
    return ThreadPoolExecutor(cores(), "ema-average")


def cast_into(out: Values, param: Values, *, check: bool = True) -> bool:
    """Cast all parameters into ``out``, and say whether every one is finite. Arguments as for casting()."""
    return casting(out, param, check=check)(0, len(out))


def casting(out: Values, param: Values, *, check: bool = True) -> Callable[[int, int], bool]:
    """As averaging(), but ``param`` itself is written to ``out``: for the first shadow of a run, and for copied
    tensors."""
    arrays = _arrays(out, param)
    if arrays is None or arrays[1].dtype not in (arrays[0].dtype, np.uint16):
        return partial(_torch().cast, out, param, check)
    into, new = arrays
    return partial(_cast, into, new, check)


def _cast(out: Array, param: Array, check: bool, begin: int, end: int) -> bool:
    """Cast elements ``begin`` to ``end`` by numpy: into their own dtype, or bf16 into float32.

    Parameters that lie where the result goes, in its dtype, are only looked at.
    """
    found = True
    apart = out.dtype != param.dtype or address(out) != address(param)
    for start in range(begin, end, _CAST_AT_ONCE):
        block = slice(start, min(start + _CAST_AT_ONCE, end))
        if apart:
            # A copy first: the result may overlap its own parameters.
            out[block] = param[block].copy() if out.dtype == param.dtype else widened(param[block])
        found = found and (not check or all_finite(out[block]))
    return found


def finite(values: Values) -> bool:
    """Whether no value is NaN or Inf. On a GPU the answer waits for all work given to the GPU before."""
    return all_finite(values) if isinstance(values, np.ndarray) else bool(_torch().finite(values))


def _same_memory(out: Values, param: Values) -> bool:
    return out.dtype == param.dtype and address(out) == address(param)
