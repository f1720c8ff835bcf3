"""Rates over time, and the arrivals that come of them."""

import math
import random
import statistics
from itertools import pairwise
from typing import Any

import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bench.loadtest.curves import Curve, arrival_times, of_stages, rate_curve
from bench.loadtest.scenario import OpenLoop, Stage

RATES = st.floats(1e-3, 50.0) | st.just(0.0)  # with less, a millionth of a second is below what the area can tell
STAGES = st.lists(st.builds(Stage, duration_s=st.floats(0.1, 30), start=RATES, end=RATES), min_size=1, max_size=6)


def arrivals(**fields: Any) -> OpenLoop:
    return OpenLoop.model_validate({"process": "poisson"} | fields)


@given(STAGES, st.floats(1e-9, 1) | st.just(0.0))  # the integral that it is compared with is none of nearly nothing
def test_the_area_is_the_integral_and_reaches_undoes_it(stages: list[Stage], share: float) -> None:
    curve = of_stages(stages)
    until_s = sum(stage.duration_s for stage in stages)
    at_s = share * until_s
    edges = [edge for edge, _ in curve.points if edge < at_s]
    expected = sum(scipy.integrate.quad(curve.value, a, b)[0] for a, b in pairwise([*sorted(set(edges)), at_s]))
    assert curve.area(at_s) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    reached = curve.reaches(curve.area(at_s))
    # The earliest such time: where the rate is 0 the area does not move.
    assert reached <= at_s + 1e-6
    assert curve.area(reached) == pytest.approx(curve.area(at_s), rel=1e-9, abs=1e-9)


@given(STAGES, st.sampled_from(["constant", "poisson", "gamma"]), st.integers(0, 9))
def test_arrivals_never_go_back_and_end_in_time(stages: list[Stage], process: str, seed: int) -> None:
    if not any(max(stage.start, stage.end or 0) for stage in stages):
        return
    loop = OpenLoop.model_validate({"process": process, "stages": [stage.model_dump() for stage in stages]})
    times = list(arrival_times(loop, 20.0, random.Random(seed)))
    assert all(a <= b for a, b in pairwise(times))
    assert all(0 <= at_s < 20 for at_s in times)
    assert times == list(arrival_times(loop, 20.0, random.Random(seed)))


def test_a_constant_rate_is_evenly_spaced_from_the_start() -> None:
    assert list(arrival_times(arrivals(process="constant", rate=4), 1.0, random.Random(0))) == [0.0, 0.25, 0.5, 0.75]


def test_poisson_gaps_are_exponential() -> None:
    times = list(arrival_times(arrivals(rate=50), 100.0, random.Random(3)))
    gaps = [after - before for before, after in pairwise(times)]
    assert scipy.stats.kstest(gaps, "expon", args=(0, 1 / 50)).pvalue > 0.01


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_the_mean_and_spread_asked_for(burstiness: float) -> None:
    times = list(arrival_times(arrivals(process="gamma", rate=20, burstiness=burstiness), 300.0, random.Random(1)))
    gaps = [after - before for before, after in pairwise(times)]
    # The gamma distribution's mean and coefficient of variation; 6,000 draws are within a few per cent.
    assert statistics.fmean(gaps) == pytest.approx(0.05, rel=0.1)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(burstiness**-0.5, rel=0.1)


def test_a_ramp_sends_its_area() -> None:
    ramp = arrivals(process="constant", stages=[{"duration_s": 10, "start": 0, "end": 10}])
    times = list(arrival_times(ramp, 10.0, random.Random(0)))
    assert len(times) == 50
    assert sum(at_s < 5 for at_s in times) == pytest.approx(12.5, abs=1)


def test_bursts_multiply_the_rate_while_they_last() -> None:
    loop = arrivals(process="constant", rate=10, bursts={"every_s": 5, "length_s": 1, "times": 6})
    times = list(arrival_times(loop, 10.0, random.Random(0)))
    assert sum(at_s < 1 for at_s in times) == pytest.approx(60, abs=1)
    assert sum(1 <= at_s < 5 for at_s in times) == pytest.approx(40, abs=1)
    assert sum(5 <= at_s < 6 for at_s in times) == pytest.approx(60, abs=1)
    assert sum(6 <= at_s < 10 for at_s in times) == pytest.approx(40, abs=1)


@pytest.mark.parametrize("duration_s", [3.0, 5.0, 6.0, 7.5, 10.0, 12.0])
def test_the_end_of_a_run_changes_nothing_before_it(duration_s: float) -> None:
    """Also where a burst or a stage would begin just then."""
    loops = (
        arrivals(process="constant", rate=10, bursts={"every_s": 5, "length_s": 1, "times": 6}),
        arrivals(process="constant", stages=[{"duration_s": 5, "start": 4}, {"duration_s": 5, "start": 9, "end": 3}]),
    )
    for loop in loops:
        longer = [at_s for at_s in arrival_times(loop, 20.0, random.Random(0)) if at_s < duration_s]
        assert list(arrival_times(loop, duration_s, random.Random(0))) == pytest.approx(longer)


def test_a_day_swings_around_its_mean_and_peaks_where_asked() -> None:
    curve = rate_curve(arrivals(rate=10, diurnal={"period_s": 100, "amplitude": 0.5, "peak_at_s": 25}), 100.0)
    assert curve.area(100.0) == pytest.approx(1000, rel=1e-3)
    assert curve.value(25.0) == pytest.approx(15, rel=1e-3)
    assert curve.value(75.0) == pytest.approx(5, rel=1e-3)


def test_a_rate_that_has_gone_to_nothing_brings_nothing_more() -> None:
    assert math.isinf(Curve([(0.0, 1.0), (1.0, 1.0), (1.0, 0.0)]).reaches(2.0))


@pytest.mark.parametrize("rate", [1e-10, 1.5e-253, 5e-324])
def test_a_rate_that_is_next_to_nothing_is_refused(rate: float) -> None:
    with pytest.raises(ValidationError, match="a rate must be 0, or 1e-09 at least"):
        Stage(duration_s=1.0, start=rate)
    with pytest.raises(ValidationError, match=r"greater than or equal to 0\.000000001"):
        arrivals(rate=rate)
