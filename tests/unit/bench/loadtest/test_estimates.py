"""The statistics, beside scipy's and beside processes whose answers are known."""

import math

import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st

from bench.loadtest.estimates import (
    bootstrap,
    effective_size,
    incomplete_beta,
    mean_interval,
    quantile_interval,
    settled_from,
    student_p,
    student_quantile,
    trend,
    welch,
)


def autoregressive(count: int, rho: float, seed: int) -> np.ndarray:
    """x[i] = rho · x[i−1] + noise, whose effective sample size is n (1 − rho) / (1 + rho)."""
    noise = np.random.default_rng(seed).standard_normal(count)
    values = np.zeros(count)
    for index in range(1, count):
        values[index] = rho * values[index - 1] + noise[index]
    return values


@given(st.floats(0.2, 200), st.floats(0.2, 200), st.floats(0, 1))
def test_incomplete_beta_is_scipys(a: float, b: float, x: float) -> None:
    assert incomplete_beta(a, b, x) == pytest.approx(scipy.special.betainc(a, b, x), rel=1e-8, abs=1e-12)


@given(st.floats(0.5, 0.999), st.floats(1, 500))
def test_student_is_scipys(probability: float, freedom: float) -> None:
    found = student_quantile(probability, freedom)
    assert found == pytest.approx(scipy.stats.t.ppf(probability, freedom), rel=1e-5, abs=1e-5)
    assert student_p(found, freedom) == pytest.approx(2 * scipy.stats.t.sf(found, freedom), rel=1e-6)


def test_without_end_student_is_normal() -> None:
    assert student_quantile(0.975, math.inf) == pytest.approx(scipy.stats.norm.ppf(0.975), abs=1e-6)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_effective_size_is_that_of_the_process(rho: float) -> None:
    count = 20_000
    assert effective_size(autoregressive(count, rho, 1)) == pytest.approx(count * (1 - rho) / (1 + rho), rel=0.25)


def test_effective_size_of_little_is_never_more_than_there_is() -> None:
    for values in ([], [1.0], [1.0, 1.0, 1.0, 1.0, 1.0], [1.0, -1.0] * 20):
        assert effective_size(np.array(values)) <= len(values)


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_intervals_hold_what_they_say(rho: float) -> None:
    """Of 200 series, about 95 % of the intervals hold the truth; with memory, intervals that ignored it would hold 60 %."""
    in_mean = in_median = 0
    for seed in range(200):
        values = autoregressive(600, rho, seed)
        low, high, _ = mean_interval(values)
        in_mean += low <= 0 <= high
        low, high, _ = quantile_interval(values, 0.5)
        in_median += low <= 0 <= high
    # Three standard deviations of a binomial of 200 are 9; the estimated memory costs a little more.
    assert in_mean >= 178 and in_median >= 175


def test_an_interval_of_a_tail_without_values_is_open() -> None:
    assert quantile_interval(np.arange(50.0), 0.99).high == math.inf


def test_settling_is_found_and_not_made_up() -> None:
    noise = np.random.default_rng(0).standard_normal(1000)
    start = np.concatenate([np.linspace(30, 0, 150), np.zeros(850)])
    assert 100 <= settled_from(noise + start) <= 200
    assert settled_from(np.ones(1000)) == 0
    assert settled_from(noise + np.linspace(0, 50, 1000)) >= 450  # never settles


def test_a_trend_is_told_from_noise() -> None:
    times = np.linspace(0, 100, 200)
    noise = autoregressive(200, 0.5, 2)
    assert trend(times, noise).p_value > 0.01
    rising = trend(times, noise + times)
    assert rising.slope == pytest.approx(1, abs=0.1) and rising.p_value < 1e-6
    assert trend(np.ones(5), np.ones(5)).p_value == 1


def test_welch_is_scipys() -> None:
    a, b = [10.0, 11, 12, 10.5], [12.0, 13, 12.5]
    found = welch(a, b)
    assert found.p_value == pytest.approx(scipy.stats.ttest_ind(a, b, equal_var=False).pvalue, rel=1e-9)
    low, high = scipy.stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low / np.mean(a), high / np.mean(a)))
    assert welch([1.0, 1.0], [1.0, 1.0]).p_value == 1 and welch([1.0, 1.0], [2.0, 2.0]).p_value == 0


def test_resampling_finds_a_difference_and_no_other() -> None:
    def median(values: np.ndarray) -> np.ndarray:
        return np.median(values, axis=-1)

    draw = np.random.default_rng(5)
    a, b = draw.exponential(1.0, 600), draw.exponential(1.3, 600)
    found = bootstrap(a, b, median, 0)
    assert found.is_significant and found.low < found.relative < found.high
    alarms = sum(
        bootstrap(autoregressive(300, 0.7, seed), autoregressive(300, 0.7, seed + 100), median, 0, 300).p_value < 0.05
        for seed in range(60)
    )
    # 5 % of 60 are 3; a comparison that ignored the memory would raise about 25 false alarms.
    assert alarms <= 10
