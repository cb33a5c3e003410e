"""The two numbers behind all sizes: time = a + bytes / b, a the cost of asking and b the rate of the bytes.

Fitted by least squares of the *relative* error over all sizes. By the absolute error, the largest size would decide
everything, and a would be the noise of that size.

Knows arithmetic. Does not know what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["METHOD", "Fit", "fit_line"]

METHOD = "least squares of the relative error over the medians of all sizes"


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted line: time = overhead + bytes / rate.

    overhead: seconds. rate: bytes a second; infinite where more bytes took no more time.
    """

    overhead: float
    rate: float


def fit_line(sizes: Sequence[int], seconds: Sequence[float]) -> Fit | None:
    """The line through the points (bytes, seconds); None where there are fewer than two sizes.

    Minimises sum of ((a + n * x) / t - 1)^2 with x = 1 / b: two linear equations.
    """
    if len(set(sizes)) < 2:
        return None
    points = [(1.0 / t, n / t) for n, t in zip(sizes, seconds, strict=True)]
    uu, uv, vv = (sum(p[i] * p[j] for p in points) for i, j in ((0, 0), (0, 1), (1, 1)))
    u, v = sum(p[0] for p in points), sum(p[1] for p in points)
    determinant = uu * vv - uv * uv
    overhead, per_byte = (u * vv - v * uv) / determinant, (uu * v - uv * u) / determinant
    return Fit(overhead, 1.0 / per_byte if per_byte > 0 else float("inf"))
