import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st

from bench.simulation.clock import TICK_S
from bench.simulation.cost import CostTable, StepCost
from cluster.policy.least_squares import nonnegative_least_squares
from model_parallel.engine.messages import Row, StepPlan
from model_parallel.engine.step_times import StepWork
from model_parallel.errors import ConfigError

COST = StepCost(knots=((1, 0.01), (4, 0.013), (100, 0.1)), row_s=1e-4, context_s=1e-6, pair_s=1e-8, empty_s=1e-4)


def test_f_goes_through_its_knots_and_on() -> None:
    assert COST.tokens_s(1) == COST.tokens_s(0.5) == 0.01
    assert COST.tokens_s(2.5) == pytest.approx(0.0115)
    assert COST.tokens_s(4) == pytest.approx(0.013)
    assert COST.tokens_s(196) == pytest.approx(0.187)
    assert StepCost(knots=((1, 0.5),)).tokens_s(1000) == 0.5


def test_a_step_costs_the_sum_of_its_parts() -> None:
    plan = StepPlan(epoch=1, step_id=1, rows=(Row(1, 9, 1, True), Row(2, 19, 1, True), Row(3, 10, 20, False)))
    work = StepWork.of(plan)
    assert work == StepWork(22, 2, 30, 20 * 20.5)
    expected_s = COST.tokens_s(22) + 2e-4 + 30e-6 + 410e-8
    assert COST.seconds(work) == pytest.approx(expected_s)
    assert CostTable(COST).ticks(plan) * TICK_S == pytest.approx(expected_s, abs=1e-9)
    assert CostTable(COST).ticks(StepPlan(epoch=1, step_id=2, finished=(1,))) * TICK_S == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("knots", "message"),
    [
        ((), "at least one"),
        (((1, 0.0),), "greater than 0"),
        (((1, 0.2), (2, 0.1)), "not fall"),
        (((2, 0.1), (2, 0.2)), "grow"),
    ],
)
def test_impossible_knots_are_refused(knots: tuple[tuple[float, float], ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StepCost(knots=knots)


def test_a_negative_cost_is_refused() -> None:
    with pytest.raises(ConfigError, match="context_s is -1"):
        StepCost(knots=((1, 1.0),), context_s=-1)


@given(st.integers(0, 1 << 30), st.integers(1, 8), st.integers(8, 40))
def test_least_squares_agree_with_scipy(seed: int, num_columns: int, num_rows: int) -> None:
    draw = np.random.default_rng(seed)
    matrix, values = draw.normal(size=(num_rows, num_columns)), draw.normal(size=num_rows)
    ours, (theirs, residual) = nonnegative_least_squares(matrix, values), scipy.optimize.nnls(matrix, values)
    assert (ours >= 0).all()
    assert np.linalg.norm(matrix @ ours - values) == pytest.approx(residual, abs=1e-7)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
