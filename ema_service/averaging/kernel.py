"""The update kernel: one pass over flat memory, on the CPU by a compiled loop, else in blocks of torch operations.

shadow_new = shadow - weight * (shadow - param), as three roundings (sub, mul, sub) like LitEma, so that a float32
result is bit-identical to it; ``torch.lerp`` contracts to a fused multiply-add and is not.

The result is written *beside* the shadow, into the memory the parameters came in: the old shadow stays whole for its
readers, an update that meets a NaN is dropped without a trace, and no scratch memory is needed for float32. Where a
parameter is narrower than its shadow (bf16 into float32), the parameters lie at the end of the output, so that the
result, written from the front, never overtakes what is still to be read.

Knows torch tensors, flat and one-dimensional, and which loop takes which dtypes. Does not know names, shapes, runs,
locks or where memory comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ema_service.averaging import fused

__all__ = ["average_into", "cast_into"]

#: Bytes of shadow per block and thread, where torch does the work (float64, fp16). A block is read and written three
#: times and should stay in the 2 MiB L2 cache of a core together with its parameters. Measured on one core, GB/s of
#: shadow: 64 KiB 3.0, 128 KiB 3.6, 256 KiB 3.8, 512 KiB 3.6, 1 MiB 3.4.
CPU_BLOCK_BYTES = 256 << 10
#: A compiled loop is split over threads where each gets at least so much shadow: below it, waking them costs more.
_SPLIT_BYTES = 1 << 20
#: On a GPU a block only bounds the scratch memory of a cast.
GPU_BLOCK_BYTES = 64 << 20


def average_into(out: Tensor, shadow: Tensor, param: Tensor, weight: float, *, check: bool = True) -> bool:
    """Write ``shadow - weight * (shadow - param)`` to ``out`` and say whether every value of it is finite.

    All three are one-dimensional, of equal length, on one device; ``out`` and ``shadow`` have one dtype. ``param`` may
    be ``out`` itself, or lie behind it in the same memory, each element no earlier than the element of ``out``.
    ``shadow`` must not overlap either. ``param`` is cast to the shadow's dtype, never the shadow to the parameter's.

    weight: 1 - decay, 0..1, rounded to the dtype of the shadow by the multiplication.
    check: without it the values are not looked at and the answer is True.
    """
    loop = _compiled_loop(out, shadow, param, weight)
    if loop is not None:
        return _run(loop, out, param) or not check
    return _average_blocks(out, shadow, param, weight, check=check)


def _average_blocks(out: Tensor, shadow: Tensor, param: Tensor, weight: float, *, check: bool) -> bool:
    sums = []
    scratch = None if _same_memory(out, param) else _scratch(out)
    for start, stop in _blocks(out):
        old, new, result = shadow[start:stop], param[start:stop], out[start:stop]
        block = result if scratch is None else scratch[: stop - start]
        torch.sub(old, new if new.dtype == out.dtype else block.copy_(new), out=block)
        torch.sub(old, block.mul_(weight), out=result)
        if check:
            sums.append(result.sum())
    return _all_finite(out, sums)


def _compiled_loop(out: Tensor, shadow: Tensor, param: Tensor, weight: float) -> Callable[[slice], bool] | None:
    """What averages a part of the elements in one pass, where there is a compiled loop for these dtypes."""
    if out.device.type != "cpu" or out.dtype != torch.float32:
        return None
    result, old = out.numpy(), shadow.numpy()
    if _same_memory(out, param):
        return lambda part: fused.average_f32_in_place(result[part], old[part], weight)
    if param.dtype == torch.float32:
        new = param.numpy()
        return lambda part: fused.average_f32(result[part], old[part], new[part], weight)
    if param.dtype == torch.bfloat16:
        bits = param.view(torch.int16).numpy().view(np.uint16)
        return lambda part: fused.average_bf16(result[part], old[part], bits[part], weight)
    return None


def _run(loop: Callable[[slice], bool], out: Tensor, param: Tensor) -> bool:
    """The loop over all elements, on as many threads as torch may use here."""
    finite, start = True, 0
    while (stop := _independent(out, param, start)) - start >= _SPLIT_BYTES // out.element_size():
        finite &= _split(loop, start, stop, out.element_size())
        start = stop
    return loop(slice(start, None)) and finite


def _independent(out: Tensor, param: Tensor, start: int) -> int:
    """The end of the elements from ``start`` on whose results overwrite none of their parameters: any order will do.

    Parameters at the end of the output are behind it by less and less: half of what is left, then half of that.
    """
    ahead = param.data_ptr() + start * param.element_size() - out.data_ptr() - start * out.element_size()
    if _same_memory(out, param) or ahead < 0:
        return out.numel()
    return min(start + ahead // out.element_size(), out.numel())


def _split(loop: Callable[[slice], bool], start: int, stop: int, width: int) -> bool:
    threads = min(torch.get_num_threads(), (stop - start) * width // _SPLIT_BYTES)
    if threads < 2:
        return loop(slice(start, stop))
    bounds = [start + (stop - start) * i // threads for i in range(threads + 1)]
    parts = [slice(*pair) for pair in pairwise(bounds)]
    others = [_threads().submit(loop, part) for part in parts[1:]]
    return all([loop(parts[0]), *(other.result() for other in others)])


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), "ema-average")


def cast_into(out: Tensor, param: Tensor, *, check: bool = True) -> bool:
    """Write ``param`` to ``out`` in its dtype and say whether every value is finite: the first shadow of a run.

    The tensors may share memory as in average_into.
    """
    sums = []
    scratch = None if _same_memory(out, param) else _scratch(out)
    for start, stop in _blocks(out):
        block = out[start:stop]
        if scratch is not None:
            block.copy_(scratch[: stop - start].copy_(param[start:stop]))
        if check:
            sums.append(block.sum())
    return _all_finite(out, sums)


def _all_finite(values: Tensor, sums: list[Tensor]) -> bool:
    """A NaN or Inf makes its block's sum so; a finite block's sum can overflow too, hence the second look."""
    if not sums or bool(torch.stack(sums).isfinite().all()):
        return True
    return all(bool(values[start:stop].isfinite().all()) for start, stop in _blocks(values))


def _same_memory(out: Tensor, param: Tensor) -> bool:
    return out.dtype == param.dtype and out.data_ptr() == param.data_ptr()


def _scratch(out: Tensor) -> Tensor:
    return torch.empty(
        min(out.numel(), _block_bytes(out.device) // out.element_size()), dtype=out.dtype, device=out.device
    )


def _blocks(out: Tensor) -> Iterator[tuple[int, int]]:
    size = _block_bytes(out.device) // out.element_size()
    for start in range(0, out.numel(), size):
        yield start, min(start + size, out.numel())


def _block_bytes(device: torch.device) -> int:
    """How many bytes of shadow the kernel takes at once on this device, on the calling thread."""
    return CPU_BLOCK_BYTES * torch.get_num_threads() if device.type == "cpu" else GPU_BLOCK_BYTES
