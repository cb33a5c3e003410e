"""The demo's output for the user: live on a terminal, plain lines anywhere else.

Knows reports and rich. Does not know processes or what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ema_service.demo import plan

#: Rows of the live table; the whole table is printed at the end.
LIVE_ROWS = 10
COLUMNS = ("step", "num_updates", "effective decay", "raw loss", "EMA loss", "EMA better by")


class Screen:
    """A context within which the demo's state is shown."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.rows: list[plan.Row] = []
        self.lengths: list[plan.Length] = []
        self.proofs: list[plan.Proof] = []
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task("starting", total=None, loss="")
        self._live = Live(console=self.console, refresh_per_second=8, transient=True, get_renderable=self._picture)

    def __enter__(self) -> Self:
        # Only on a terminal: elsewhere Live would print its last frame once more.
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        """Print a line for the user that stays on the screen."""
        self.console.print(escape(text), soft_wrap=True)

    def stage(self, text: str) -> None:
        """Tell the user what is going on now."""
        if self.console.is_terminal:
            self._bar.update(self._task, description=text)
        else:
            self.note(text)

    def progress(self, progress: plan.Progress) -> None:
        """Show how far the trainer is."""
        loss = f"loss {progress.loss:.3f}"
        self._bar.update(self._task, description="training", completed=progress.step, total=progress.steps, loss=loss)

    def row(self, row: plan.Row) -> None:
        """Show a version that was measured."""
        self.rows.append(row)
        if not self.console.is_terminal:
            self.note("  ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, _cells(row), strict=True)))

    def length(self, length: plan.Length) -> None:
        """Remember the loss of an EMA of another length."""
        self.lengths.append(length)

    def proof(self, proof: plan.Proof) -> None:
        """Remember a comparison that holds."""
        self.proofs.append(proof)

    def table(self) -> None:
        """Print all rows, and the losses of other lengths; to be called after the context."""
        self.console.print(_table(self.rows))
        if self.lengths and self.rows:
            self.console.print(_lengths(self.lengths, self.rows[-1].raw_loss))

    def _picture(self) -> Group:
        return Group(_table(self.rows[-LIVE_ROWS:]), self._bar) if self.rows else Group(self._bar)


def _cells(row: plan.Row) -> tuple[str, ...]:
    decay = "-" if row.effective_decay is None else f"{row.effective_decay:.6f}"
    better = 100 * (1 - row.ema_loss / row.raw_loss)
    return str(row.step), str(row.num_updates), decay, f"{row.raw_loss:.4f}", f"{row.ema_loss:.4f}", f"{better:+.1f} %"


def _table(rows: Sequence[plan.Row]) -> Table:
    table = Table(title="Held-out denoising loss")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _lengths(lengths: Sequence[plan.Length], raw: float) -> Table:
    table = Table(title="EMAs whose length is chosen after the training")
    for name in ("sigma_rel", "loss", "tracked in the training", "better than raw by"):
        table.add_column(name, justify="right")
    best = min(lengths, key=lambda length: length.loss)
    for length in sorted(lengths, key=lambda length: (length.sigma_rel, length.tracked)):
        cell = f"{length.loss:.4f}"
        after, tracked = ("", cell) if length.tracked else (cell, "")
        better = f"{100 * (1 - length.loss / raw):+.1f} %" + (" *" if length is best else "  ")
        table.add_row(f"{length.sigma_rel:.4g}", after, tracked, better)
    return table
