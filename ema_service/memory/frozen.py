"""Frozen weights: the host memory of versions that someone is reading.

One version costs one copy at most, however many readers it has, and it is dropped with the last of them. On the CPU the
arena itself is that memory, so reading the current version costs nothing; what the budget bounds is the versions that
stay alive because a reader is slower than the updates.

Knows arenas and a budget. Does not know runs, sockets or files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from ema_client.errors import Overloaded
from ema_service.memory.arena import Arena, Memory

__all__ = ["FrozenWeights"]


@dataclass(slots=True)
class _Held:
    readers: int = 0
    data: memoryview | None = None
    copying: threading.Lock = field(default_factory=threading.Lock)


class FrozenWeights:
    """Hands out the bytes of arenas and counts who reads them. Thread-safe."""

    def __init__(self, memory: Memory, budget: int) -> None:
        self._memory = memory
        self._budget = budget
        self._held: dict[Arena, _Held] = {}
        self._lock = threading.Lock()
        #: Called whenever room comes free, in whatever thread.
        self.on_room: Callable[[], None] = lambda: None

    @property
    def bytes_in_use(self) -> int:
        return sum(arena.layout.shadow_bytes for arena in list(self._held))

    def hold(self, arena: Arena) -> None:
        """One more reader of the arena, until release(). Does not block.

        Raises Overloaded where the versions being read leave no room for another; one is always possible.
        """
        with self._lock:
            held = self._held.get(arena)
            if held is None:
                self._admit(arena.layout.shadow_bytes)
                held = self._held[arena] = _Held()
            held.readers += 1

    def data(self, arena: Arena) -> memoryview:
        """The bytes of an arena that is held, in host memory, unchanging. Copies on a GPU: call off the loop."""
        held = self._held[arena]
        # Not under the lock that release() takes: the event loop must not wait for a copy of gigabytes.
        with held.copying:
            if held.data is None:
                host = self._memory.to_host(arena.tensor) if arena.twin is None else arena.twin
                held.data = host.numpy().data
            return held.data

    def acquire(self, arena: Arena) -> memoryview:
        """hold() and data() in one."""
        self.hold(arena)
        try:
            return self.data(arena)
        except (MemoryError, OSError, RuntimeError):
            self.release(arena)
            raise

    def release(self, arena: Arena) -> None:
        """One reader of the arena is done."""
        with self._lock:
            held = self._held[arena]
            held.readers -= 1
            if held.readers:
                return
            del self._held[arena]
        self.on_room()

    def _admit(self, nbytes: int) -> None:
        used = self.bytes_in_use
        if used and used + nbytes > self._budget:
            raise Overloaded(
                f"versions held for readers take {used} of {self._budget} bytes (frozen_bytes); "
                f"{nbytes} more do not fit",
                retry_after=1.0,
            )
