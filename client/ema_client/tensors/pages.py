"""Large memory of the host for tensors, and the tensors in such memory.

All are ordinary tensors whatever mode torch is in, so that memory made in inference mode can be filled outside.

Knows: the operating system's pages, where in a stream each tensor lies. Does not know: HTTP, runs.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from ema_client import wire
from ema_client.tensors.layout import dtype_of

__all__ = ["pages", "use_pages", "views_of"]

#: madvise(2), since Linux 4.14: Python has no name for it.
_WIPE_ON_FORK = 18
#: madvise(2), since Linux 5.14.
_POPULATE_WRITE = 23
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
#: Bytes of pages that are taken at a time: meanwhile no other thread can map memory.
_USED_AT_ONCE = 64 << 20


def pages(size: int) -> Tensor:
    """``size`` bytes of new memory, in huge pages where the system has them: a first use takes half the time."""
    with torch.inference_mode(False):
        if size == 0:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            region.madvise(mmap.MADV_HUGEPAGE)
        _keep_from_forks(region)
        return torch.frombuffer(region, dtype=torch.uint8)


def views_of(entries: Iterable[wire.Entry], flat: Tensor) -> list[Tensor]:
    """The tensors of a stream as views into ``flat``, the stream's data section as a uint8 tensor, in its order."""
    with torch.inference_mode(False):
        return [flat[entry.begin : entry.end].view(dtype_of(entry)).view(entry.shape) for entry in entries]


def use_pages(flat: Tensor) -> None:
    """Have the system give the memory's pages now, without the interpreter's lock. ``flat`` begins at a page."""
    for start in range(0, flat.numel(), _USED_AT_ONCE):
        address, size = flat.data_ptr() + start, min(_USED_AT_ONCE, flat.numel() - start)
        # Asked for, pages come in half the time that it takes to write to each.
        if _madvise is None or _madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _POPULATE_WRITE):
            ctypes.memset(address, 0, size)


def _keep_from_forks(region: mmap.mmap) -> None:
    """Let forked processes (a loader's workers) have empty pages in place of the region's.

    Pages shared copy-on-write would be copied at the next write, and a device would then copy to pages that are no
    longer this process'. Without any pages (MADV_DONTFORK, for older kernels) a fork that frees the region would unmap
    whatever it has there by then.
    """
    if hasattr(mmap, "MADV_DONTFORK"):
        try:
            region.madvise(_WIPE_ON_FORK)
        except OSError:
            region.madvise(mmap.MADV_DONTFORK)
