"""The results of a benchmark: rows of figures, one figure a round, and how rows compare.

Rows are compared round by round, each figure with the other row's figure of the same round, so that a machine which was
slow for a while was slow for both; the median of these ratios counts.

Knows numbers. Does not know what was measured, clocks, or how anything is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

__all__ = ["GIGA", "Comparison", "Group", "Need", "Row", "rate_row"]

#: GB/s are 10^9 bytes a second, as networks and memory are sold.
GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Need:
    """A comparison that a row asks for.

    bound: at least so much, or with ``most`` at most; None compares without a bound. against: the row whose figures
    divide this row's; empty: the bound is for the figure itself.
    """

    bound: float | None = None
    against: str = ""
    most: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One operation that was measured. values: a figure for each round; none where ``note`` says why."""

    name: str
    unit: str
    values: tuple[float, ...] = ()
    needs: tuple[Need, ...] = ()
    note: str = ""

    @property
    def median(self) -> float:
        return median(self.values)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A need and its outcome: a ratio for each round, or where nothing is compared the figures themselves."""

    need: Need
    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.ratios)

    @property
    def met(self) -> bool | None:
        """Whether the bound holds; None where there is no bound."""
        if self.need.bound is None:
            return None
        return self.median <= self.need.bound if self.need.most else self.median >= self.need.bound


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that were measured together. facts: sentences without which the figures mean little."""

    name: str
    title: str
    rows: tuple[Row, ...]
    facts: tuple[str, ...] = ()

    def comparisons(self, row: Row) -> tuple[Comparison, ...]:
        """The outcomes of a row's needs; a need against a row that was not measured is left out."""
        others = {other.name: other.values for other in self.rows}
        found = []
        for need in row.needs if row.values else ():
            if not need.against:
                found.append(Comparison(need, row.values))
            elif others.get(need.against):
                pairs = zip(row.values, others[need.against], strict=True)
                found.append(Comparison(need, tuple(mine / theirs for mine, theirs in pairs)))
        return tuple(found)

    @property
    def missed(self) -> int:
        """How many bounds do not hold."""
        return sum(c.met is False for row in self.rows for c in self.comparisons(row))

    def to_json(self) -> dict[str, Any]:
        rows = [_row_json(row, self.comparisons(row)) for row in self.rows]
        return {"name": self.name, "title": self.title, "facts": list(self.facts), "rows": rows}


def rate_row(
    name: str, nbytes: int, seconds: Mapping[str, Sequence[float]], needs: Iterable[Need] = (), note: str = ""
) -> Row:
    """The row of this name as GB/s: ``nbytes`` in each of its ``seconds``."""
    return Row(name, "GB/s", tuple(nbytes / s / GIGA for s in seconds.get(name, ())), tuple(needs), note)


def _row_json(row: Row, comparisons: Iterable[Comparison]) -> dict[str, Any]:
    told: dict[str, Any] = {"name": row.name, "unit": row.unit, "values": list(row.values)}
    if row.values:
        told |= {"median": row.median, "min": min(row.values), "max": max(row.values)}
    if row.note:
        told["note"] = row.note
    told["comparisons"] = [
        {
            "against": c.need.against or None,
            "ratios": list(c.ratios),
            "median": c.median,
            "bound": c.need.bound,
            "bound_is": "most" if c.need.most else "least",
            "met": c.met,
        }
        for c in comparisons
    ]
    return told
