"""The kernel by torch, in blocks: what no compiled loop takes, which is float64, fp16, and all values on a GPU.

Imports torch: to be imported where such values are averaged.

Knows flat values as torch's tensors. Does not know which values have a compiled loop (kernel.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ema_service.averaging.distances import Squares
from ema_service.tensors import array_of, tensor_of
from ema_service.values import Values

__all__ = ["CPU_AVERAGED_AT_ONCE", "array_of", "average", "cast", "finite"]

#: Bytes of shadow that torch averages at once, per thread (float64 and fp16 parameters). Each block is read and written
#: three times and should stay in the 2 MiB L2 cache of a core together with its parameters. Measured on one core, GB/s
#: of shadow: 64 KiB 3.0, 128 KiB 3.6, 256 KiB 3.8, 512 KiB 3.6, 1 MiB 3.4.
CPU_AVERAGED_AT_ONCE = 256 << 10
#: Bytes of shadow that a GPU averages at once. The block only bounds the scratch memory of a cast.
GPU_AVERAGED_AT_ONCE = 64 << 20


def average(
    out: Values,
    shadow: Values,
    param: Values,
    weight: float,
    check: bool,
    at_once: int | None,
    squares: Squares | None,
    begin: int,
    end: int,
) -> bool:
    """Average elements ``begin`` to ``end``. Arguments as for kernel.averaging()."""
    out, shadow, param = (tensor_of(each)[begin:end] for each in (out, shadow, param))
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


def cast(out: Values, param: Values, check: bool, begin: int, end: int) -> bool:
    """Write elements ``begin`` to ``end`` of the parameters to ``out``, and say whether every one is finite.

    Parameters that lie where the result goes, in its dtype, are only looked at.
    """
    out, param = tensor_of(out)[begin:end], tensor_of(param)[begin:end]
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
