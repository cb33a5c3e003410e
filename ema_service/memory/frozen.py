"""Frozen weights: the host memory of versions that someone is reading.

A version costs one copy at most, however many readers it has, and the copy is dropped with the last reader. On the CPU
the arena itself is read, so reading the current version costs nothing. The budget bounds the versions that stay alive
because a reader is slower than the updates.

Knows arenas and a budget. Does not know runs, sockets or files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from ema_client.errors import Overloaded
from ema_service.memory.arena import Arena, Memory

__all__ = ["FrozenWeights"]


@dataclass(slots=True)
class _Held:
    """One arena with readers. data: the arena's bytes in host memory, once a reader asked for them."""

    readers: int = 0
    data: memoryview | None = None
    copying: threading.Lock = field(default_factory=threading.Lock)


class FrozenWeights:
    """Hands out the bytes of arenas in host memory, and counts the readers of each. Thread-safe.

    budget: most bytes of arenas with readers.
    """

    def __init__(self, memory: Memory, budget: int) -> None:
        self._memory = memory
        self._budget = budget
        self._held: dict[Arena, _Held] = {}
        self._lock = threading.Lock()
        #: Called whenever the last reader of an arena has left, on the reader's thread.
        self.on_room: Callable[[], None] = lambda: None

    @property
    def bytes_in_use(self) -> int:
        """Bytes of all arenas with readers."""
        return sum(arena.layout.shadow_bytes for arena in list(self._held))

    def hold(self, *arenas: Arena) -> None:
        """Count one more reader of each of the arenas, until release(). Does not block.

        Raises Overloaded, holding none, where the versions being read leave no room for them; with no other reader
        there always is.
        """
        with self._lock:
            new = sum(arena.layout.shadow_bytes for arena in set(arenas) if arena not in self._held)
            if new:
                self._admit(new)
            for arena in arenas:
                self._held.setdefault(arena, _Held()).readers += 1

    def data(self, arena: Arena) -> memoryview:
        """The bytes of an arena that the caller holds, in host memory, unchanging until release().

        On a GPU the first call copies: call it off the event loop.
        """
        held = self._held[arena]
        # Not under the lock of release(), which the event loop calls: the loop must not wait for a copy of gigabytes.
        with held.copying:
            if held.data is None:
                host = self._memory.to_host(arena.data) if arena.twin is None else arena.twin
                held.data = host.data
            return held.data

    def acquire(self, arena: Arena) -> memoryview:
        """Hold the arena and return its bytes: hold() and data() in one. Raises as both."""
        self.hold(arena)
        with ExitStack() as undo:
            undo.callback(self.release, arena)
            data = self.data(arena)
            undo.pop_all()
        return data

    def release(self, arena: Arena) -> None:
        """Count one reader of the arena less; the last one frees the budget and the copy."""
        with self._lock:
            held = self._held[arena]
            held.readers -= 1
            if held.readers:
                return
            del self._held[arena]
        self.on_room()

    def _admit(self, nbytes: int) -> None:
        """Raises Overloaded where ``nbytes`` more do not fit in the budget of versions being read."""
        used = self.bytes_in_use
        if used and used + nbytes > self._budget:
            raise Overloaded(
                f"versions held for readers take {used} of {self._budget} bytes (frozen_bytes); "
                f"{nbytes} more do not fit",
                retry_after=1.0,
            )
