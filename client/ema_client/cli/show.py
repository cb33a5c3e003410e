"""How the commands write values: sizes, times, what a run holds.

Knows: which fields of an answer need more than str(). Does not know: tables, terminals (answers), the service.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from ema_client.errors import printable
from ema_client.protocol import AverageInfo, ReplicaInfo, RingInfo

__all__ = ["age", "complain", "number", "replica", "shown", "size", "when"]


def shown(name: str, value: Any) -> str:
    """The value of the field ``name`` of an answer."""
    if value is None:
        return "-"
    if name == "bytes":
        return f"{value} ({size(value)})"
    if name.endswith("_at"):
        return when(value)
    if name == "averages":
        return "\n".join(_average(average) for average in value)
    if isinstance(value, RingInfo):
        return _ring(value)
    if isinstance(value, ReplicaInfo):
        return replica(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _average(info: AverageInfo) -> str:
    fields = {"decay": info.decay} if info.schedule not in ("power", "half_life") else {}
    said = ", ".join(f"{name} {value:.6g}" for name, value in (fields | info.schedule_fields()).items())
    return f"{info.name}: {info.schedule}, {said}"


def _ring(info: RingInfo) -> str:
    """What averages of any length are worked out of: each line of a kind of its own."""
    widths = ", ".join(f"{width:g}" for width in info.sigma_rel)
    kept = f"{len(info.times)} of {info.snapshots} snapshots of sigma_rel {widths} in {info.dtype}, {size(info.bytes)}"
    times = ", ".join(map(str, info.times)) or "none yet"
    return f"{kept}\nat num_updates {times}"


def replica(info: ReplicaInfo) -> str:
    """Of what a replica is one, and how far behind it is."""
    behind = f"behind for {info.behind_seconds:.0f} s" if info.behind_seconds else "has the newest version it knows of"
    away = "" if info.reached else ", which does not answer"
    return f"of {info.of or 'a host that is not known yet'}{away}; {behind}{f': {info.fault}' if info.fault else ''}"


def number(value: float | None, digits: int = 4) -> str:
    """A number of so many digits; a dash for what was not measured."""
    return "-" if value is None else f"{value:.{digits}g}"


def size(count: float) -> str:
    """A number of bytes in the unit that fits: ``1.5 GiB``."""
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{count:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"


def age(seconds: float) -> str:
    """How long ago, as a single rounded number with its unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def when(seconds: float) -> str:
    """A moment, in the time of this machine."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def complain(text: str) -> None:
    """A line on stderr, in the command's name."""
    sys.stderr.write(f"ema: {printable(text)}\n")
    sys.stderr.flush()
