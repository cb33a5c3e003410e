"""How much of the processors threads of this process want: the time that they ran, and the time that they waited to.

A thread that waits for a processor, because others have them all, waits for the network no more than one that runs.
Linux counts both for each thread; elsewhere nothing is known.

Knows: /proc, and which processors this process may use. Does not know: what the threads do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["cores", "seconds_wanted"]

_TASKS = Path("/proc/self/task")
_NANO = 1e-9


def cores() -> int:
    """The processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def seconds_wanted(threads: Iterable[int]) -> dict[int, float] | None:
    """The seconds that each of the threads, by their native numbers, ran or waited to run so far.

    A thread that has ended is left out. None where the system does not tell.
    """
    wanted: dict[int, float] = {}
    for thread in threads:
        try:
            ran, waited, *_ = (_TASKS / str(thread) / "schedstat").read_text().split()
        except FileNotFoundError:
            if not _TASKS.exists():
                return None
            continue
        except OSError:
            # The thread ends at this moment.
            continue
        wanted[thread] = (int(ran) + int(waited)) * _NANO
    return wanted
