"""A bar for weights that move: on standard error, and only where that is a terminal.

Knows: terminals, bytes in MiB. Does not know: what moves, or where.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ema_client.cli.show import size
from ema_client.errors import printable

__all__ = ["moving"]


@contextlib.contextmanager
def moving(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar during the block, which tells of its work by calling with (bytes done, bytes in all)."""
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    name = TextColumn("{task.description}", markup=False)
    bar = Progress(name, BarColumn(bar_width=None), _Moved(), TimeRemainingColumn(), console=Console(stderr=True))
    with bar:
        task = bar.add_task(printable(what), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Moved(ProgressColumn):
    """How much has moved, of how much, and how fast: in the units that the commands have everywhere."""

    def render(self, task: Task) -> Text:
        total = "" if task.total is None else f"/{size(int(task.total))}"
        speed = task.finished_speed or task.speed
        rate = "" if speed is None else f", {size(int(speed))}/s"
        return Text(f"{size(int(task.completed))}{total}{rate}")
