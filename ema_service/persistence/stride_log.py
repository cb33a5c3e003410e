"""The strides of one run's updates, noted as they come: what an average's profile is made of between two snapshots.

Of a run that comes back, or goes another way, the strides up to the newest snapshot of its ring are those stored with
the snapshot; those of the updates after it, of which only the number is known, are taken for even.

Knows versions and strides. Does not know files, or when a snapshot is due.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from ema_service.averaging.strides import Strides
from ema_service.shadows.state import Version

__all__ = ["StrideLog"]


class StrideLog:
    """Follows one run. Thread-safe.

    stored: what was stored of the strides that led to a version, perhaps not up to it.
    """

    def __init__(self, stored: Callable[[Version], Strides]) -> None:
        self._stored = stored
        self._strides = Strides()
        self._version: Version | None = None
        self._lock = threading.Lock()

    def follow(self, version: Version, time: int) -> None:
        """Note the update that made a version, at which the averages' counter was ``time``."""
        with self._lock:
            if self._version is None or version.descent is not self._version.descent:
                self._begin(version, time)
            missing = version.updates(time) - self._strides.updates
            if missing > 0:
                gone = version.descent.counter + self._strides.distance
                self._strides.spread(max(time - gone, missing), missing)
            self._version = version

    def noted(self) -> Strides:
        """The strides of the updates that led to the version followed last, from the beginning of its descent on."""
        with self._lock:
            return Strides(self._strides.runs)

    def _begin(self, version: Version, time: int) -> None:
        """Take up the strides of another descent: of what led to both, or what was stored."""
        shared = self._shared(version, time)
        if shared is None:
            self._strides = self._stored(version)
        else:
            self._strides.cut(shared)

    def _shared(self, version: Version, time: int) -> int | None:
        """How many updates led to the version followed last and to a version that a rewind made; None if it did not."""
        before, descent = self._version, version.descent
        if before is None or version.n != descent.first or not descent.earlier:
            return None
        if (descent.counter, descent.before) != (before.descent.counter, before.descent.before):
            return None
        epoch, _, n = descent.earlier[-1]
        return before.descent.updates(before, epoch, n, time)
