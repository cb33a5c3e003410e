"""Arenas: the flat allocations that hold shadows, on one device.

An arena is written once, by the update that makes it, and never changed after: the arenas of a version are its bytes.
So readers need no lock, and updates never wait for readers; the memory of a version goes back to the pool when the last
holder of the version lets go.

Knows bytes and devices; torch only where there is a device. Does not know runs, updates or files, or what a budget is
spent on.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from ema_client.errors import Overloaded
from ema_service.memory.budget import Budget
from ema_service.memory.layout import Layout
from ema_service.memory.pool import HostPool
from ema_service.threads import Threads
from ema_service.values import Array, Values, all_finite, typed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Arena", "Mark", "Memory", "Pool", "buffer_bytes", "overloaded", "param_offset"]

_V = TypeVar("_V", bound=Values)

#: Parameters begin at a multiple of so many bytes in their buffer: a cache line, and aligned for every dtype.
_LINE = 64

#: Threads that wait for copies from a device (Memory.followers).
_FOLLOWERS = 4


class Arena:
    """The shadows of one average of one version, in the layout's order.

    Never changed once the arena is part of a version.

    data: uint8, layout.shadow_bytes long: an array of the host, or a tensor on the arena's device. digest: of these
    bytes (averaging.Digest), None where nobody has worked the digest out. twin: host memory with the same bytes, where
    those of a device are kept as they come.
    """

    __slots__ = ("__weakref__", "data", "digest", "layout", "twin")

    def __init__(self, layout: Layout, data: Values) -> None:
        self.layout = layout
        self.data = data[: layout.shadow_bytes]
        self.digest: bytes | None = None
        self.twin: Array | None = None

    @property
    def host(self) -> Array:
        """The arena's bytes in host memory, where they lie there."""
        return cast(Array, self.data) if self.twin is None else self.twin

    @property
    def tensor(self) -> Tensor:
        """The same memory as ``data``, as a tensor of torch."""
        from ema_service.tensors import tensor_of

        return tensor_of(self.data)

    def section(self, section_index: int) -> Values:
        """The shadows of one of the layout's sections: flat, of the section's dtype, a view of the arena."""
        section = self.layout.sections[section_index]
        return typed(self.data[section.shadow], section.shadow_dtype)

    def non_finite(self) -> list[str]:
        """Names of the tensors that hold a NaN or an Inf."""
        entries = self.layout.shadows
        return [e.name for e in entries if not all_finite(typed(self.data[e.begin : e.end], e.dtype))]


class Mark(Protocol):
    """A point in the work given to a device. synchronize() returns once the device is past that point."""

    def synchronize(self) -> None: ...


class Pool(Protocol):
    """Lends host memory: a uint8 array with arbitrary content, the caller's until its last view is gone."""

    def lend(self, nbytes: int) -> Array: ...


