"""What a command answers with, and how an answer is written: JSON, a table on a terminal, plain lines in a pipe.

A command makes an Answer, and put() alone writes it. On a terminal a table that is wider than the screen becomes blocks
of one line for each value, so that no column is lost at 40 characters. In a pipe or a file a row is one line, its cells
parted by tabs, without colour, whatever the width.

Knows: terminals, pipes, JSON. Does not know: what an answer is about, the service.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table as Drawn
from rich.text import Text

from ema_client.errors import printable

__all__ = ["Answer", "Screen", "Table", "put"]

#: Characters between two columns on a terminal.
_GAP = 2
#: The widest column of a table that is too wide is folded down to so many characters before the table becomes blocks.
_FOLDED = 16
#: Of a cell in a pipe: what parts the lines that the cell has on a terminal.
_LINE = "; "


@dataclass
class Table:
    """Rows of cells. columns: their heads; without heads the first cell of a row is the name of the second.

    A cell may have several lines. What a cell holds is shown and never obeyed: no markup, no control characters.
    """

    columns: Sequence[str] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Add a row."""
        self.rows.append(cells)


@dataclass
class Answer:
    """What a command found.

    data: for --json, of dataclasses, mappings, lists, texts and numbers. shown: for people, sentences and tables from
    top to bottom. code: the command's exit code. aside: standard output holds something else, weights: the answer goes
    to standard error. replaces: on a terminal the answer takes the place of the command's answer before.
    """

    data: Any
    shown: Sequence[str | Table] = ()
    code: int = 0
    aside: bool = False
    replaces: bool = False


def put(answer: Answer, *, as_json: bool, lines: bool = False) -> None:
    """Write an answer. lines: JSON of one line, for a command that answers again and again."""
    out = sys.stderr if answer.aside else sys.stdout
    if as_json:
        out.write(json.dumps(_plain(answer.data), indent=None if lines else 2) + "\n")
    elif out.isatty():
        console = _console(out)
        for part in answer.shown:
            console.print(*_rendered(part, console.width), sep="\n")
    else:
        for part in answer.shown:
            out.writelines(f"{line}\n" for line in _piped(part))
    out.flush()


class Screen:
    """Writes the answers of a command that answers again and again; use ``with``."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._live: Live | None = None

    def put(self, answer: Answer) -> None:
        """Write the next answer; on a terminal one that replaces the one before is cut at the screen's last line."""
        if self._as_json or not answer.replaces or not sys.stdout.isatty():
            put(answer, as_json=self._as_json, lines=True)
            return
        if self._live is None:
            self._live = Live(console=_console(sys.stdout), auto_refresh=False, vertical_overflow="ellipsis")
            self._live.start()
        width = self._live.console.width
        parts = [each for part in answer.shown for each in _rendered(part, width)]
        self._live.update(Group(*parts), refresh=True)

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()


def _plain(value: Any) -> Any:
    """A value as JSON has it: dataclasses as objects, paths as texts; NaN and infinity, which JSON lacks, as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, PurePath):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rendered(part: str | Table, width: int) -> tuple[RenderableType, ...]:
    """A part of an answer as a terminal of ``width`` characters shows it."""
    if isinstance(part, str):
        return (Text(_clean(part)),)
    rows = [tuple(map(_clean, row)) for row in part.rows]
    if not part.columns:
        return (_pairs(rows),)
    heads = tuple(part.columns)
    if room := _room(heads, rows, width):
        return (_drawn(heads, rows, room),)
    named = [head or "*" for head in heads]
    blocks = [_pairs([*zip(named, row, strict=True)]) for row in rows]
    return tuple(each for block in blocks for each in (block, ""))


def _console(out: TextIO) -> Console:
    return Console(file=out, markup=False, highlight=False, emoji=False)


def _clean(cell: str) -> str:
    return "\n".join(map(printable, cell.split("\n")))


def _room(heads: Sequence[str], rows: Iterable[Sequence[str]], width: int) -> list[int]:
    """The width of each column of a table that fits ``width``, the widest one perhaps folded; empty where none fits."""
    columns = zip(heads, *rows, strict=True)
    room = [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in columns]
    widest = room.index(max(room))
    excess = sum(room) + _GAP * (len(room) - 1) - width
    room[widest] -= max(excess, 0)
    return room if excess <= 0 or room[widest] >= _FOLDED else []


def _drawn(heads: Sequence[str], rows: Iterable[Sequence[str]], room: Iterable[int]) -> Drawn:
    # The box has one character between columns, the padding the others.
    table = Drawn(box=box.SIMPLE_HEAD, padding=(0, _GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    for head, width in zip(heads, room, strict=True):
        table.add_column(head, width=width, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _pairs(rows: Iterable[Sequence[str]]) -> Drawn:
    table = Drawn(box=None, show_header=False, padding=(0, _GAP, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _piped(part: str | Table) -> Iterable[str]:
    if isinstance(part, str):
        yield _clean(part)
        return
    for row in (part.columns, *part.rows) if part.columns else part.rows:
        yield "\t".join(_LINE.join(map(printable, cell.split("\n"))) for cell in row)
