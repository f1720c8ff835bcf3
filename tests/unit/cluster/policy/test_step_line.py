"""The line of step times is found from steps as they come, with noise, with outliers, and where they are all alike."""

import random

import pytest

from cluster.policy import StepLine
from cluster.policy.step_line import FEWEST_STEPS, fit_step_line

LINE = StepLine(base_s=0.02, sequence_s=0.0005, prompt_token_s=0.0001)


def steps(number: int, noise: float = 0.0, seed: int = 0) -> list[tuple[float, float, float]]:
    rng = random.Random(seed)
    found = []
    for _ in range(number):
        num_sequences, num_prompt = rng.randrange(1, 65), rng.choice((0, 0, 0, 128, 512))
        found.append(
            (num_sequences, num_prompt, LINE.step_s(num_sequences, num_prompt) * (1 + rng.uniform(-noise, noise)))
        )
    return found


def test_exact_steps_give_their_line() -> None:
    line = fit_step_line(steps(200))
    assert line is not None
    assert (line.base_s, line.sequence_s, line.prompt_token_s) == pytest.approx((0.02, 0.0005, 0.0001), rel=1e-6)


def test_a_step_that_was_held_up_counts_for_a_few() -> None:
    """Of 300 steps one takes a minute longer; a line through all of them would be five times as high."""
    slow = [(n, p, s + (60.0 if i == 7 else 0.0)) for i, (n, p, s) in enumerate(steps(300, noise=0.05))]
    line = fit_step_line(slow)
    assert line is not None
    assert line.step_s(32, 128) == pytest.approx(LINE.step_s(32, 128), rel=0.1)


def test_what_a_busy_machine_takes_from_steps_all_the_time_is_counted() -> None:
    """One step in four takes three times as long, so a group does two thirds of what the others would let it do."""
    slow = [(n, p, 3 * s if i % 4 == 0 else s) for i, (n, p, s) in enumerate(steps(400, noise=0.05))]
    line = fit_step_line(slow)
    assert line is not None
    assert sum(line.step_s(n, p) for n, p, _ in slow) == pytest.approx(sum(s for _, _, s in slow), rel=0.02)


def test_steps_that_are_all_alike_give_what_a_step_takes() -> None:
    line = fit_step_line([(4.0, 0.0, 0.03)] * FEWEST_STEPS)
    assert line is not None
    assert line.step_s(4) == pytest.approx(0.03)


def test_no_term_is_negative_where_larger_steps_seem_to_be_faster() -> None:
    line = fit_step_line([(float(n), 0.0, 0.1 - 0.001 * n) for n in range(1, 65)])
    assert line is not None
    assert min(line.base_s, line.sequence_s, line.prompt_token_s) >= 0


def test_too_few_steps_give_none() -> None:
    assert fit_step_line(steps(FEWEST_STEPS - 1)) is None
    assert fit_step_line([(0.0, 0.0, 0.0)] * 100) is None
