"""Memory: pooled host buffers, and arenas, the flat allocations that shadows live in.

An arena is written once, by the update that makes it, and never changed after: a version is its arenas. So readers need
no lock and updates never wait for them; the memory of a version goes back to the pool when its last holder lets go.

A host buffer is recycled by reference: the pool lends a fresh array object over the memory, every view (memoryview,
torch tensor, bytes still queued in a socket's transport) keeps that object alive, and its death returns the memory.
There is no release call to forget or to make too early.

Knows bytes, devices and torch's dtypes. Does not know runs, updates, budgets or files.
"""

from __future__ import annotations

import logging
import mmap
import threading
import weakref
from collections import deque
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ema_service.runs.layout import Layout
from ema_service.threads import Threads

__all__ = ["TORCH_DTYPES", "Arena", "HostPool", "Mark", "Memory", "buffer_bytes", "param_offset"]

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

#: Parameters begin at a multiple of this within their buffer: a cache line, and aligned for every dtype.
_LINE = 64

_FOLLOWERS = 4

_log = logging.getLogger(__name__)

_Raw = Any  # a numpy uint8 array that owns, or keeps alive, pooled memory


class HostPool:
    """Host memory, reused: page faults cost more than copies (2.3 GB/s into fresh pages, 14 into warm ones).

    pinned: allocate page-locked memory, which a GPU copies from and to at full speed.
    keep_bytes: most idle memory that is kept for reuse.
    """

    def __init__(self, *, pinned: bool = False, keep_bytes: int = 0) -> None:
        self._pinned = pinned
        self._keep_bytes = keep_bytes
        self._idle: dict[int, deque[_Raw]] = {}
        self._lock = threading.Lock()

    def lend(self, nbytes: int) -> Tensor:
        """A uint8 tensor of ``nbytes`` with arbitrary content, the caller's until its last view is gone."""
        with self._lock:
            idle = self._idle.setdefault(nbytes, deque())
        try:
            raw = idle.pop()
        except IndexError:
            raw = self._allocate(nbytes)
        lent = raw.view()
        weakref.finalize(lent, self._take_back, raw).atexit = False
        return torch.from_numpy(lent)

    @property
    def idle_bytes(self) -> int:
        """Bytes kept for reuse and lent to nobody."""
        return sum(nbytes * len(idle) for nbytes, idle in list(self._idle.items()))

    def _take_back(self, raw: _Raw) -> None:
        # Runs wherever the last reference dies, perhaps inside a locked region: it must not lock (deque.append is
        # atomic).
        if self.idle_bytes + raw.nbytes <= self._keep_bytes:
            self._idle[raw.nbytes].append(raw)

    def _allocate(self, nbytes: int) -> _Raw:
        # Private: memory that is shared with children, mmap's default, gets no huge pages.
        region = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            region.madvise(mmap.MADV_HUGEPAGE)
        raw = np.frombuffer(region, dtype=np.uint8, count=nbytes)
        if self._pinned and nbytes:
            _lock_pages(raw)
        return raw


def _lock_pages(raw: _Raw) -> None:
    """Page-lock memory for as long as it lives. Not torch's own pinned memory, which takes the next power of two, and
    0.42 s for 1 GiB where this takes 0.23 (16 cores, H200)."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(runtime.cudaHostRegister(raw.ctypes.data, raw.nbytes, 0))
    if code:
        _log.warning("%d bytes could not be page-locked (CUDA error %d): copies of them are slower", raw.nbytes, code)
    else:
        weakref.finalize(raw, _unlock_pages, runtime, raw.ctypes.data).atexit = False


def _unlock_pages(runtime: Any, address: int) -> None:
    # A copy of a push that was dropped may be under way.
    torch.cuda.synchronize()
    runtime.cudaHostUnregister(address)


class Arena:
    """The shadows of one average of one version, in the layout's order. Never changed once it is part of a version.

    tensor: uint8, layout.shadow_bytes long, on the arena's device. digest: of its bytes (averaging.Digest), None where
    nobody has worked it out.
    """

    __slots__ = ("__weakref__", "digest", "layout", "tensor")

    def __init__(self, layout: Layout, tensor: Tensor) -> None:
        self.layout = layout
        self.tensor = tensor[: layout.shadow_bytes]
        self.digest: bytes | None = None

    def section(self, section_index: int) -> Tensor:
        """The flat tensor of one of the layout's sections."""
        section = self.layout.sections[section_index]
        return self.tensor[section.shadow].view(TORCH_DTYPES[section.shadow_dtype])

    def non_finite(self) -> list[str]:
        """Names of the tensors that hold a NaN or an Inf."""
        found = []
        for entry in self.layout.shadows:
            values = self.tensor[entry.begin : entry.end].view(TORCH_DTYPES[entry.dtype])
            if not values.isfinite().all():
                found.append(entry.name)
        return found


class Mark(Protocol):
    """A point in what a device was asked to do: synchronize() returns once it is past it."""

    def synchronize(self) -> None: ...


class Memory:
    """Where arenas are made: one device, and the pool of the host."""

    def __init__(self, device: torch.device, *, keep_bytes: int = 0) -> None:
        self.device = device
        self.on_host = device.type == "cpu"
        self.pool = HostPool(pinned=device.type == "cuda", keep_bytes=keep_bytes)
        #: Who waits for results of a device, so that who receives need not.
        self.followers = Threads(_FOLLOWERS, "ema-follow")

    def allocate(self, nbytes: int) -> Tensor:
        """A uint8 tensor on the device, arbitrary content."""
        if self.on_host:
            return self.pool.lend(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def new_arena(self, layout: Layout) -> Arena:
        return Arena(layout, self.allocate(layout.shadow_bytes))

    def mark(self) -> Mark:
        """Behind all that the device was asked to do so far. Only where memory does not lie on the host."""
        # blocking: who waits for it sleeps.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def to_host(self, tensor: Tensor) -> Tensor:
        """The bytes of ``tensor`` in host memory: itself where it lies there, else a pooled copy."""
        if self.on_host:
            return tensor
        return self.pool.lend(tensor.numel()).copy_(tensor)

    def to_device(self, host: Tensor) -> Tensor:
        """The bytes of ``host`` on the device: itself where it lies there, else a copy."""
        return host if self.on_host else host.to(self.device)


def param_offset(layout: Layout) -> int:
    """Where parameters begin in a buffer that is to become an arena: as late as they fit, on a cache line.

    The averaging writes shadows from the front of the same buffer and, a shadow being at least as wide as its
    parameter, never overtakes the parameters still to be read.
    """
    return -(-(layout.shadow_bytes - layout.param_bytes) // _LINE) * _LINE


def buffer_bytes(layout: Layout) -> int:
    """Size of a buffer that takes the parameters and becomes the arena."""
    return max(layout.shadow_bytes, param_offset(layout) + layout.param_bytes)
