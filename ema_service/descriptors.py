"""The process' file descriptors: how many there are, and that connections leave some to files.

A server that accepts connections until no descriptor is left can write no version and open no file: strangers who only
connect would take the disk from runs.

Knows the process' limit. Does not know what descriptors are opened for.
"""

from __future__ import annotations

import contextlib
import errno
import resource

__all__ = ["EXHAUSTED", "connections_within", "raise_limit"]

#: The error numbers by which the system says that no descriptor can be had now: of the process, or of the machine.
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE})


def raise_limit() -> int:
    """Let this process have as many descriptors as it may, and return how many those are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # some systems have a hard limit that they do not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return soft


def connections_within(descriptors: int, wanted: int) -> int:
    """How many connections there may be at once: as many as wanted, if that leaves half of the descriptors to files."""
    return wanted if descriptors == resource.RLIM_INFINITY else max(1, min(wanted, descriptors // 2))
