"""The update kernel: averages flat memory in one pass, on the CPU by a compiled loop, else in blocks by torch.

shadow_new = shadow - weight * (shadow - param), as three roundings (sub, mul, sub) like LitEma, so that a float32
result is bit-identical to LitEma's; ``torch.lerp`` contracts to a fused multiply-add and is not.

The result is written *beside* the shadow, into the memory the parameters came in: the old shadow stays whole for its
readers, an update that meets a NaN is dropped without a trace, and no scratch memory is needed for float32. Where a
parameter is narrower than its shadow (bf16 into float32), the parameters lie at the end of the output, so that the
result, written from the front, never overtakes parameters still to be read.

Knows torch tensors, flat and one-dimensional, and which loop takes which dtypes. Does not know names, shapes, runs,
locks or where memory comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ema_service.averaging import fused
from ema_service.averaging.digest import Accumulators
from ema_service.averaging.distances import Squares

__all__ = ["average_into", "averaging", "cast_into", "casting", "digesting", "finite"]

#: Bytes of shadow that torch averages at once, per thread (float64 and fp16 parameters). Each block is read and written
#: three times and should stay in the 2 MiB L2 cache of a core together with its parameters. Measured on one core, GB/s
#: of shadow: 64 KiB 3.0, 128 KiB 3.6, 256 KiB 3.8, 512 KiB 3.6, 1 MiB 3.4.
CPU_AVERAGED_AT_ONCE = 256 << 10
#: A compiled loop is split over threads where each thread gets at least so many bytes of shadow: waking a thread for
#: less costs more than it saves.
_SPLIT_BYTES = 1 << 20
#: Bytes of shadow that a GPU averages at once. The block only bounds the scratch memory of a cast.
GPU_AVERAGED_AT_ONCE = 64 << 20


def average_into(
    out: Tensor, shadow: Tensor, param: Tensor, weight: float, *, check: bool = True, at_once: int | None = None
) -> bool:
    """Average all elements, and say whether every result is finite. Arguments as for averaging()."""
    return averaging(out, shadow, param, weight, check=check, at_once=at_once)(0, out.numel())


def averaging(
    out: Tensor,
    shadow: Tensor,
    param: Tensor,
    weight: float,
    *,
    check: bool = True,
    at_once: int | None = None,
    squares: Squares | None = None,
) -> Callable[[int, int], bool]:
    """A function (start, stop) that averages these elements into ``out`` and says whether every result is finite.

    Each result is ``shadow - weight * (shadow - param)``. The three tensors are one-dimensional, of equal length, on
    one device; ``out`` and ``shadow`` have one dtype. ``param`` may be ``out`` itself, or lie behind ``out`` in the
    same memory, each element no earlier than the element of ``out``: then elements must be averaged in order.
    ``shadow`` overlaps neither. ``param`` is cast to the shadow's dtype, never the shadow to the parameter's.

    weight: 1 - decay, 0..1, rounded to the dtype of the shadow by the multiplication.
    check: without it the values are not looked at and the answer is True.
    at_once: bytes of shadow in a block, where torch averages; None: what suits the device.
    squares: are added to, if wanted; a compiled loop runs on the calling thread then, whatever there is to do.
    """
    loop = _compiled_loop(out, shadow, param, weight, squares)
    if loop is None:
        return partial(_average_blocks, out, shadow, param, weight, check, at_once, squares)
    if squares:
        return lambda start, stop: loop(start, stop, sums=squares.sums()) or not check
    few = _SPLIT_BYTES // out.element_size()

    def run(start: int, stop: int) -> bool:
        finite = loop(start, stop) if stop - start < few else _run(loop, out, param, start, stop)
        return finite or not check

    return run


def digesting(
    out: Tensor, shadow: Tensor, param: Tensor, weight: float, *, check: bool = True, squares: Squares | None = None
) -> Callable[[int, int, Accumulators, Accumulators], bool] | None:
    """As averaging(), on the calling thread, with the digests of parameters and results worked out in the same pass.

    The function takes, after start and stop, the accumulators of both digests (see fused.Loop). None where no loop is
    compiled for these dtypes and this device.
    """
    loop = _compiled_loop(out, shadow, param, weight, squares)
    if loop and squares:
        return lambda start, stop, params, results: loop(start, stop, params, results, squares.sums()) or not check
    return loop and (lambda start, stop, params, results: loop(start, stop, params, results) or not check)


def _average_blocks(
    out: Tensor,
    shadow: Tensor,
    param: Tensor,
    weight: float,
    check: bool,
    at_once: int | None,
    squares: Squares | None,
    begin: int,
    end: int,
) -> bool:
    """Average elements ``begin`` to ``end`` by torch, in blocks: parameters of float64, fp16, and all on a GPU."""
    out, shadow, param = out[begin:end], shadow[begin:end], param[begin:end]
    sums = []
    scratch = None if _same_memory(out, param) else _scratch(out, at_once)
    for start, stop in _blocks(out, at_once):
        old, new, result = shadow[start:stop], param[start:stop], out[start:stop]
        block = result if scratch is None else scratch[: stop - start]
        params = new.to(out.dtype, copy=True) if squares else new
        torch.sub(old, new if new.dtype == out.dtype else block.copy_(new), out=block)
        torch.sub(old, block.mul_(weight), out=result)
        if squares:
            squares.add(begin + start, params, result)
        if check:
            sums.append(result.sum())
    return _all_finite(out, sums)


def _compiled_loop(
    out: Tensor, shadow: Tensor, param: Tensor, weight: float, squares: Squares | None = None
) -> fused.Loop | None:
    """The compiled loop for these tensors; None on a GPU, and for dtypes that have no loop (float64, fp16)."""
    if out.device.type != "cpu" or out.dtype != torch.float32:
        return None
    if param.dtype == torch.float32:
        values = param.numpy()
    elif param.dtype == torch.bfloat16:
        values = param.view(torch.int16).numpy().view(np.uint16)
    else:
        return None
    return fused.loop_of(out.numpy(), shadow.numpy(), values, weight, squares.ends if squares else None)


def _run(loop: fused.Loop, out: Tensor, param: Tensor, start: int, stop: int) -> bool:
    """Run the loop over many elements, on as many threads as torch may use here. The answer is the loop's."""
    finite = True
    while (end := _independent(out, param, start, stop)) - start >= _SPLIT_BYTES // out.element_size():
        finite &= _split(loop, start, end, out.element_size())
        start = end
    return loop(start, stop) and finite


