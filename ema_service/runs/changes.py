"""Who is told when a run changes.

Knows functions to call. Does not know what changed, or who listens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

__all__ = ["Changes"]


class Changes:
    """The listeners of one run: called after each change of its state, of its snapshots, and once it is deleted."""

    def __init__(self) -> None:
        self._listeners: set[Callable[[], None]] = set()

    @contextlib.contextmanager
    def heard_by(self, listener: Callable[[], None]) -> Iterator[None]:
        """Have ``listener`` called, from any thread, after each change within the block."""
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.discard(listener)

    def tell(self) -> None:
        """Something changed."""
        for listener in tuple(self._listeners):
            listener()
