"""Rates over time as straight pieces, and the arrivals of a process with such a rate.

A process of unit rate is mapped through the inverse of the cumulative rate (time rescaling), so one rule serves every
kind of arrival with every kind of curve: gaps of 1 give a constant rate, exponential gaps a Poisson process, gamma gaps bursts.
"""

import bisect
import math
import random
from collections.abc import Iterator
from itertools import pairwise

from bench.loadtest.scenario import Bursts, Diurnal, OpenLoop, Stage

_PIECES_PER_PERIOD = 96
"""Straight pieces that a period of a sine is made of; its rate is then within 0.06 % of the mean."""


class Curve:
    """A function of time, linear between its points, and constant after the last."""

    def __init__(self, points: list[tuple[float, float]]) -> None:
        """(seconds, value ≥ 0); seconds never fall, and two points at the same time are a jump. The first is at 0."""
        self.points = points
        self._starts = [at_s for at_s, _ in points]
        self._areas = [0.0]
        for (from_s, first), (until_s, last) in pairwise(points):
            self._areas.append(self._areas[-1] + (until_s - from_s) * (first + last) / 2)

    def value(self, at_s: float) -> float:
        index = bisect.bisect_right(self._starts, at_s) - 1
        from_s, first = self.points[index]
        if index + 1 == len(self.points):
            return first
        until_s, last = self.points[index + 1]
        return first + (last - first) * (at_s - from_s) / (until_s - from_s)

    def area(self, until_s: float) -> float:
        """The integral from 0."""
        index = bisect.bisect_right(self._starts, until_s) - 1
        from_s, first = self.points[index]
        return self._areas[index] + (until_s - from_s) * (first + self.value(until_s)) / 2

    def reaches(self, area: float) -> float:
        """The earliest time at which the integral is `area`; inf when it never is."""
        index = max(0, bisect.bisect_left(self._areas, area) - 1)
        from_s, first = self.points[index]
        left = area - self._areas[index]
        if index + 1 == len(self.points):
            return from_s + left / first if first else (from_s if left <= 0 else math.inf)
        until_s, last = self.points[index + 1]
        slope = (last - first) / (until_s - from_s) if until_s > from_s else 0.0
        # The root of slope/2·t² + first·t = left, in the form that has no cancellation.
        denominator = first + math.sqrt(max(0.0, first * first + 2 * slope * left))
        return min(until_s, from_s + 2 * left / denominator) if denominator else from_s


def of_stages(stages: list[Stage]) -> Curve:
    """One stage after another."""
    points, at_s = [], 0.0
    for stage in stages:
        points.append((at_s, stage.start))
        at_s += stage.duration_s
        points.append((at_s, stage.start if stage.end is None else stage.end))
    return Curve(points)


def rate_curve(arrivals: OpenLoop, duration_s: float) -> Curve:
    """Requests a second over the run."""
    base = of_stages(arrivals.stages) if arrivals.stages else Curve([(0.0, arrivals.rate)])
    marks = {0.0, duration_s} | {at_s for at_s, _ in base.points if at_s <= duration_s}
    # What begins as the run ends, such as a burst, is no part of the line before it.
    jumps = {duration_s} | {at_s for (at_s, _), (after_s, _) in pairwise(base.points) if at_s == after_s}
    if arrivals.diurnal is not None:
        step_s = arrivals.diurnal.period_s / _PIECES_PER_PERIOD
        marks |= {index * step_s for index in range(math.ceil(duration_s / step_s))}
    if arrivals.bursts is not None:
        edges = _burst_edges(arrivals.bursts, duration_s)
        marks, jumps = marks | edges, jumps | edges
    points: list[tuple[float, float]] = []
    for at_s in sorted(marks):
        if at_s in jumps and at_s > 0:
            before_s = math.nextafter(at_s, 0.0)
            points.append((at_s, base.value(before_s) * _factor(arrivals.bursts, arrivals.diurnal, before_s)))
        points.append((at_s, base.value(at_s) * _factor(arrivals.bursts, arrivals.diurnal, at_s)))
    return Curve(points)


def _burst_edges(bursts: Bursts, duration_s: float) -> set[float]:
    begins = [index * bursts.every_s for index in range(math.ceil(duration_s / bursts.every_s))]
    return {edge_s for begin_s in begins for edge_s in (begin_s, begin_s + bursts.length_s) if edge_s < duration_s}


def _factor(bursts: Bursts | None, diurnal: Diurnal | None, at_s: float) -> float:
    factor = 1.0
    if bursts is not None:
        begin_s = math.floor(at_s / bursts.every_s + 1e-9) * bursts.every_s
        factor *= bursts.times if begin_s <= at_s < begin_s + bursts.length_s else 1.0
    if diurnal is not None:
        phase = 2 * math.pi * (at_s - diurnal.peak_at_s) / diurnal.period_s
        factor *= 1 + diurnal.amplitude * math.cos(phase)
    return factor


def arrival_times(arrivals: OpenLoop, duration_s: float, draw: random.Random) -> Iterator[float]:
    """Seconds from the start, never falling, all below `duration_s`. The first of a constant rate is at 0."""
    curve, position = rate_curve(arrivals, duration_s), 0.0
    if arrivals.process != "constant":
        position = _gap(arrivals, draw)
    while (at_s := curve.reaches(position)) < duration_s:
        yield at_s
        position += _gap(arrivals, draw)


def _gap(arrivals: OpenLoop, draw: random.Random) -> float:
    """Of a process of rate 1."""
    if arrivals.process == "constant":
        return 1.0
    if arrivals.process == "poisson":
        return draw.expovariate(1.0)
    return draw.gammavariate(arrivals.burstiness, 1 / arrivals.burstiness)
