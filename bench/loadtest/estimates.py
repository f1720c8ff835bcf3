"""The statistics of a run: how sure a figure is, when a run had settled, whether two runs differ."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
CONFIDENCE = 0.95
_BOOTSTRAP_CELLS = 4_000_000
"""Resampled values that are held at a time."""


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float
    effective: float
    """Effective sample size: how many independent values would tell as much."""


def effective_size(values: Values) -> float:
    """n / (1 + 2 Σ r), the autocorrelations summed in pairs until a pair is negative (Geyer, 1992)."""
    count = len(values)
    centred = values - values.mean() if count else values
    variance = float(centred @ centred)
    if count < 4 or variance <= 0:
        return float(count)
    size = 1 << (2 * count - 1).bit_length()
    spectrum = np.fft.rfft(centred, size)
    rho = np.fft.irfft(spectrum * np.conj(spectrum), size)[:count] / variance
    pairs = rho[: count // 2 * 2].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pairs <= 0)
    kept = pairs[: negative[0]] if len(negative) else pairs
    # The first pair holds r(0) = 1, which is counted once, not twice.
    return float(min(count, max(1.0, count / max(1.0, 2 * float(kept.sum()) - 1))))


def mean_interval(values: Values, effective: float | None = None) -> Interval:
    """Of the mean, by Student's t with the effective sample size: of a series unless it is told."""
    effective = effective_size(values) if effective is None else effective
    if len(values) < 2 or effective < 2:
        return Interval(-math.inf, math.inf, effective)
    half = student_quantile(0.5 + CONFIDENCE / 2, effective - 1) * float(values.std(ddof=1)) / math.sqrt(effective)
    mean = float(values.mean())
    return Interval(mean - half, mean + half, effective)


def quantile_interval(values: Values, quantile: float) -> Interval:
    """Between order statistics: the rank of a quantile is binomial, here normal, with the effective sample size.

    The side on which there are too few values is unbounded.
    """
    effective = effective_size(values)
    half = student_quantile(0.5 + CONFIDENCE / 2, math.inf) * math.sqrt(quantile * (1 - quantile) / max(effective, 1.0))
    ordered, count = np.sort(values), len(values)
    low, high = math.floor((quantile - half) * count), math.ceil((quantile + half) * count)
    return Interval(
        float(ordered[low]) if 0 <= low < count else -math.inf,
        float(ordered[high]) if 0 <= high < count else math.inf,
        effective,
    )


