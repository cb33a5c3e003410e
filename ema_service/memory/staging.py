"""Staging: the memory a push lands in, and the budget of all pushes.

A push is received straight into the buffer that becomes the next shadow.

Knows layouts, devices and budgets. Does not know the byte stream, sockets, or what an update does with the memory.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from ema_client.errors import BodyTooLarge, Overloaded
from ema_client.protocol import LAYOUT_DTYPES
from ema_service.memory.arena import TORCH_DTYPES, Arena, Mark, Memory, buffer_bytes, param_offset
from ema_service.memory.layout import Layout

__all__ = ["Shared", "Staged", "Staging"]

#: Bytes of the widest dtype.
_WIDEST = max(LAYOUT_DTYPES.values())


@dataclass(frozen=True, slots=True)
class Shared:
    """A body that lies, whole, in memory that another process shares with this one.

    body: the memory; it lives as long as its views. check: raises if the body was withdrawn, and perhaps changed.
    helpers: threads to work through it. There is no socket to leave cores to.
    """

    body: memoryview
    check: Callable[[], None]
    helpers: Executor


class Staged:
    """The parameters of one push, in memory that becomes an arena. Owned by the request that received it.

    data: the host memory of the parameters, layout.param_bytes long. on_host: whether they are averaged there.
    arena: what the memory becomes once averages are written over the parameters; on the device.
    shared: where the parameters lie instead, or None; then ``data`` is that memory, and whoever reads it settles.
    release(): gives the budget back; also happens when the object dies. The memory itself lives as long as its views.
    """

    def __init__(self, layout: Layout, memory: Memory) -> None:
        self.layout = layout
        self.on_host = memory.on_host
        self._memory = memory
        self._offset = param_offset(layout)
        size = buffer_bytes(layout)
        self._host = memory.landing(size if memory.on_host else layout.param_bytes)
        self._buffer = self._host if memory.on_host else memory.allocate(size)
        start = self._offset if memory.on_host else 0
        self.data = self._host[start : start + layout.param_bytes].numpy().data
        self.arena = Arena(layout, self._buffer)
        self.shared: Shared | None = None
        self._adopted: Tensor | None = None

    def adopt(self, shared: Shared, start: int) -> bool:
        """Let the parameters stay where they lie: in order, from byte ``start`` of the shared body on.

        False, and nothing done, where they cannot be taken from there in any order: out of line, or on a device if they
        are narrower than their shadows, which are written over them.
        """
        data = shared.body[start : start + self.layout.param_bytes]
        adopted = torch.frombuffer(data, dtype=torch.uint8)
        if adopted.data_ptr() % _WIDEST or not (self.on_host or self.layout.param_bytes == self.layout.shadow_bytes):
            return False
        self.shared, self.data, self._adopted = shared, data, adopted
        return True

    def param(self, index: int) -> Tensor:
        """The parameters of one section on the device, flat, in the dtype they came in: what was uploaded of them."""
        section = self.layout.sections[index]
        if self._adopted is not None and self.on_host:
            param = self._adopted[section.param]
        else:
            param = self._buffer[self._offset + section.param.start : self._offset + section.param.stop]
        return param.view(TORCH_DTYPES[section.param_dtype])

    def upload(self, start: int, stop: int) -> None:
        """Bring bytes ``start`` to ``stop`` of the received parameters to the device. On the host they are there."""
        if not self.on_host:
            if self._adopted is not None:
                self._host[start:stop].copy_(self._adopted[start:stop])
            param = self._buffer[self._offset + start : self._offset + stop]
            param.copy_(self._host[start:stop], non_blocking=True)

    def host_twin(self, arena: Arena) -> Tensor:
        """Host memory, uint8, for the bytes that an arena of the device will hold. The arena keeps it."""
        arena.twin = self._memory.arenas.lend(arena.tensor.numel())
        return arena.twin

    def mark(self) -> Mark:
        """As Memory.mark()."""
        return self._memory.mark()

    @property
    def followers(self) -> Executor:
        return self._memory.followers

    def settle(self) -> None:
        """Return when the parameters have been read, and were what they are said to be: raises as Shared.check()."""
        if not self.on_host:
            self.mark().synchronize()
        if self.shared is not None:
            self.shared.check()

    def release(self) -> None:
        self._give_back()
        if self.shared is not None:
            # Another process' memory is held no longer than it is read.
            self.shared = self._adopted = None
            self.data = memoryview(b"")

    def charge(self, budget: _Budget, nbytes: int) -> None:
        """Let this object's end, by release() or by death, return ``nbytes`` to ``budget``. Called once, by Staging."""
        self._give_back = weakref.finalize(self, budget.give_back, nbytes)


class _Budget:
    """Bytes in use out of a limit. Thread-safe. on_room: called whenever some come free, in whatever thread."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.on_room: Callable[[], None] = lambda: None
        # Re-entrant: giving back may happen in a garbage collection, in a thread that holds it.
        self._lock = threading.RLock()

    def take(self, nbytes: int) -> bool:
        with self._lock:
            if self.used + nbytes > self.limit:
                return False
            self.used += nbytes
            return True

    def give_back(self, nbytes: int) -> None:
        with self._lock:
            self.used -= nbytes
        self.on_room()


class Staging:
    """The budget of pushes being received or applied, decided before a body is read. Thread-safe."""

    def __init__(self, memory: Memory, budget: int) -> None:
        self._memory = memory
        self._budget = _Budget(budget)

    @property
    def bytes_in_use(self) -> int:
        return self._budget.used

    def on_room(self, tell: Callable[[], None]) -> None:
        """Have ``tell`` called whenever room comes free: in any thread, perhaps in a garbage collection."""
        self._budget.on_room = tell

    def needed(self, layout: Layout, averages: int = 1) -> int:
        """Bytes of the budget that one push takes. Raises BodyTooLarge where the budget could never hold it."""
        # The push's own memory becomes one of the shadows.
        nbytes = buffer_bytes(layout) + (averages - 1) * layout.shadow_bytes
        if nbytes > self._budget.limit:
            raise BodyTooLarge(
                f"a push of this run takes {nbytes} bytes of staging, the budget is {self._budget.limit}",
                hint="start the server with a larger --staging-bytes",
            )
        return nbytes

    def reserve(self, layout: Layout, averages: int = 1, memory: Memory | None = None) -> Staged:
        """Memory for one push of this layout, and the right to as many new shadows as the push will feed.

        memory: the run's, where its arenas are not those of all. Raises BodyTooLarge where the budget could never hold
        the push, Overloaded where it cannot now, or where there is no memory all the same.
        """
        nbytes = self.needed(layout, averages)
        if not self._budget.take(nbytes):
            raise Overloaded(
                f"pushes in flight take {self._budget.used} of {self._budget.limit} bytes (staging_bytes); "
                f"{nbytes} more do not fit",
                retry_after=1.0,
            )
        try:
            staged = Staged(layout, memory or self._memory)
            staged.charge(self._budget, nbytes)
        except (MemoryError, OSError, RuntimeError, Overloaded):
            self._budget.give_back(nbytes)
            raise
        return staged
