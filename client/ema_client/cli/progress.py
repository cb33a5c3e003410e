"""A bar for weights that move: on standard error, and only where that is a terminal.

Knows: terminals, bytes in MiB. Does not know: what moves, or where.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from ema_client.cli.show import size
from ema_client.errors import printable

__all__ = ["moving"]

#: Characters of a bar, and of a terminal that has room for one.
_BAR, _WIDE = 16, 70


@contextlib.contextmanager
def moving(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar during the block, which tells of its work by calling with (bytes done, bytes in all)."""
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    console = Console(stderr=True)
    name = TextColumn(
        "{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
    )
    wide = console.width >= _WIDE
    columns = (name, BarColumn(_BAR), _Moved(rate=True), TimeRemainingColumn()) if wide else (name, _Moved(rate=False))
    with Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task(printable(what), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Moved(ProgressColumn):
    """How much has moved, of how much, and how fast: in the units that the commands have everywhere."""

    def __init__(self, *, rate: bool) -> None:
        super().__init__(Column(no_wrap=True))
        self._rate = rate

    def render(self, task: Task) -> Text:
        total = "" if task.total is None else f"/{size(task.total)}"
        speed = task.finished_speed or task.speed
        rate = "" if speed is None or not self._rate else f", {size(speed)}/s"
        return Text(f"{size(task.completed)}{total}{rate}")