class Memory:
    """Where arenas are made: one device, and the pool of the host.

    device: its name, as torch writes it. on_host: whether the device is the CPU. keep_bytes: most idle memory of the
    pool, see HostPool. limit: most memory of the host, of the pool and of all memory files together. arenas: the pool
    that arenas of the host come from, and copies of a device's arenas that are to outlive the process: ``pool`` itself,
    or the memory files of one run (of_run()). What has no memory raises Overloaded, here and in what lends it.
    """

    def __init__(self, device: str = "cpu", *, keep_bytes: int = 0, limit: int = sys.maxsize) -> None:
        self.device = str(device)
        self.on_host = self.device.partition(":")[0] == "cpu"
        self.budget = Budget(limit)
        pinned_for = self.device if self.device.startswith("cuda") else None
        self.pool = HostPool(pinned_for=pinned_for, keep_bytes=keep_bytes, budget=self.budget)
        self.arenas: Pool = self.pool
        #: Threads that wait for a device's results, so that the thread that receives a push need not.
        self.followers = Threads(_FOLLOWERS, "ema-follow")

    def of_run(self, arenas: Pool) -> Memory:
        """The same memory, whose arenas of the host come from a pool of one run's own."""
        run = copy.copy(self)
        run.arenas = arenas
        return run

    def allocate(self, nbytes: int) -> Values:
        """uint8 memory on the device with arbitrary content, the caller's until its last view is gone."""
        if self.on_host:
            return _had(self.arenas.lend, nbytes)
        return _had(self.empty, nbytes)

    def empty(self, nbytes: int) -> Tensor:
        """As allocate(), new memory of a device. Raises what torch raises where there is none."""
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def landing(self, nbytes: int) -> Array:
        """Host memory that an arena's bytes arrive in: the arena's own, or what they are uploaded from."""
        return _had(self.arenas.lend if self.on_host else self.pool.lend, nbytes)

    def twin(self, nbytes: int) -> Array:
        """Host memory for the bytes of an arena of the device."""
        return _had(self.arenas.lend, nbytes)

    def new_arena(self, layout: Layout) -> Arena:
        """An arena of this layout, with arbitrary content."""
        return Arena(layout, self.allocate(layout.shadow_bytes))

    def mark(self) -> Mark:
        """A mark behind all work given to the device so far. Not to be called where memory lies on the host."""
        import torch

        # blocking: a thread that waits for the event sleeps, where it would otherwise spin.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def to_host(self, data: Values) -> Array:
        """The bytes of ``data`` in host memory: ``data`` itself on the CPU, else a copy in memory of the pool."""
        if self.on_host:
            return cast(Array, data)
        from ema_service.tensors import tensor_of

        host = _had(self.pool.lend, len(data))
        with overloaded(f"{len(data)} bytes could not be copied from the device"):
            tensor_of(host).copy_(tensor_of(data))
        return host

    def to_device(self, host: Array) -> Values:
        """The bytes of ``host`` on the device: ``host`` itself on the CPU, else a copy."""
        if self.on_host:
            return host
        from ema_service.tensors import tensor_of

        data = tensor_of(self.allocate(len(host)))
        with overloaded(f"{len(host)} bytes could not be copied to the device"):
            return data.copy_(tensor_of(host))


@contextlib.contextmanager
def overloaded(what: str) -> Iterator[None]:
    """Raises Overloaded where work of the block finds no memory, of the device or for torch's own; ``what`` failed."""
    try:
        yield
    except (MemoryError, RuntimeError) as fault:
        if not _tells_of_memory(fault):
            raise
        raise Overloaded(f"{what}: {_said(fault)}", retry_after=1.0) from fault


def _tells_of_memory(fault: Exception) -> bool:
    # Of memory for other things than tensors (a kernel, an event), and of the host's, a plain RuntimeError tells.
    said = str(fault).lower()
    known = isinstance(fault, MemoryError) or type(fault).__name__ == "OutOfMemoryError"  # torch's
    return known or "out of memory" in said or "can't allocate memory" in said


def _said(fault: Exception) -> str:
    return str(fault).splitlines()[0] if str(fault) else type(fault).__name__


def _had(allocate: Callable[[int], _V], nbytes: int) -> _V:
    """Memory, or Overloaded where there is none."""
    what = f"{nbytes} bytes of memory could not be had"
    try:
        with overloaded(what):
            return allocate(nbytes)
    except OSError as fault:
        raise Overloaded(f"{what}: {_said(fault)}", retry_after=1.0) from fault


def param_offset(layout: Layout, stop: int | None = None) -> int:
    """By how many bytes parameters are shifted in a buffer that is to become an arena: as late as they fit, for all of
    them on a cache line.

    stop: where the stretch of the parameters ends that is averaged by itself; None for all parameters as one stretch.
    Averaging writes shadows from the front of the stretch's shadows and, a shadow being at least as wide as its
    parameter, never overtakes parameters still to be read, nor reaches those of another stretch.
    """
    if stop is None or stop == layout.param_bytes:
        return -(-(layout.shadow_bytes - layout.param_bytes) // _LINE) * _LINE
    return layout.shadow_at(stop) - stop


def buffer_bytes(layout: Layout) -> int:
    """Size of a buffer that receives the parameters of a push and then becomes an arena."""
    return max(layout.shadow_bytes, param_offset(layout) + layout.param_bytes)
