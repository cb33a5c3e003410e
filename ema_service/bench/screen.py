"""The results on screen, as tables, and on disk, as JSON.

Knows groups of rows and rich. Does not know what was measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from ema_service.bench.fit import METHOD, Fit
from ema_service.bench.machine import one_line
from ema_service.bench.rows import GIGA, Comparison, Group, Row

__all__ = ["Screen", "fits_json", "write_json"]

#: Columns where nothing tells the width (a pipe, a log file): enough to cut no figure.
_WIDTH = 140


class Screen:
    """The benchmark's output for the user."""

    def __init__(self) -> None:
        terminal = sys.stdout.isatty()
        self.console = Console(highlight=False, width=None if terminal else _WIDTH)

    def note(self, text: str) -> None:
        """Print a line for the user that stays on the screen."""
        self.console.print(escape(text), soft_wrap=True)

    @contextmanager
    def stage(self, text: str) -> Iterator[Status]:
        """Say what is going on; ``update()`` of the result says what comes next. Leaves nothing on the screen."""
        if not self.console.is_terminal:
            self.note(text)
        with self.console.status(escape(text)) as status:
            yield status

    def machine(self, about: Mapping[str, Any]) -> None:
        self.note(one_line(dict(about)))

    def group(self, group: Group) -> None:
        """Print a group as a table, with its facts below."""
        table = Table(title=escape(group.title), title_justify="left", title_style="bold")
        table.add_column("", overflow="fold")
        table.add_column("median", justify="right", no_wrap=True)
        table.add_column("min .. max", justify="right", no_wrap=True)
        for heading in ("compared", "needed", ""):
            table.add_column(heading, no_wrap=True)
        for row in group.rows:
            for cells in _lines(row, group.comparisons(row)):
                table.add_row(*cells)
        self.console.print(table)
        for fact in group.facts:
            self.note(f"  {fact}")

    def fits(self, fits: Mapping[str, Fit]) -> None:
        """Print one line for each fitted operation."""
        if fits:
            self.note(f"time = a + bytes / b, by {METHOD}:")
        for name, fit in fits.items():
            self.note(f"  {name:26}  a = {1000 * fit.overhead:7.2f} ms   b = {fit.rate / GIGA:6.2f} GB/s")


def _lines(row: Row, comparisons: Sequence[Comparison]) -> Iterator[tuple[str, ...]]:
    """One line for the row, and one more for each comparison after the first."""
    if not row.values:
        yield escape(row.name), "-", "", escape(row.note), "", ""
        return
    spread = f"{_number(min(row.values))} .. {_number(max(row.values))}" if len(row.values) > 1 else ""
    figures = (escape(row.name), f"{_number(row.median)} {row.unit}", spread)
    for comparison in comparisons:
        yield (*figures, *_compared(comparison))
        figures = ("", "", "")
    if not comparisons:
        yield (*figures, escape(row.note), "", "")
    elif row.note:
        yield ("", "", "", escape(row.note), "", "")


def _compared(comparison: Comparison) -> tuple[str, str, str]:
    need = comparison.need
    ratio = f"{_number(comparison.median)} x {need.against}" if need.against else ""
    if need.bound is None:
        return escape(ratio), "", ""
    sign = "<=" if need.most else ">="
    verdict = "[green]ok[/]" if comparison.met else "[bold red]MISSED[/]"
    return escape(ratio), f"{sign} {_number(need.bound)}", verdict


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"


def fits_json(fits: Mapping[str, Fit]) -> list[dict[str, Any]]:
    """The fits for a result file; a rate that is no number is null."""
    return [
        {
            "name": name,
            "seconds": fit.overhead,
            "bytes_per_second": None if fit.rate == float("inf") else fit.rate,
            "method": METHOD,
        }
        for name, fit in fits.items()
    ]


def write_json(path: Path, about: Mapping[str, Any], groups: Sequence[Group], **more: Any) -> None:
    """Write everything that was measured, each round's figures too."""
    told = {"machine": dict(about), **more, "groups": [group.to_json() for group in groups]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told, indent=1) + "\n")