def _independent(out: Tensor, param: Tensor, start: int, stop: int) -> int:
    """Up to which element, from ``start`` on, no result overwrites a parameter: up to there any order will do.

    Parameters at the end of the output are ahead of the results by less and less. So half of the elements are
    independent, then half of those that are left, and so on.
    """
    ahead = param.data_ptr() + start * param.element_size() - out.data_ptr() - start * out.element_size()
    if _same_memory(out, param) or ahead < 0:
        return stop
    return min(start + ahead // out.element_size(), stop)


def _split(loop: fused.Loop, start: int, stop: int, width: int) -> bool:
    """Run the loop over independent elements, one stretch on each thread, the first stretch on the calling thread."""
    threads = min(torch.get_num_threads(), (stop - start) * width // _SPLIT_BYTES)
    if threads < 2:
        return loop(start, stop)
    bounds = [start + (stop - start) * i // threads for i in range(threads + 1)]
    parts = list(pairwise(bounds))
    others = [_threads().submit(loop, *part) for part in parts[1:]]
    return all([loop(*parts[0]), *(other.result() for other in others)])


@cache
def _threads() -> ThreadPoolExecutor:
    """The threads that stretches are averaged on, as many as torch has when the first update is split."""
    return ThreadPoolExecutor(torch.get_num_threads(), "ema-average")


def cast_into(out: Tensor, param: Tensor, *, check: bool = True) -> bool:
    """Cast all parameters into ``out``, and say whether every one is finite. Arguments as for casting()."""
    return casting(out, param, check=check)(0, out.numel())


def casting(out: Tensor, param: Tensor, *, check: bool = True) -> Callable[[int, int], bool]:
    """As averaging(), but ``param`` itself is written to ``out``: for the first shadow of a run, and for copied
    tensors."""
    return lambda start, stop: _cast_blocks(out[start:stop], param[start:stop], check=check)


def _cast_blocks(out: Tensor, param: Tensor, *, check: bool) -> bool:
    """Cast by torch, in blocks. Parameters that lie where the result goes, in its dtype, are only looked at."""
    sums = []
    scratch = None if _same_memory(out, param) else _scratch(out)
    for start, stop in _blocks(out):
        block = out[start:stop]
        if scratch is not None:
            block.copy_(scratch[: stop - start].copy_(param[start:stop]))
        if check:
            sums.append(block.sum())
    return _all_finite(out, sums)


def finite(values: Tensor) -> bool:
    """Whether no value of a flat tensor is NaN or Inf. On a GPU the answer waits for all work given to the GPU
    before."""
    return _all_finite(values, [values[start:stop].sum() for start, stop in _blocks(values)])


def _all_finite(values: Tensor, sums: list[Tensor]) -> bool:
    """Whether all values are finite, by the sums of their blocks: a NaN or Inf makes the sum of its block NaN or Inf.

    The sum of finite values can overflow too, so a sum that is not finite leads to a look at every value.
    """
    if not sums or bool(torch.stack(sums).isfinite().all()):
        return True
    return all(bool(values[start:stop].isfinite().all()) for start, stop in _blocks(values))


def _same_memory(out: Tensor, param: Tensor) -> bool:
    return out.dtype == param.dtype and out.data_ptr() == param.data_ptr()


def _scratch(out: Tensor, at_once: int | None = None) -> Tensor:
    """Memory for one block of parameters, cast to the dtype of ``out``."""
    size = (at_once or _at_once(out.device)) // out.element_size()
    return torch.empty(min(out.numel(), size), dtype=out.dtype, device=out.device)


def _blocks(out: Tensor, at_once: int | None = None) -> Iterator[tuple[int, int]]:
    """The blocks of a tensor: the index of the first element and the index behind the last."""
    size = (at_once or _at_once(out.device)) // out.element_size()
    for start in range(0, out.numel(), size):
        yield start, min(start + size, out.numel())


def _at_once(device: torch.device) -> int:
    """How many bytes of shadow torch averages at once on this device, on the calling thread."""
    return CPU_AVERAGED_AT_ONCE * torch.get_num_threads() if device.type == "cpu" else GPU_AVERAGED_AT_ONCE