def settled_from(values: Values) -> int:
    """MSER-5 (White, 1997): the first index of the part whose mean is known best, in steps of five; 0 when all of it is.

    Looked for in the first half alone: a minimum beyond it says that nothing had settled, and half is returned.
    """
    batches = values[: len(values) // 5 * 5].reshape(-1, 5).mean(axis=1)
    count = len(batches)
    if count < 4:
        return 0
    sums, squares = np.cumsum(batches[::-1])[::-1], np.cumsum(batches[::-1] ** 2)[::-1]
    left = np.arange(count, 0, -1)
    spread = np.maximum(0.0, squares - sums**2 / left) / left**2
    return 5 * int(np.argmin(spread[: count // 2 + 1]))


class Trend(NamedTuple):
    """A straight line through values over time."""

    slope: float
    p_value: float
    """Of a slope of 0, with the effective sample size of the residuals."""


def trend(times: Values, values: Values) -> Trend:
    """Least squares. Needs two different times; without enough values nothing is significant."""
    centred = times - times.mean()
    spread = float(centred @ centred)
    if len(times) < 4 or spread == 0:
        return Trend(0.0, 1.0)
    slope = float(centred @ values) / spread
    residuals = values - values.mean() - slope * centred
    effective = effective_size(residuals)
    if effective <= 3:
        return Trend(slope, 1.0)
    # As if there were `effective` values: the residual variance with its degrees of freedom, over the spread of so many times.
    variance = float(residuals @ residuals) / len(times) * effective / (effective - 2)
    error = math.sqrt(variance / (spread * effective / len(times)))
    return Trend(slope, 0.0 if error == 0 and slope else student_p(slope / error if error else 0.0, effective - 2))


class Difference(NamedTuple):
    """How much a figure of b is above that of a."""

    relative: float
    low: float
    high: float
    p_value: float

    @property
    def is_significant(self) -> bool:
        return self.p_value < 1 - CONFIDENCE


def welch(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Two sets of repeats, by Welch's t test; relative to the mean of a."""
    first, second = np.asarray(a, float), np.asarray(b, float)
    base, change = float(first.mean()), float(second.mean() - first.mean())
    parts = [float(values.var(ddof=1)) / len(values) for values in (first, second)]
    error = math.sqrt(sum(parts))
    if error == 0:
        p_value = 1.0 if change == 0 else 0.0
        return Difference(_ratio(change, base), _ratio(change, base), _ratio(change, base), p_value)
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True)
    )
    half = student_quantile(0.5 + CONFIDENCE / 2, freedom) * error
    low, high = sorted((_ratio(change - half, base), _ratio(change + half, base)))
    return Difference(_ratio(change, base), low, high, student_p(change / error, freedom))


def bootstrap(
    a: Values, b: Values, figure: Callable[[NDArray[np.float64]], Any], seed: int, rounds: int = 1000
) -> Difference:
    """Two series of requests, from each of which as many are drawn, again and again, as it tells: its effective sample size.

    `figure` is taken along the last axis. Of what is drawn only the spread counts, since fewer values have other quantiles. The p
    value is that of no difference, by the percentile interval that just holds 0.
    """
    draw = np.random.default_rng(seed)
    base, other = (float(figure(values[None, :])[0]) for values in (a, b))
    firsts, seconds = (_resampled(values, figure, draw, rounds) for values in (a, b))
    changes = seconds - firsts
    changes += other - base - changes.mean()
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(np.quantile(changes, q)) for q in (tail, 1 - tail))
    tails = float((changes <= 0).mean()), float((changes >= 0).mean())
    # A share of 0 out of `rounds` says only that the probability is below about 1 / rounds.
    p_value = min(1.0, max(2 * min(tails), 1 / rounds))
    return Difference(_ratio(other - base, base), _ratio(low, base), _ratio(high, base), p_value)


def _resampled(values: Values, figure: Callable[[Values], Any], draw: np.random.Generator, rounds: int) -> Values:
    count = math.ceil(effective_size(values))
    at_a_time = max(1, _BOOTSTRAP_CELLS // count)
    found = []
    for begin in range(0, rounds, at_a_time):
        places = draw.integers(0, len(values), (min(at_a_time, rounds - begin), count))
        found.append(np.asarray(figure(values[places]), float))
    return np.concatenate(found)


def _ratio(change: float, base: float) -> float:
    if base == 0:
        return 0.0 if change == 0 else math.copysign(math.inf, change)
    return change / abs(base)


def student_p(t: float, freedom: float) -> float:
    """Probability of a value at least as far from 0 on either side."""
    if math.isinf(freedom):
        return math.erfc(abs(t) / math.sqrt(2))
    return incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def student_quantile(probability: float, freedom: float) -> float:
    """The value that is not exceeded with this probability (above a half), by bisection."""
    low, high = 0.0, 1.0
    while 1 - student_p(high, freedom) / 2 < probability and high < 1e12:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - student_p(middle, freedom) / 2 < probability else (low, middle)
    return (low + high) / 2


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function, by its continued fraction (Lentz's method; Numerical Recipes, 6.4)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    ) / a  # fmt: skip
    tiny, c = 1e-300, 1.0
    d = 1 / max(1 - (a + b) * x / (a + 1), tiny)
    result = d
    for m in range(1, 500):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 + numerator * d
            d = 1 / (d if abs(d) > tiny else tiny)
            c = 1 + numerator / c
            c = c if abs(c) > tiny else tiny
            result *= d * c
        if abs(d * c - 1) < 1e-14:
            break
    return front * result
