"""A curve over the length of an average: drawn in characters on the terminal, and as a picture.

Knows points, and matplotlib where it is installed (the extra ``plot``). Does not know sweeps, commands, the service.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from ema_client.errors import UsageError

__all__ = ["check_can_draw", "draw", "text_plot"]

_WIDTH, _HEIGHT = 60, 12
#: Inches and dots per inch: 960 x 600 pixels.
_SIZE, _DPI = (8.0, 5.0), 120
_COLOUR, _BEST = "#1f6f8b", "#c2703d"

Point = tuple[float, float]


def text_plot(points: Sequence[Point], best: Point, *, scale: Callable[[float], float] = math.log) -> list[str]:
    """The lines of a plot of two or more points: ``o`` each, ``*`` the best one, ascending to the right and up.

    scale: what makes of an x its place from left to right.
    """
    places = [scale(x) for x, _ in points]
    heights = [y for _, y in points]
    canvas = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    for point, place in [*zip(points, places, strict=True), (best, scale(best[0]))]:
        column = _cell(place, min(places), max(places), _WIDTH)
        line = _HEIGHT - 1 - _cell(point[1], min(heights), max(heights), _HEIGHT)
        canvas[line][column] = "*" if point == best else "o"
    labels = {0: f"{max(heights):.5g}", _HEIGHT - 1: f"{min(heights):.5g}"}
    width = max(map(len, labels.values()))
    lines = [f"{labels.get(k, ''):>{width}} |{''.join(cells).rstrip()}" for k, cells in enumerate(canvas)]
    left, right = (f"{x:.6g}" for x in (points[0][0], points[-1][0]))
    return [*lines, f"{'':{width}} +{'-' * _WIDTH}", f"{'':{width}}  {left}{right:>{_WIDTH - len(left)}}"]


def _cell(value: float, low: float, high: float, cells: int) -> int:
    return round((value - low) / (high - low) * (cells - 1)) if high > low else cells // 2


def check_can_draw(path: Path) -> None:
    """Raises UsageError where no picture can be drawn there, before hours of evaluations."""
    if find_spec("matplotlib") is None:
        raise UsageError("a picture needs matplotlib, which is not installed", hint="pip install matplotlib")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{path}: a picture is a .png, .svg or .pdf file")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent} to draw {path.name} in")


def draw(path: Path, points: Sequence[Point], best: Point, *, title: str, label: str, decays: bool = False) -> None:
    """Draw the curve as a picture. label: of the x axis. decays: of these, 1 - x counts, and is drawn."""
    import matplotlib as mpl

    mpl.use("Agg")  # a backend that writes files and needs no screen
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    def place(x: float) -> float:
        return 1.0 - x if decays else x

    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    axes.plot([place(x) for x, _ in points], [y for _, y in points], color=_COLOUR, marker="o", markersize=4)
    axes.plot([place(best[0])], [best[1]], color=_BEST, marker="*", markersize=14, linestyle="")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{place(x):.6g}"))
    if decays:
        axes.invert_xaxis()
    axes.set_xlabel(label)
    axes.set_ylabel("result")
    axes.set_title(f"{title}: best {best[0]:.6g}, {best[1]:.6g}")
    axes.grid(color="#d8dee4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
