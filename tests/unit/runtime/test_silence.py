"""How long ranks may be silent, learned from their steps."""

import pytest

from model_parallel.engine.messages import Row, StepPlan
from model_parallel.runtime.silence import MIN_LIMIT_S, NUM_FIRST_STEPS, NUM_SAMPLES, SilenceLimits

LONGEST_S = 60.0


def step(num_tokens: int) -> StepPlan:
    return StepPlan(1, 1, rows=(Row(1, 0, num_tokens, True),))


def limits(num_tokens: int, *steps_s: float) -> SilenceLimits:
    """After these steps, and the first ones."""
    learned = SilenceLimits(LONGEST_S)
    for step_s in (*[LONGEST_S] * NUM_FIRST_STEPS, *steps_s):
        learned.learn(step(num_tokens), step_s)
    return learned


def test_first_steps_of_a_size_have_the_longest_limit_and_are_not_learned_from() -> None:
    learned = limits(8)
    assert learned.of(step(8)) == LONGEST_S
    learned.learn(step(8), 0.5)
    assert learned.of(step(8)) == 2.0


@pytest.mark.parametrize(("step_s", "limit_s"), [(0.02, MIN_LIMIT_S), (0.5, 2.0), (100.0, LONGEST_S)])
def test_the_limit_is_four_long_steps_within_its_bounds(step_s: float, limit_s: float) -> None:
    assert limits(8, step_s).of(step(8)) == limit_s


def test_one_step_in_a_hundred_does_not_count() -> None:
    assert limits(8, *[0.5] * 99, 10.0).of(step(8)) == 2.0
    assert limits(8, *[0.5] * 98, 10.0, 10.0).of(step(8)) == 40.0


def test_old_steps_are_forgotten() -> None:
    assert limits(8, *[5.0] * NUM_SAMPLES, *[0.5] * NUM_SAMPLES).of(step(8)) == 2.0


def test_a_size_that_is_not_known_has_the_limit_of_the_next_larger_one() -> None:
    learned = limits(8, 0.5)
    for step_s in [1.0] * (NUM_FIRST_STEPS + 1):
        learned.learn(step(100), step_s)
    assert [learned.of(step(num_tokens)) for num_tokens in (1, 7, 15, 16, 127)] == [2.0, 2.0, 2.0, 4.0, 4.0]
    assert learned.of(step(128)) == LONGEST_S
