"""How the commands show things: text, tables, JSON, sizes and times.

Knows: the terminal, and which fields of an answer need more than str(). Does not know: arguments, the service.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ema_client.errors import printable
from ema_client.protocol import AverageInfo, RingInfo, RunInfo

__all__ = ["complain", "pairs", "print_json", "row", "say", "shown", "size", "table", "when"]


def say(thing: Any) -> None:
    # No markup, no control characters: what a server or a stranger's file says is shown, not obeyed. In a pipe or a
    # file, lines are as long as need be.
    width = None if sys.stdout.isatty() else 1000
    console = Console(width=width, markup=False, highlight=False, soft_wrap=isinstance(thing, str))
    console.print(printable(thing) if isinstance(thing, str) else thing)


def table(*columns: str) -> Table:
    return _Table(*columns, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)


def pairs() -> Table:
    """A table without head, of names and values."""
    return _Table(box=None, show_header=False, padding=(0, 2), collapse_padding=True, pad_edge=False)


class _Table(Table):
    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*("\n".join(map(printable, cell.split("\n"))) for cell in cells), **options)


def print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def row(info: RunInfo) -> tuple[str, ...]:
    return (
        info.run,
        info.status,
        shown("step", info.step),
        str(info.num_updates),
        f"{info.decay:.6g}",
        shown("effective_decay", info.effective_decay),
        size(info.bytes),
        _age(time.time() - info.updated_at),
    )


def shown(name: str, value: Any) -> str:
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


def size(count: int) -> str:
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"


def _age(seconds: float) -> str:
    """How long ago, as a single rounded number with its unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def complain(text: str) -> None:
    """A line on stderr, in the command's name."""
    sys.stderr.write(f"ema: {printable(text)}\n")
    sys.stderr.flush()
