"""Waiting for what another thread or process does. Knows the clock alone."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["wait_until"]

#: Longer than anything takes on a machine that runs three tests at once, and shorter than the time of a test.
_SECONDS = 60.0


def wait_until(true: Callable[[], object], what: str = "what the test waits for", seconds: float = _SECONDS) -> None:
    """Return once ``true()`` is; fail with ``what`` where it is not within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.01)
