"""Draws profiles.svg, the picture of AVERAGES.md: the weight that each update has in averages of several lengths.

``python client/pictures/profiles.py [FILE]``; standard library only.

Knows the profile of a power average (Karras et al. 2024, arXiv 2312.02696, section 3) and SVG. Does not know the
client.
"""

from __future__ import annotations

import sys
from pathlib import Path

WIDTHS = {0.25: "#c2703d", 0.15: "#8a6d3b", 0.1: "#1f6f8b", 0.05: "#24292f"}
#: In pixels: the picture, and the place of the curves in it.
SIZE, LEFT, TOP, WIDE, HIGH = (720, 300), 50, 20, 640, 230
#: The largest weight that is drawn, times the number of updates.
MOST = 20.0


def gamma_of(sigma_rel: float) -> float:
    """The exponent with (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = sigma_rel^2, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        wider = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > sigma_rel**2
        low, high = (middle, high) if wider else (low, middle)
    return low


def curve(sigma_rel: float, colour: str) -> str:
    """The profile (gamma + 1) x^gamma over x, the share of the training."""
    gamma = gamma_of(sigma_rel)
    points = [(x / 400, (gamma + 1) * (x / 400) ** gamma) for x in range(401)]
    places = " ".join(f"{LEFT + x * WIDE:.1f},{TOP + HIGH * (1 - y / MOST):.1f}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>'


def text(x: float, y: float, said: str, colour: str = "#24292f", anchor: str = "middle") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{colour}" text-anchor="{anchor}">{said}</text>'


def svg() -> str:
    """The picture."""
    base = TOP + HIGH
    marks = [text(LEFT + WIDE * share / 4, base + 18, f"{25 * share} %") for share in range(5)]
    names = [
        text(LEFT + 10, TOP + 20 + 20 * k, f"sigma_rel {width:g}", colour, "start")
        for k, (width, colour) in enumerate(WIDTHS.items())
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIZE[0]}" height="{SIZE[1]}" font-family="sans-serif" '
            'font-size="13">',
            f'<rect width="{SIZE[0]}" height="{SIZE[1]}" fill="#ffffff"/>',
            f'<path d="M{LEFT} {TOP}V{base}H{LEFT + WIDE}" fill="none" stroke="#6e7781"/>',
            *(curve(width, colour) for width, colour in WIDTHS.items()),
            *marks,
            *names,
            text(LEFT + WIDE / 2, base + 40, "updates, from the first to the latest"),
            text(LEFT, TOP - 6, "weight of an update in the average", anchor="start"),
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg")).write_text(svg())
