"""The machine that a benchmark ran on, without which a figure means nothing; and the memory that a process has used.

Knows where an operating system tells such facts; a fact that the system does not tell is left out or None. Does not
know what was measured.
"""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe", "one_line", "peak_bytes", "resident_bytes", "share_bytes", "written_bytes"]


def describe() -> dict[str, Any]:
    """The machine: processor, cores, memory, versions, threads, devices, load and date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": _cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": os.getloadavg()[0],
    }


def one_line(about: dict[str, Any]) -> str:
    """The description as one line for the screen."""
    parts = [
        about["cpu"],
        f"{about['cores']} cores",
        f"{about['memory_bytes'] / 2**30:.0f} GiB",
        about["cuda"] or "no CUDA device",
        f"Python {about['python']}",
        f"torch {about['torch']} ({about['torch_threads']} threads)",
        f"load {about['load_average']:.1f}",
        about["date"],
    ]
    return " · ".join(parts)


def peak_bytes(pid: int | None = None) -> int | None:
    """Most memory that a process (this one by default) ever had resident; None where the system does not tell."""
    return _kilobytes("status", "VmHWM", pid)


def resident_bytes(pid: int | None = None) -> int | None:
    """Memory that a process has resident now; None where the system does not tell."""
    return _kilobytes("status", "VmRSS", pid)


def share_bytes(pid: int | None = None) -> int | None:
    """Memory that a process has resident now, of pages that several processes map its share (Pss).

    None where the system does not tell.
    """
    return _kilobytes("smaps_rollup", "Pss", pid)


def written_bytes(pid: int | None = None) -> int | None:
    """Bytes that a process has had written to disks so far; None where the system does not tell."""
    return _number("io", "write_bytes", pid)


def _kilobytes(file: str, field: str, pid: int | None) -> int | None:
    found = _number(file, field, pid)
    return None if found is None else found * 1024


def _number(file: str, field: str, pid: int | None) -> int | None:
    try:
        text = Path(f"/proc/{pid or 'self'}/{file}").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s*(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else None


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cores() -> int:
    """The cores that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
