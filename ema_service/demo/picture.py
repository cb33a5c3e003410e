"""The demo's one picture: samples drawn with raw and with EMA weights, the two loss curves, and that over lengths.

Knows matplotlib and rows. Does not know models, processes or the service.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")  # a backend that writes files and needs no screen
from matplotlib import pyplot as plt
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ema_service.demo.plan import DECAY, Length, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

RAW_COLOUR = "#c2703d"
EMA_COLOUR = "#1f6f8b"
INK = "#24292f"
#: Inches and dots per inch: 1320 x 990 pixels.
SIZE = (11.0, 8.25)
DPI = 120
#: Ticks of the logarithmic axis of losses; the axis shows those within its range.
TICKS = (0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.25, 0.3, 0.4, 0.6, 0.8, 1.0)


def draw(out: Path, rows: Sequence[Row], lengths: Sequence[Length], *, raw: Tensor, ema: Tensor) -> None:
    """Write the PNG. ``raw`` and ``ema``: samples, [rows, 10, 8, 8], -1 (paper) to 1 (ink)."""
    figure, axes = plt.subplot_mosaic(
        [["raw", "ema"], ["loss", "lengths"]],
        figsize=SIZE,
        height_ratios=[1, 1.25],
        layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15),
    )
    _samples(axes["raw"], raw, f"Samples from the raw weights, loss {rows[-1].raw_loss:.4f}", RAW_COLOUR)
    _samples(axes["ema"], ema, f"Samples from the EMA weights, loss {rows[-1].ema_loss:.4f}", EMA_COLOUR)
    _curves(axes["loss"], rows)
    _lengths(axes["lengths"], lengths, rows[-1].raw_loss)
    figure.suptitle(f"Handwritten digits after {rows[-1].step} steps", color=INK, fontsize=15)
    figure.savefig(out, dpi=DPI)
    plt.close(figure)


def _samples(axes: Axes, images: Tensor, title: str, colour: str) -> None:
    # A border of paper around each 8x8 image, then one big image: rows of samples, columns of digits.
    framed = images.new_full((*images.shape[:2], 10, 10), -1.0)
    framed[:, :, 1:9, 1:9] = images
    wall = framed.permute(0, 2, 1, 3).reshape(10 * images.shape[0], 10 * images.shape[1])
    axes.imshow(wall.numpy(), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_title(title, color=colour, fontsize=12)
    axes.set_xticks([4.5 + 10 * digit for digit in range(10)], [str(digit) for digit in range(10)])
    axes.set_yticks([])
    axes.tick_params(length=0, colors="#6e7781")
    axes.spines[:].set_visible(False)


def _lengths(axes: Axes, lengths: Sequence[Length], raw_loss: float) -> None:
    after = [length for length in lengths if not length.tracked]
    tracked = [length for length in lengths if length.tracked]
    axes.axhline(raw_loss, color=RAW_COLOUR, linestyle="--", label="raw weights")
    axes.plot(
        [length.sigma_rel for length in after], [length.loss for length in after],
        color=EMA_COLOUR, marker="o", markersize=4, linewidth=2, label="EMA, its length chosen after the training",
    )  # fmt: skip
    axes.plot(
        [length.sigma_rel for length in tracked], [length.loss for length in tracked],
        color=INK, marker="x", markersize=9, linestyle="", label="tracked in the training",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([0.015, 0.03, 0.06, 0.12, 0.25], ["0.015", "0.03", "0.06", "0.12", "0.25"])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("length of the EMA, sigma_rel", color=INK)
    axes.grid(color="#d8dee4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _curves(axes: Axes, rows: Sequence[Row]) -> None:
    # Not the first row, the untrained model with a loss of 1: on its scale all later losses would look flat.
    shown = [row for row in rows if row.step] or list(rows)
    steps = [row.step for row in shown]
    axes.plot(steps, [row.raw_loss for row in shown], color=RAW_COLOUR, marker="o", markersize=4, label="raw weights")
    axes.plot(
        steps, [row.ema_loss for row in shown], color=EMA_COLOUR, marker="o", markersize=4, linewidth=2,
        label=f"EMA weights, decay {DECAY} with LitEma's warm-up",
    )  # fmt: skip
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("held-out denoising loss", color=INK)
    axes.set_yscale("log")
    axes.set_yticks(TICKS, [f"{tick:.2f}" for tick in TICKS])
    axes.set_yticks([], minor=True)
    losses = [loss for row in shown for loss in (row.raw_loss, row.ema_loss)]
    axes.set_ylim(min(losses) / 1.04, max(losses) * 1.04)
    axes.grid(color="#d8dee4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
