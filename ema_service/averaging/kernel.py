"""The update kernel: one pass over flat memory in blocks that stay in the processor's cache.

shadow_new = shadow - weight * (shadow - param), as three roundings (sub, mul, sub) like LitEma, so that a float32
result is bit-identical to it; ``torch.lerp`` contracts to a fused multiply-add and is not.

The result is written *beside* the shadow, into the memory the parameters came in: the old shadow stays whole for its
readers, an update that meets a NaN is dropped without a trace, and no scratch memory is needed for float32. Where a
parameter is narrower than its shadow (bf16 into float32), the parameters lie at the end of the output, so that the
result, written from the front, never overtakes what is still to be read.

Knows torch tensors, flat and one-dimensional. Does not know names, shapes, runs, locks or where memory comes from.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["average_into", "block_bytes", "cast_into"]

#: Bytes of shadow per block and thread. A block is read and written three times and should stay in the 2 MiB L2 cache
#: of a core together with its parameters. Measured on one core, GB/s of shadow: 64 KiB 3.0, 128 KiB 3.6, 256 KiB 3.8,
#: 512 KiB 3.6, 1 MiB 3.4 (`run.py --only blocks` in tests/benchmarks measures it).
CPU_BLOCK_BYTES = 256 << 10
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
        min(out.numel(), block_bytes(out.device) // out.element_size()), dtype=out.dtype, device=out.device
    )


def _blocks(out: Tensor) -> Iterator[tuple[int, int]]:
    size = block_bytes(out.device) // out.element_size()
    for start in range(0, out.numel(), size):
        yield start, min(start + size, out.numel())


def block_bytes(device: torch.device) -> int:
    """How many bytes of shadow the kernel takes at once on this device, on the calling thread."""
    return CPU_BLOCK_BYTES * torch.get_num_threads() if device.type == "cpu" else GPU_BLOCK_BYTES
