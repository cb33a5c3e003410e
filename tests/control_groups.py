"""A control group with little memory, as a container or a batch job has. Knows both versions of control groups."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["memory_group"]

#: Seconds that the kernel may take to end the processes of a group.
_END_SECONDS = 30.0


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """The folder of a new group with ``limit`` bytes of memory, whose processes are killed after the block.

    Skips the test where no group can be made, which wants root.
    """
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    root, name = (v1, "memory.limit_in_bytes") if v1.is_dir() else (v2, "memory.max")
    folder = root / f"ema-test-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
        (folder / name).write_text(str(limit))
    except OSError as fault:
        pytest.skip(f"no control group for memory can be made: {fault}")
    try:
        yield folder
    finally:
        _end(folder)


def _end(folder: Path) -> None:
    for pid in (folder / "cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    deadline = time.monotonic() + _END_SECONDS
    while (folder / "cgroup.procs").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    folder.rmdir()
