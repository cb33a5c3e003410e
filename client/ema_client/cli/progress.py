"""A bar for weights that move: on standard error, and only where that is a terminal.

Knows: terminals, bytes in MiB. Does not know: what moves, or where.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from ema_client.cli.show import size
from ema_client.errors import printable

__all__ = ["moving"]

#: Characters of a bar, and of a terminal that has room for one.
_BAR, _WIDE = 16, 70


@contextlib.contextmanager
def moving(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that the block draws by calling with (bytes done, bytes in all); gone when all bytes are there.

    The next call after that draws another one, so that the block may move weights several times.
    """
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    bar = _Bar(printable(what))
    try:
        yield bar
    finally:
        bar.end()


class _Bar:
    """A bar on the terminal, from the first call to the last byte."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._drawn: Progress | None = None
        self._task = TaskID(0)

    def __call__(self, done: int, total: int) -> None:
        if self._drawn is None:
            self._drawn = _columns()
            self._task = self._drawn.add_task(self._what, total=total)
            self._drawn.start()
        self._drawn.update(self._task, completed=done, total=total)
        if done >= total:
            self.end()

    def end(self) -> None:
        if self._drawn is not None:
            self._drawn.stop()
            self._drawn = None


def _columns() -> Progress:
    console = Console(stderr=True)
    room = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    name = TextColumn("{task.description}", markup=False, table_column=room)
    wide = console.width >= _WIDE
    columns = (name, BarColumn(_BAR), _Moved(rate=True), TimeRemainingColumn()) if wide else (name, _Moved(rate=False))
    return Progress(*columns, console=console, expand=True, transient=True)


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
