"""The little statistics that decisions rest on."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Line(NamedTuple):
    """A straight line through points, by least squares."""

    intercept: float
    slope: float
    r_squared: float
    """Part of the variance that the line explains; 1 for points on a line."""


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """Needs two different xs."""
    slope, intercept = statistics.linear_regression(xs, ys)
    residual = sum((y - intercept - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    total = sum((y - statistics.fmean(ys)) ** 2 for y in ys)
    return Line(intercept, slope, 1.0 - residual / total if total else 1.0)


def growth(values: Sequence[float], part: float) -> float:
    """From the median of the first `part` of the values to that of the last; single outliers do not count."""
    num_values = max(1, int(len(values) * part))
    return statistics.median(values[-num_values:]) - statistics.median(values[:num_values])
