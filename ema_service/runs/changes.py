"""The listeners of a run, and how they are told that the run changed.

Knows functions to call. Does not know what changed, or who listens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

__all__ = ["Changes"]


class Changes:
    """The listeners of one run: called after each change of its state or its snapshots, and once the run is deleted."""

    def __init__(self) -> None:
        self._listeners: set[Callable[[], None]] = set()

    def tell_always(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called after each change from now on, on any thread."""
        self._listeners.add(listener)

    @contextlib.contextmanager
    def heard_by(self, listener: Callable[[], None]) -> Iterator[None]:
        """Have ``listener`` called after each change within the block, on any thread."""
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.discard(listener)

    def tell(self) -> None:
        """Call every listener: the run changed."""
        for listener in tuple(self._listeners):
            listener()
